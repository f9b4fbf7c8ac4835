"""Who writes which bytes: torch.distributed.checkpoint's planners, with replicated tensors spread over the ranks."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from distkit.checkpoint.format import DTYPES, Shard, TensorEntry, shard_name, spec_bytes
from distkit.errors import CheckpointError, ConfigError
from distkit.json_files import MAX_NAME, parse
from distkit.tensors.buffers import extra_states, split_extra
from distkit.tensors.flat_shard import FlatShard
from distkit.tensors.shards import local_part
from distkit.tensors.spec import dtype_name, is_expanded

#: Replicated tensors of at least this many bytes a rank are cut into rows; smaller ones go whole to some rank.
SPREAD_BYTES = 2**18
#: Files of a rank, so that several threads can hash them and a buffer need not be large; not below MIN_FILE_BYTES each.
FILES = 8
MIN_FILE_BYTES = 2**25
#: Largest file, but for single rows that are larger.
MAX_FILE_BYTES = 2**28


@dataclass(frozen=True)
class Piece:
    """A box of the tensor `name` that one rank writes, as `key` into a file."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> str:
        """The tensor's name where the box begins at 0, else `NAME@OFFSET,OFFSET`; an @ in a name is doubled."""
        place = "@" + ",".join(map(str, self.offsets)) if any(self.offsets) else ""
        return self.name.replace("@", "@@") + place

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return spec_bytes((self.dtype, self.shape))


@dataclass(frozen=True)
class Layout:
    """Everything a checkpoint will hold: for each rank its files, and for each tensor its shards."""

    files: tuple[Mapping[str, tuple[Piece, ...]], ...]
    tensors: Mapping[str, TensorEntry]


def local_plan(shared: Mapping[str, Tensor], own: Mapping[str, Tensor], rank: int, world_size: int) -> SavePlan:
    """What this rank could write.

    Args:
        shared: tensors of the run. Plain ones hold the same on every rank, DTensors and FlatShards this rank's part.
        own: tensors that only this rank has, under names that no other rank uses.
        rank, world_size: this process.

    Raises:
        CheckpointError: a dtype that safetensors does not know.
    """
    check_storable({**shared, **own})
    sharded = {name: tensor for name, tensor in shared.items() if isinstance(tensor, DTensor | FlatShard)}
    items = list(create_default_local_save_plan(sharded, is_coordinator=rank == 0).items)
    for name, tensor in shared.items():
        if name not in sharded:
            items.append(_item(name, tensor, *_share(tensor, rank, world_size)))
    items += [_item(name, tensor, 0, None) for name, tensor in own.items()]
    return SavePlan(items)


