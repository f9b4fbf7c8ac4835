"""Saved values into tensors: torch.distributed.checkpoint's planner says which box goes where, the bytes are read here.

A checkpoint of any world size and sharding loads into whole tensors and into DTensors. Each rank reads what it needs by
itself, without a collective. Nothing is unpickled: the only formats are JSON and safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from distkit.checkpoint.format import Manifest, Shard, TensorEntry
from distkit.checkpoint.staging import allocate
from distkit.checkpoint.verify import OpenFile, in_threads, list_contents, open_file, read_header
from distkit.errors import CheckpointError
from distkit.tensors.spec import spec_of, spec_text, torch_dtype

#: Most bytes of one read; also what a thread takes at a time.
BLOCK_BYTES = 2**25
#: Two reads are cheaper than one that passes over a gap larger than this.
GAP_BYTES = 2**18


@dataclass(frozen=True)
class _Block:
    """A box of saved values: from the byte `start` of `file` with `strides` (in elements) into `target`, its shape."""

    target: Tensor
    file: str
    start: int
    strides: tuple[int, ...]

    def span(self) -> int:
        """Bytes of the file from the first element to the last."""
        last = sum((size - 1) * stride for size, stride in zip(self.target.shape, self.strides, strict=True))
        return (last + 1) * self.target.element_size()

    def is_direct(self) -> bool:
        """Whether the target's memory is, byte for byte, what the file holds."""
        target = self.target
        plain = target.device.type == "cpu" and target.is_contiguous() and not target.is_conj() and not target.is_neg()
        return plain and self.span() == target.nbytes

    def pieces(self) -> Iterator[_Block]:
        """The same box as blocks that span at most BLOCK_BYTES and pass over no large gap."""
        dim = next((dim for dim, size in enumerate(self.target.shape) if size > 1), None)
        if dim is None:
            yield self
            return
        size = self.target.shape[dim]
        step = self.strides[dim] * self.target.element_size()
        gap = step - (self.span() - (size - 1) * step)
        if self.span() <= BLOCK_BYTES and gap <= GAP_BYTES:
            yield self
            return
        for first, last in ((0, size // 2), (size // 2, size)):
            target = self.target.narrow(dim, first, last - first)
            yield from replace(self, target=target, start=self.start + first * step).pieces()


def to_metadata(manifest: Manifest) -> Metadata:
    """What torch.distributed.checkpoint's planners want to know.

    Its `storage_data` is a dict from MetadataIndex to Shard. Shards without elements are left out: they share their
    offsets with others, and there is nothing to read.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    shards: dict[MetadataIndex, Shard] = {}
    for name, entry in manifest.tensors.items():
        filled = [shard for shard in entry.shards if math.prod(shard.shape)]
        chunks = [ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.shape)) for shard in filled]
        properties = TensorProperties(dtype=torch_dtype(entry.dtype))
        tensors[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        shards |= {MetadataIndex(name, chunk.offsets): shard for chunk, shard in zip(chunks, filled, strict=True)}
    return Metadata(state_dict_metadata=dict(tensors), storage_data=shards)


class _Reader:
    """Reads tensors of one checkpoint; the header of each file is read once, when it is first needed."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self._manifest = directory, manifest
        self._metadata = to_metadata(manifest)
        self._contents = list_contents(directory, manifest)
        self._begins: dict[str, dict[str, int]] = {}

    def load(self, tensors: Mapping[str, Tensor], threads: int) -> None:
        """Fill `tensors`; nothing is written before everything that can be known beforehand fits."""
        self._check(tensors)
        with torch.no_grad():
            blocks = [piece for block in self._plan(tensors) for piece in block.pieces()]
        staged = [block for block in blocks if not block.is_direct()]
        size = max((block.span() for block in staged), default=0)
        device = next((block.target.device for block in staged if block.target.is_cuda), torch.device("cpu"))

        def read(batches: Iterable[list[_Block]]) -> None:
            staging = allocate(max(size, 1), device)
            for batch in batches:
                with open_file(self._directory, batch[0].file) as file:
                    for block in batch:
                        _read(file, block, staging)

        in_threads(read, _batches(blocks), threads)

    def whole(self, name: str) -> Tensor:
        """The tensor `name` on the CPU."""
        entry = self._entry(name)
        tensor = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
        self.load({name: tensor}, threads=1)
        return tensor

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._manifest.tensors:
            raise CheckpointError(f"{self._directory}: there is no tensor {name}")
        return self._manifest.tensors[name]

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            entry = self._entry(name)
            if entry.spec != spec_of(tensor):
                saved, here = spec_text(entry.spec), spec_text(spec_of(tensor))
                raise CheckpointError(f"{self._directory}: tensor {name} is {saved}, to be loaded into {here}")
            if tensor.is_meta:
                raise CheckpointError(f"{self._directory}: tensor {name} is to be loaded into one without memory")

    def _plan(self, tensors: Mapping[str, Tensor]) -> Iterator[_Block]:
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), self._metadata)
        for item in planner.create_local_plan().items:
            # a thread that writes into it has its own grad mode
            target = planner.resolve_tensor(item).detach()
            shard = self._metadata.storage_data[item.storage_index]
            strides = tuple(math.prod(shard.shape[dim + 1 :]) for dim in range(len(shard.shape)))
            skipped = sum(offset * stride for offset, stride in zip(item.storage_offsets, strides, strict=True))
            yield _Block(target, shard.file, self._begin(shard) + skipped * target.element_size(), strides)

    def _begin(self, shard: Shard) -> int:
        if shard.file not in self._begins:
            with open_file(self._directory, shard.file) as file:
                self._begins[shard.file] = read_header(file, self._contents)
        return self._begins[shard.file][shard.key]


