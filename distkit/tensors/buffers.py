"""What a module holds besides its parameters: buffers, which a layer may replace at any time, and extra states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from distkit.errors import CheckpointError
from distkit.tensors.finite import is_finite
from distkit.tensors.spec import TensorSpec, spec_of, spec_text

#: The attribute in which a module keeps the names of its buffers that are each rank's own.
_RANK_BUFFERS = "_distkit_rank_buffers"


@dataclass(frozen=True)
class BufferSlot:
    """Where a module keeps one buffer.

    Attributes:
        name: canonical, as in named_buffers.
        owner, key: the module, and its own name for the buffer.
    """

    name: str
    owner: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that is there now; None before the layer has made one."""
        return self.owner._buffers[self.key]

    @property
    def rank_own(self) -> bool:
        """Each rank has its own values, which no other rank sees (`register_rank_buffer`)."""
        return self.key in getattr(self.owner, _RANK_BUFFERS, ())

    @property
    def statistic(self) -> bool:
        """Of the batches that a BatchNorm, or a layer like it, has seen: ranks differ, and rank 0's count."""
        return self.key in ("running_mean", "running_var", "num_batches_tracked") and not self.rank_own

    @property
    def persistent(self) -> bool:
        """False for a cache: the layer computes it itself, its shape may change, and no state dict has it."""
        return self.key not in self.owner._non_persistent_buffers_set


def buffer_slots(model: nn.Module) -> Iterator[BufferSlot]:
    """Every slot of `model`, including those without a tensor."""
    for prefix, owner in model.named_modules():
        for key in owner._buffers:
            yield BufferSlot(f"{prefix}.{key}" if prefix else key, owner, key)


def register_rank_buffer(module: nn.Module, name: str, tensor: Tensor | None, *, persistent: bool = True) -> None:
    """torch.nn.Module.register_buffer for what each rank has on its own: a hidden state, a queue, a memory bank.

    No strategy sends it to other ranks, its shape may change, and every rank saves and restores its own. A run that
    continues on another number of ranks begins with what build_model gives.

    Args:
        module: the owner.
        name: of the buffer.
        tensor: its first value, any shape and dtype; None: the layer makes it later.
        persistent: whether `module.state_dict()` has it.
    """
    module.register_buffer(name, tensor, persistent=persistent)
    names: set[str] = module.__dict__.setdefault(_RANK_BUFFERS, set())
    names.add(name)


def shared_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of which all ranks together have one, by name."""
    slots = {slot.name: slot for slot in buffer_slots(module)}
    return {name: tensor for name, tensor in module.named_buffers() if not slots[name].rank_own}


def rank_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are this rank's own, by name."""
    tensors = {slot.name: slot.tensor for slot in buffer_slots(module) if slot.rank_own}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@torch.no_grad()
def set_rank_buffers_(module: nn.Module, tensors: Mapping[str, Tensor | None], device: torch.device) -> None:
    """Make `tensors` this rank's own buffers of these names; None: as before its layer made one."""
    for slot in buffer_slots(module):
        if slot.rank_own and slot.name in tensors:
            tensor, saved = slot.tensor, tensors[slot.name]
            if tensor is not None and saved is not None and spec_of(tensor) == spec_of(saved):
                tensor.copy_(saved)
            else:
                slot.owner._buffers[slot.key] = None if saved is None else saved.to(device)


class BufferCopies:
    """Copies of all buffers of `module`, to undo on the device what a forward has done to them."""

    def __init__(self, module: nn.Module) -> None:
        self._slots = list(buffer_slots(module))
        self._copies: list[tuple[BufferSlot, Tensor | None]] = []

    @torch.no_grad()
    def take(self) -> None:
        """Copy what is there now."""
        tensors = [(slot, slot.tensor) for slot in self._slots]
        self._copies = [(slot, None if tensor is None else tensor.clone()) for slot, tensor in tensors]

    @torch.no_grad()
    def put_back_(self, when: Tensor) -> None:
        """Where `when` (bool, 0-dim), every buffer has its old values again; nothing waits for it, with one exception.

        Of one that a layer has made or given another shape in between: if it is a rank's own, the host reads `when`;
        else it stays, because it is a cache.
        """
        for slot, copy in self._copies:
            tensor = slot.tensor
            if tensor is not None and copy is not None and spec_of(tensor) == spec_of(copy):
                tensor.copy_(torch.where(when, copy, tensor))
            elif slot.rank_own and tensor is not copy and when:
                slot.owner._buffers[slot.key] = copy
        self._copies = []


def buffer_specs(module: nn.Module) -> dict[str, TensorSpec]:
    """Dtype and shape of each shared buffer that a state dict has, too."""
    tensors = {slot.name: slot.tensor for slot in buffer_slots(module) if slot.persistent and not slot.rank_own}
    return {name: spec_of(tensor) for name, tensor in tensors.items() if tensor is not None}


def nan_buffers(module: nn.Module) -> frozenset[str]:
    """Names of the buffers that hold NaN: on purpose, where the model was just built."""
    tensors = {slot.name: slot.tensor for slot in buffer_slots(module)}
    dense = {name: tensor for name, tensor in tensors.items() if tensor is not None and not tensor.is_sparse}
    return frozenset(name for name, tensor in dense.items() if not is_finite(tensor, infinity=True))


def check_buffer_specs(module: nn.Module, at_start: Mapping[str, TensorSpec], step: int) -> None:
    """Refuse to continue when a buffer's dtype or shape has changed: no save from here on could be resumed from.

    Args:
        module: the model.
        at_start: its `buffer_specs` before the first step.
        step: finished steps, for the message.

    Raises:
        CheckpointError: naming the buffer; on all ranks alike, because every rank has the same model.
    """
    now = buffer_specs(module)
    if now == at_start:
        return
    name = next(name for name in (*now, *at_start) if now.get(name) != at_start.get(name))
    here, before = (spec_text(specs[name]) if name in specs else "missing" for specs in (now, at_start))
    error = CheckpointError(
        f"buffer {name} is {here} at step {step} and was {before} at the start: a checkpoint of it could not be "
        "resumed; give it its final shape in build_model, or register it with persistent=False if the layer can "
        "recompute it"
    )
    error.on_all_ranks = True
    raise error


def extra_states(module: nn.Module) -> dict[str, object]:
    """What modules keep besides parameters and buffers, by module (torch.nn.Module.get_extra_state)."""
    return {name: owner.get_extra_state() for name, owner in _with_extra_state(module).items()}


def set_extra_states(module: nn.Module, states: Mapping[str, object]) -> None:
    """Restore the extra states of the modules that `states` names."""
    for name, owner in _with_extra_state(module).items():
        if name in states:
            owner.set_extra_state(cast(Tensor, states[name]))  # torch types it so, and documents any value


def split_extra(states: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Extra states that are tensors, as `extra/MODULE`, and the others, by module."""
    tensors = {f"extra/{name}": state for name, state in states.items() if isinstance(state, Tensor)}
    return tensors, {name: state for name, state in states.items() if not isinstance(state, Tensor)}


def _with_extra_state(module: nn.Module) -> dict[str, nn.Module]:
    default = nn.Module.get_extra_state
    return {name: owner for name, owner in module.named_modules() if type(owner).get_extra_state is not default}
