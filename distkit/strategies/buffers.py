"""Buffers of several ranks: rank 0's statistics count, those that are a rank's own stay, all others are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distkit.errors import ConfigError
from distkit.runtime.process import Runtime
from distkit.tensors.buffers import BufferSlot, buffer_slots, extra_states
from distkit.tensors.spec import spec_of, spec_text

ADVICE = "distkit.register_rank_buffer in place of register_buffer, or the same values on all ranks"


def share_statistics_(module: nn.Module, averages: Sequence[Tensor], runtime: Runtime) -> None:
    """Broadcast rank 0's statistics of BatchNorm and the `averages` of buffers; all ranks together."""
    if runtime.world_size == 1:
        return
    statistics = [slot.tensor for slot in buffer_slots(module) if slot.statistic]
    for tensor in [*(tensor for tensor in statistics if tensor is not None), *averages]:
        dist.broadcast(tensor, src=0)


@torch.no_grad()
def check_alike(module: nn.Module, runtime: Runtime) -> None:
    """Refuse what differs between ranks and is saved once; all ranks together, which may wait for the device.

    Buffers with persistent=False may differ in shape: such a cache is recomputed by its layer.

    Raises:
        ConfigError: on all ranks, naming the buffer, or the module with an extra state.
    """
    slots = [slot for slot in buffer_slots(module) if not (slot.rank_own or slot.statistic)]
    extra = {name: _digest(state) for name, state in extra_states(module).items()}
    if runtime.world_size == 1 or not (slots or extra):
        return
    specs = runtime.gather([(None if slot.tensor is None else spec_text(spec_of(slot.tensor))) for slot in slots])
    compared = []
    for index, slot in enumerate(slots):
        one = [rank[index] for rank in specs]
        if len(set(one)) == 1:
            compared.append(slot)
        elif slot.persistent:
            other = next(rank for rank, spec in enumerate(one) if spec != one[0])
            raise _differs(f"buffer {slot.name}", f"{one[0]} on rank 0, {one[other]} on rank {other}")
    names = _unlike_rank_0(compared)
    if names:
        raise _differs(f"buffer {names[0]}", "other values than on rank 0")
    first, *others = runtime.gather(extra)
    for name in first:
        if any(other.get(name) != first[name] for other in others):
            raise _differs(f"the extra state (get_extra_state) of {name or 'the model'}", "another one")


def _unlike_rank_0(slots: Sequence[BufferSlot]) -> list[str]:
    """Names of the buffers, of one dtype and shape on all ranks, whose bits some rank has otherwise."""
    named = {slot.name: slot.tensor for slot in slots if slot.tensor is not None and slot.tensor.numel()}
    dense = {name: tensor for name, tensor in named.items() if tensor.layout is torch.strided}
    if not dense:
        return []
    unlike = []
    for tensor in dense.values():
        own = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        first = own.clone()
        dist.broadcast(first, src=0)
        unlike.append((own != first).any())
    flags = torch.stack(unlike).to(torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [name for name, flag in zip(dense, flags.tolist(), strict=True) if flag]


def _differs(what: str, got: str) -> ConfigError:
    return ConfigError(f"{what} differs between ranks, and a checkpoint has one for all of them",
                       expected="the same on all ranks, or a buffer that is declared each rank's own", got=got,
                       fix=ADVICE)  # fmt: skip


def _digest(state: object) -> str:
    if isinstance(state, Tensor):
        return hashlib.sha256(state.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return json.dumps(state, sort_keys=True, default=repr)
