"""Two tensors, bit by bit: how many elements differ, by how much, and which is the first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distkit.tensors.spec import dtype_name

#: Elements that are compared at a time, so that temporaries stay small.
BLOCK = 2**20
#: An integer type as wide as an element, to compare bits: -0.0 is not 0.0, and NaN may be NaN.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Array = npt.NDArray[np.number]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How two tensors of one dtype and shape differ.

    Attributes:
        name, dtype, shape: of the tensor.
        count: elements whose bits differ, >= 1.
        max_abs: largest |a - b| among those where both are finite; None where there are none.
        max_relative: largest |a - b| / max(|a|, |b|) of the same.
        not_finite: elements that differ and are infinite or NaN on a side.
        same_value: elements that differ in their bits alone: 0.0 and -0.0, NaN and NaN.
        index, first, second: the first element that differs, in the order of the last dim first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    max_abs: float | int | None
    max_relative: float | None
    not_finite: int
    same_value: int
    index: tuple[int, ...]
    first: object
    second: object

    def __str__(self) -> str:
        words = [f"{self.count:,} of {math.prod(self.shape):,} elements differ"]
        if self.max_abs is not None:
            words.append(f"max abs {_number(self.max_abs)}, max relative {_number(self.max_relative)}")
        if self.not_finite:
            words.append(f"{self.not_finite:,} not finite")
        if self.same_value:
            words.append(f"{self.same_value:,} in the sign of zero or the payload of NaN alone")
        words.append(f"first at {list(self.index)}: {self.first} and {self.second}")
        return f"{self.name} {self.dtype} {list(self.shape)}: {', '.join(words)}"


def _number(value: float | None) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def compare(name: str, first: Tensor, second: Tensor) -> Difference | None:
    """How two CPU tensors of one dtype and shape differ; None when every bit is the same."""
    count = not_finite = same_value = 0
    max_abs: float | int | None = None
    max_relative: float | None = None
    place = -1
    for start, mine, other in _different(first.reshape(-1), second.reshape(-1)):
        if place < 0:
            place = start
        a, b = _exact(mine), _exact(other)
        finite, same = np.isfinite(a) & np.isfinite(b), (a == b) | (np.isnan(a) & np.isnan(b))
        count += a.size
        not_finite += int(np.count_nonzero(~finite))
        same_value += int(np.count_nonzero(same))
        if finite.any():
            absolute, relative = _distances(a[finite], b[finite])
            max_abs = absolute if max_abs is None else max(max_abs, absolute)
            max_relative = relative if max_relative is None else max(max_relative, relative)
    if not count:
        return None
    return Difference(
        name=name,
        dtype=dtype_name(first),
        shape=tuple(first.shape),
        count=count,
        max_abs=max_abs,
        max_relative=max_relative,
        not_finite=not_finite,
        same_value=same_value,
        index=tuple(int(i) for i in np.unravel_index(place, tuple(first.shape))),
        first=_shown(first, place),
        second=_shown(second, place),
    )


def _different(first: Tensor, second: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each block that differs: the place of its first difference, and the elements of both sides that differ."""
    for start in range(0, first.numel(), BLOCK):
        mine, other = first[start : start + BLOCK], second[start : start + BLOCK]
        bits = _BITS[mine.element_size()]
        unequal = mine.view(bits) != other.view(bits)
        places = unequal.nonzero().reshape(-1)
        if places.numel():
            # gathered as bits: not every dtype can be indexed
            one, two = (side.view(bits)[places].view(side.dtype) for side in (mine, other))
            yield start + int(places[0]), one, two


def _exact(values: Tensor) -> Array:
    """As numpy, without loss: floats as float64, complex numbers as complex128, integers as they are."""
    if values.is_complex():
        return values.to(torch.complex128).numpy()
    if values.is_floating_point():
        return values.double().numpy()
    return (values.view(torch.uint8) if values.dtype == torch.bool else values).numpy()


def _distances(a: Array, b: Array) -> tuple[float | int, float]:
    """The largest absolute and relative difference of finite values."""
    if np.issubdtype(a.dtype, np.integer):
        # the difference of two 64-bit integers fits into 64 bits without a sign
        high, low = np.maximum(a, b).astype(np.int64 if a.dtype.kind == "i" else np.uint64), np.minimum(a, b)
        gap = high.view(np.uint64) - low.astype(high.dtype).view(np.uint64)
        size = np.maximum(np.abs(a.astype(np.float64)), np.abs(b.astype(np.float64)))
        return int(gap.max()), float((gap.astype(np.float64) / size).max())
    with np.errstate(over="ignore", invalid="ignore"):
        distance, size = np.abs(a - b), np.maximum(np.abs(a), np.abs(b))
        # 0.0 and -0.0 differ by nothing
        relative = np.divide(distance, size, out=np.zeros_like(distance), where=size > 0)
    return float(distance.max()), float(relative.max())


def _shown(tensor: Tensor, place: int) -> str:
    """One element as text that tells it from every other of its dtype, but for the payload of NaN."""
    return repr(tensor.reshape(-1)[place].item())