def check_storable(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that could not be written, or not be read back in place.

    Raises:
        CheckpointError: naming the first one.
    """
    for name, tensor in tensors.items():
        if dtype_name(tensor) not in DTYPES:
            raise CheckpointError(f"tensor {name} has dtype {tensor.dtype}, which a checkpoint cannot hold")
        if not name.isprintable() or len(name) > MAX_NAME:
            raise CheckpointError(f"tensor name {name!a:.80} holds a character that cannot be printed, or is too long")
        if tensor.layout != torch.strided:
            raise CheckpointError(f"tensor {name} is {tensor.layout}, which a checkpoint cannot hold")
        if is_expanded(local_part(tensor)):
            raise CheckpointError(f"tensor {name} is expanded: several of its elements share memory")


def check_model_storable(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse, before the first step, a run that no checkpoint could hold.

    Args:
        module: the model, for its extra states.
        tensors: of the run, by name.

    Raises:
        ConfigError: naming the tensor or module.
    """
    extra, values = split_extra(extra_states(module))
    try:
        check_storable({**tensors, **extra})
    except CheckpointError as error:
        raise ConfigError(str(error), expected="tensors that safetensors can hold and a resume can write to",
                          fix="another dtype, .contiguous(), or --checkpoint.no-enabled") from error  # fmt: skip
    for name, state in values.items():
        if not _survives_json(state):
            raise ConfigError(f"get_extra_state of {name or 'the model'} returns what a checkpoint cannot hold",
                              expected="a tensor, or a value that JSON reads back unchanged",
                              got=type(state).__name__, fix="--checkpoint.no-enabled")  # fmt: skip


def _survives_json(value: object) -> bool:
    try:
        return bool(parse(json.dumps(value).encode(), finite=False) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _share(tensor: Tensor, rank: int, world_size: int) -> tuple[int, int | None]:
    """First row and number of rows of this rank; (0, None) is the whole tensor, of which one rank will be chosen."""
    rows = tensor.shape[0] if tensor.ndim else 0
    if rows < world_size or tensor.nbytes < world_size * SPREAD_BYTES:
        return 0, None
    start, stop = rank * rows // world_size, (rank + 1) * rows // world_size
    return start, stop - start


def _item(name: str, tensor: Tensor, start: int, rows: int | None) -> WriteItem:
    offsets, sizes = [0] * tensor.ndim, list(tensor.shape)
    if rows is not None:
        offsets[0], sizes[0] = start, rows
    box = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
    data = TensorWriteData(chunk=box, properties=TensorProperties.create_from_tensor(tensor), size=tensor.shape)
    return WriteItem(MetadataIndex(name, box.offsets), WriteItemType.SHARD, tensor_data=data)


def global_layout(plans: Sequence[SavePlan]) -> Layout:
    """Decide over the plans of all ranks, in their order; every rank computes the same result on its own.

    What several ranks could write goes to the one with the least so far (torch's dedup_save_plans).
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with torch.no_grad():
        final, metadata = planner.create_global_plan(list(plans))
    files = []
    shards: dict[str, list[Shard]] = defaultdict(list)
    for rank, plan in enumerate(final):
        pieces = sorted(map(_piece, plan.items), key=lambda piece: (piece.name, piece.offsets))
        mine = _into_files(pieces, rank, len(final))
        files.append(mine)
        for file, held in mine.items():
            for piece in held:
                shards[piece.name].append(Shard(file, piece.key, piece.offsets, piece.shape))
    return Layout(tuple(files), _entries(metadata, shards))


def _piece(item: WriteItem) -> Piece:
    assert item.tensor_data is not None  # local_plan makes items of tensors only
    box, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
    return Piece(item.index.fqn, tuple(box.offsets), tuple(box.sizes), dtype_name(dtype))


def _entries(metadata: Metadata, shards: Mapping[str, list[Shard]]) -> dict[str, TensorEntry]:
    entries = {}
    for name, stored in sorted(metadata.state_dict_metadata.items()):
        stored = cast(TensorStorageMetadata, stored)
        dtype = dtype_name(stored.properties.dtype)
        boxes = tuple(sorted(shards[name], key=lambda shard: shard.offsets))
        entries[name] = TensorEntry(dtype, tuple(stored.size), boxes)
    return entries


def _into_files(pieces: list[Piece], rank: int, world_size: int) -> dict[str, tuple[Piece, ...]]:
    """Cut what one rank writes into files of about the same size."""
    total = sum(piece.nbytes for piece in pieces)
    if not pieces:
        return {}
    limit = min(max(math.ceil(total / FILES), MIN_FILE_BYTES), MAX_FILE_BYTES)
    count = math.ceil(total / limit) or 1
    limit = math.ceil(total / count)
    files: list[list[Piece]] = [[]]
    room = limit
    waiting = pieces[::-1]
    while waiting:
        piece = waiting.pop()
        if piece.nbytes > room and len(files) < count:
            head, tail = _cut(piece, room)
            waiting.append(tail)
            if head is not None:
                files[-1].append(head)
            files.append([])
            room = limit
            continue
        files[-1].append(piece)
        room -= piece.nbytes
    kept = [file for file in files if file]
    return {shard_name(rank, world_size, index): tuple(file) for index, file in enumerate(kept)}


def _cut(piece: Piece, room: int) -> tuple[Piece | None, Piece]:
    """The rows of `piece` that fit into `room` bytes, and the rest."""
    rows = piece.shape[0] if piece.shape else 0
    fit = room * rows // piece.nbytes if rows else 0
    if not 0 < fit < rows:
        return None, piece
    head = replace(piece, shape=(fit, *piece.shape[1:]))
    tail = replace(piece, shape=(rows - fit, *piece.shape[1:]), offsets=(piece.offsets[0] + fit, *piece.offsets[1:]))
    return head, tail


def piece_of(tensors: Mapping[str, Tensor], piece: Piece) -> Tensor:
    """The values of `piece`, a view of this rank's tensor."""
    tensor = tensors[piece.name].detach()
    if isinstance(tensor, FlatShard):
        return tensor.part(piece.offsets, piece.shape)
    if isinstance(tensor, DTensor):
        return _part_of_local(tensor, piece)
    for dim, (start, length) in enumerate(zip(piece.offsets, piece.shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _part_of_local(tensor: DTensor, piece: Piece) -> Tensor:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = tensor.to_local()
    _, begin = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    for dim, (start, length) in enumerate(zip(piece.offsets, piece.shape, strict=True)):
        local = local.narrow(dim, start - begin[dim], length)
    return local