def _batches(blocks: Iterable[_Block]) -> list[list[_Block]]:
    """What one thread does in one go: blocks of one file, in its order, of about BLOCK_BYTES together."""
    batches: list[list[_Block]] = []
    room = 0
    for block in sorted(blocks, key=lambda block: (block.file, block.start)):
        if not batches or batches[-1][0].file != block.file or room < block.span():
            batches.append([])
            room = BLOCK_BYTES
        batches[-1].append(block)
        room -= block.span()
    return batches


def _read(file: OpenFile, block: _Block, staging: Tensor) -> None:
    target = block.target
    if block.is_direct():
        file.read_into(block.start, _memory(target))
        return
    part = staging[: block.span()]
    file.read_into(block.start, _memory(part))
    target.copy_(part.view(target.dtype).as_strided(target.shape, block.strides))


def _memory(tensor: Tensor) -> memoryview:
    # a single element may have any stride, and numpy has no bfloat16: the same bytes as uint8
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def load_tensors(directory: Path, manifest: Manifest, tensors: Mapping[str, Tensor], threads: int = 2) -> None:
    """Copy saved values into `tensors`, in place; this rank alone, without a collective.

    Contiguous CPU tensors are read into directly; others (other devices, other strides) through a buffer of at most
    BLOCK_BYTES a thread. The bytes are not hashed again: `verify` comes first.

    Args:
        directory: the checkpoint.
        manifest: what it holds.
        tensors: by their names in the checkpoint, which may hold more. Plain tensors take the whole value on any
            device, DTensors the part of this rank, however it was sharded when it was saved.
        threads: that read at once.

    Raises:
        CheckpointError: a name is missing, a dtype or shape differs (nothing is ever cast), a header does not fit:
            `tensors` are unchanged then. A file that ends early or cannot be read: they may be half loaded.
    """
    _Reader(directory, manifest).load(tensors, threads)


def read_tensor(directory: Path, manifest: Manifest, name: str) -> Tensor:
    """The whole tensor `name`, on the CPU.

    Raises:
        CheckpointError: there is none, or as `load_tensors`.
    """
    return _Reader(directory, manifest).whole(name)


def iterate(directory: Path, manifest: Manifest, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Name and whole value of each tensor whose name begins with `prefix`, by name, one in memory at a time.

    Raises:
        CheckpointError: as `load_tensors`.
    """
    reader = _Reader(directory, manifest)
    for name in sorted(manifest.tensors):
        if name.startswith(prefix):
            yield name, reader.whole(name)
