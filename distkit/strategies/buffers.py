"""Buffers of several ranks: each rank's own stay, statistics are rank 0's, the others should be the same everywhere.

Buffers with persistent=False are their layer's business: it recomputes them, so they are neither compared nor sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distkit.checkpoint.digest import state_digest
from distkit.errors import ConfigError
from distkit.runtime.process import Runtime
from distkit.tensors.buffers import BufferSlot, buffer_slots, extra_states
from distkit.tensors.spec import spec_of, spec_text


@torch.no_grad()
def refuse_unlike(module: nn.Module, runtime: Runtime) -> None:
    """Refuse what differs between ranks after a forward and is saved once; all ranks together, waits for the device.

    Raises:
        ConfigError: on all ranks, naming the buffer, or the module with an extra state.
    """
    own: tuple[dict[str, str], dict[str, str]] = (
        {slot.name: spec_text(spec_of(tensor)) for slot in _compared(module) if (tensor := slot.tensor) is not None},
        {name: _digest(state) for name, state in extra_states(module).items()},
    )
    first, *others = runtime.gather(own)
    for rank, other in enumerate(others, 1):
        for mine, theirs, what in zip(
            first, other, ("buffer {}", "the extra state (get_extra_state) of {}"), strict=True
        ):
            name = next((n for n in (*mine, *theirs) if mine.get(n) != theirs.get(n)), None)
            if name is not None:
                got = f"{mine.get(name)} on rank 0, {theirs.get(name)} on rank {rank}"
                raise _differs(what.format(name or "the model"), got if "buffer" in what else None)
    if unlike := unlike_rank_0(_values(_compared(module)), runtime):
        raise _differs(f"buffer {unlike[0]}", "other values than on rank 0")


@torch.no_grad()
def share_buffers_(module: nn.Module, averages: Sequence[Tensor], runtime: Runtime) -> list[str]:
    """Give every rank rank 0's buffers and `averages` of buffers, as a checkpoint has them; all ranks together.

    Returns:
        names of those that differed and are no statistics: from now on they are rank 0's everywhere.
    """
    if runtime.world_size == 1:
        return []
    compared = _compared(module)
    unlike = unlike_rank_0(_values(compared), runtime)
    sent = [slot.tensor for slot in buffer_slots(module) if slot.statistic]
    sent += [slot.tensor for slot in compared if slot.name in unlike]
    for tensor in [*(tensor for tensor in sent if tensor is not None), *averages]:
        dist.broadcast(tensor, src=0)
    return unlike


def _compared(module: nn.Module) -> list[BufferSlot]:
    slots = [slot for slot in buffer_slots(module) if slot.persistent and not (slot.rank_own or slot.statistic)]
    return [slot for slot in slots if slot.tensor is not None and slot.tensor.layout is torch.strided]


def _values(slots: Sequence[BufferSlot]) -> dict[str, Tensor]:
    return {slot.name: slot.tensor.detach() for slot in slots if slot.tensor is not None}


@torch.no_grad()
def unlike_rank_0(tensors: Mapping[str, Tensor], runtime: Runtime) -> list[str]:
    """Names of `tensors`, of one dtype and shape on all ranks, that some rank has otherwise than by rounding."""
    named = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if runtime.world_size == 1 or not named:
        return []
    unlike = []
    for tensor in named.values():
        first = tensor.contiguous().clone()
        dist.broadcast(first.view(-1).view(torch.uint8), src=0)
        rounded = first.is_floating_point() or first.is_complex()
        same = torch.isclose(first, tensor, rtol=1e-3, atol=1e-6, equal_nan=True) if rounded else first == tensor
        unlike.append(~same.all())
    flags = torch.stack(unlike).to(torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [name for name, flag in zip(named, flags.tolist(), strict=True) if flag]


def _differs(what: str, got: str | None) -> ConfigError:
    error = ConfigError(f"{what} differs between ranks, and a checkpoint has one for all of them", got=got,
                        expected="the same on all ranks, or a buffer that is declared each rank's own",
                        fix="distkit.register_rank_buffer in place of register_buffer")  # fmt: skip
    error.on_all_ranks = True
    return error


def _digest(state: object) -> str:
    if isinstance(state, Tensor):
        return state_digest({"": state})
    return json.dumps(state, sort_keys=True, default=repr)
