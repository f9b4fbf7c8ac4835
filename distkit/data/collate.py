"""How the samples of a map-style data set become a batch: by its own `collate`, or by torch's rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Number
from typing import TypeAlias, cast

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from distkit.data.batch import Batch

Collate: TypeAlias = Callable[[list[object]], Batch]
"""The samples of a batch, in order -> the batch: tensors whose first dim has as many entries."""
#: Data sets that are looked into, one in another.
MAX_WRAPPERS = 8
ADVICE = "padding in the data set, or a method collate(samples) of it that pads and returns the batch"


def collate_of(samples: object) -> Collate:
    """The method `collate` of a map-style data set, or of the one that it wraps (Subset, TensorSamples); else torch's.

    This is where samples of different sizes are padded to one: in the worker, once a batch.
    """
    for each in with_inner(samples):
        own = getattr(each, "collate", None)
        if own is not None:
            return cast(Collate, own)
    return cast(Collate, default_collate)


def with_inner(samples: object) -> Iterator[object]:
    """A data set, and those that it wraps, from outside to inside: torch's Subset, `TensorSamples`."""
    for _ in range(MAX_WRAPPERS):
        if samples is None or isinstance(samples, list | tuple | np.ndarray | Tensor):
            return
        yield samples
        inner = getattr(samples, "dataset", None)
        samples = getattr(samples, "samples", None) if inner is None else inner


def why_no_batch(samples: Sequence[object], names: Sequence[str]) -> str | None:
    """Why torch's rules make no batch of these samples: what differs, and between which two; None where nothing does.

    Args:
        samples: of one batch.
        names: what to call each.
    """
    for number, sample in enumerate(samples):
        reason = _difference(samples[0], sample, "the sample")
        if reason is not None:
            what, first, other = reason
            if other is None:
                return f"{what} is {first} ({names[number]})"
            return f"{what} is {first} in {names[0]}, and {other} in {names[number]}"
    return None


def _difference(first: object, other: object, where: str) -> tuple[str, str, str | None] | None:
    """Where two samples differ, and how: (where, what the first has, what the other has)."""
    arrays = Tensor | np.ndarray
    if isinstance(first, arrays) and isinstance(other, arrays):
        shapes = list(first.shape), list(other.shape)
        return (where, f"of shape {shapes[0]}", f"of shape {shapes[1]}") if shapes[0] != shapes[1] else None
    if type(first) is not type(other) and not (isinstance(first, Number) and isinstance(other, Number)):
        return where, f"a {type(first).__name__}", f"a {type(other).__name__}"
    if isinstance(first, str | bytes | Number | np.generic):
        return None
    pairs: Iterator[tuple[str, object, object]]
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        if first.keys() != other.keys():
            return where, f"a dict of {sorted(map(str, first))}", f"a dict of {sorted(map(str, other))}"
        pairs = ((f"[{key!r}]", first[key], other[key]) for key in first)
    elif isinstance(first, Sequence) and isinstance(other, Sequence):
        if len(first) != len(other):
            return where, f"of length {len(first)}", f"of length {len(other)}"
        pairs = ((f"[{i}]", *pair) for i, pair in enumerate(zip(first, other, strict=True)))
    else:
        return where, f"a {type(first).__module__}.{type(first).__qualname__}, of which torch makes no tensor", None
    stem = "" if where == "the sample" else where
    return next((found for key, a, b in pairs if (found := _difference(a, b, stem + key))), None)
