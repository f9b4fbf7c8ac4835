"""What a batch is, and what works on any batch: map its tensors, move them, count its samples."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import ClassVar, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from distkit.errors import DataError


class DataclassBatch(Protocol):
    """Any dataclass instance whose fields are batches."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]


#: A tensor whose first dim is the batch, or a tuple, list, mapping or dataclass of batches. What is no tensor
#: rides along.
Batch: TypeAlias = "Tensor | tuple[Batch, ...] | list[Batch] | Mapping[str, Batch] | DataclassBatch"

ImageBatch: TypeAlias = tuple[Tensor, Tensor]
"""images [B, C, H, W] and labels int64 [B]."""

T = TypeVar("T")
K = TypeVar("K")


def map_tensors(function: Callable[[Tensor], Tensor], batch: T) -> T:
    """The same structure with `function` applied to every tensor; everything that is not a tensor is kept."""
    return map_leaves(Tensor, function, batch)  # type: ignore[return-value]


def map_leaves(kind: type[K], function: Callable[[K], object], value: object) -> object:
    """The same structure with `function` applied to every leaf of type `kind`; everything else is kept."""
    if isinstance(value, kind):
        return function(value)
    if type(value) is dict:
        return {key: map_leaves(kind, function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):  # a union would be built in every step
        items = [map_leaves(kind, function, item) for item in value]
        made: Callable[..., object] = type(value)
        return made(*items) if hasattr(value, "_fields") else made(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value) if field.init)
        changed = {name: map_leaves(kind, function, getattr(value, name)) for name in fields}
        return dataclasses.replace(value, **changed)
    if isinstance(value, Mapping):  # such as transformers' BatchEncoding, which has attributes besides
        mapped = {key: map_leaves(kind, function, item) for key, item in value.items()}
        if not isinstance(value, MutableMapping):
            return mapped
        same = copy.copy(value)
        same.update(mapped)
        return same
    return value


def tensors(value: object) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch with the way to it, such as `[0]`, `['image']` or `.mask`."""
    if isinstance(value, Tensor):
        yield "", value
        return
    children: list[tuple[str, object]] = []
    if isinstance(value, Mapping):
        children = [(f"[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, tuple | list):
        children = [(f"[{i}]", item) for i, item in enumerate(value)]
    elif dataclasses.is_dataclass(value):
        children = [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    for name, child in children:
        for rest, tensor in tensors(child):
            yield name + rest, tensor


def to_device(batch: T, device: torch.device, channels_last: bool = False) -> T:
    """The batch on `device`; the copy does not wait for the device. Tensors that are there already are not copied.

    Args:
        batch: any batch.
        device: where to.
        channels_last: lay out the four-dim tensors as NHWC.
    """

    def move(tensor: Tensor) -> Tensor:
        if channels_last and tensor.ndim == 4:
            return tensor.to(device, non_blocking=True, memory_format=torch.channels_last)
        return tensor if tensor.device == device else tensor.to(device, non_blocking=True)

    return map_tensors(move, batch)


def batch_size(batch: object) -> int:
    """Samples in a batch: the first dim of all its tensors.

    Raises:
        DataError: it has no tensor, a 0-dim tensor, or tensors that disagree; the message names them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(batch)}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or () in sizes:
        listed = ", ".join(f"batch{name} {list(shape)}" for name, shape in shapes.items())
        raise DataError(
            "cannot tell how many samples a batch has",
            expected="tensors that all have the batch as their first dim",
            got=listed or f"no tensor in {type(batch).__name__}",
        )
    return sizes.pop()[0]


def check_batch(batch: object, num_samples: int, who: str) -> None:
    """Refuse a batch that `who` made unless it has `num_samples` samples.

    Raises:
        DataError: naming `who`, and what it returned.
    """
    try:
        size = batch_size(batch)
    except DataError as error:
        raise DataError(
            f"{who} returned {'None' if batch is None else f'a {type(batch).__name__}'}: {error}"
        ) from error
    if size != num_samples:
        raise DataError(f"{who} returned a batch of another size", expected=f"{num_samples} samples, as requested",
                        got=f"{size} samples")  # fmt: skip


class Microbatches(Protocol):
    """Where microbatches come from."""

    def microbatch(self, step: int, accum_index: int) -> Batch:
        """This rank's microbatch `accum_index` of global batch `step`, on the device."""

    def first(self) -> Batch:
        """The first microbatch of a run, read in this process; `microbatch` gives it again."""

    def close(self) -> None:
        """Leave no thread and no process behind."""
