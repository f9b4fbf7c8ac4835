"""A tensor of which each rank holds a run of elements: how DeepSpeed's ZeRO cuts parameters and optimizer state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]

#: What may be done with the whole as it is done with this rank's elements.
_ELEMENTWISE = frozenset({
    torch.ops.aten.detach.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.zeros_like.default,
})  # fmt: skip


class FlatShard(Tensor):
    """Elements `start`, `start` + 1, … (row-major) of a tensor, and the shape, dtype and device of all of it.

    The ranks hold all elements together, each of them once. Only what goes element by element can be done with it; it
    speaks torch.distributed.checkpoint's protocol for tensors of other kinds (torch.distributed._checkpointable), so
    that a checkpoint stores and loads each rank's elements without gathering them.

    Args:
        local: [elements here], shared, not copied; may be empty.
        shape: of the whole tensor.
        start: index of the first element here in the whole, flattened.
    """

    local: Tensor
    start: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, local: Tensor, shape: Sequence[int], start: int) -> FlatShard:
        """A tensor without memory of its own."""
        assert local.ndim == 1, local.shape
        return Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=local.dtype, device=local.device)

    def __init__(self, local: Tensor, shape: Sequence[int], start: int) -> None:
        assert start + local.numel() <= math.prod(shape), (start, local.shape, shape)
        self.local, self.start = local.detach(), start

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> FlatShard:
        """Do `func` with the elements here.

        Raises:
            TypeError: it needs the others.
        """
        if func not in _ELEMENTWISE:
            raise TypeError(f"{func} of a tensor whose elements are spread over several ranks")
        shard, *rest = args
        assert isinstance(shard, FlatShard)
        return FlatShard(func(shard.local, *rest, **(kwargs or {})), shard.shape, shard.start)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        """Where the elements here are."""
        stop = self.start + self.local.numel()
        return f"FlatShard({list(self.shape)}, {self.dtype}, elements {self.start} to {stop})"

    @property
    def placements(self) -> str:
        """What tells two layouts apart."""
        return f"{self.start}+{self.local.numel()}"

    def boxes(self) -> list[Box]:
        """The elements here as (offsets, sizes) of boxes, in order; each is contiguous."""
        return list(boxes(tuple(self.shape), self.start, self.start + self.local.numel()))

    def part(self, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The elements of a box, or of rows of one, that is here; a view."""
        begin = _flat_index(self.shape, offsets) - self.start
        return self.local[begin : begin + math.prod(sizes)].view(tuple(sizes))

    def whole(self) -> Tensor:
        """A plain tensor with all values, on every rank; all ranks together."""
        # offloaded: the ranks talk on the device
        device = self.device if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
        full = torch.zeros(math.prod(self.shape), dtype=self.dtype, device=device)
        full[self.start : self.start + self.local.numel()] = self.local
        # every element is 0 on all ranks but one; summed as bytes a -0.0 keeps its sign
        dist.all_reduce(full.view(torch.uint8))
        return full.view(self.shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self.boxes()]

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        sizes = dict(self.boxes())
        offsets = tuple(index.offset or ())
        return self.part(offsets, sizes[offsets])


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a row-major `shape` as boxes, at most 2 x dims - 1, each contiguous; in order."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    (first, begin), (last, end) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        yield from _in_row(first, boxes(shape[1:], begin, end))
        return
    if begin:
        yield from _in_row(first, boxes(shape[1:], begin, inner))
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, boxes(shape[1:], 0, end))


def _in_row(row: int, found: Iterator[Box]) -> Iterator[Box]:
    return (((row, *offsets), (1, *sizes)) for offsets, sizes in found)


def _flat_index(shape: Sequence[int], offsets: Sequence[int]) -> int:
    index = 0
    for size, offset in zip(shape, offsets, strict=True):
        index = index * size + offset
    return index
