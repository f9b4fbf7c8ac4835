"""What a checkpoint must hold and a resume must take back, beyond parameters: buffers that change, extra states.

Buffers are part of the state, also those with persistent=False, which a layer may make or enlarge when it is used. Such
a cache is restored where it has the form of a new one, and left to the layer where it has not. Other buffers keep their
form from the first step to the last, or no resume could take them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from distkit.checkpoint.plan import check_storable, dtype_name
from distkit.errors import CheckpointError, ConfigError
from distkit.tensors.buffers import buffer_slots

Form = tuple[str, tuple[int, ...]]


def check_keepable(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what no checkpoint could hold before the first step, not at the first save.

    Args:
        module: the model.
        tensors: of the run, by name.

    Raises:
        ConfigError: naming the tensor or module.
    """
    extra, values = split_extra(extra_states(module))
    try:
        check_storable({**tensors, **extra})
    except CheckpointError as error:
        raise ConfigError(str(error), expected="tensors that safetensors can hold and a resume can write to",
                          fix="another dtype, .contiguous(), or --no-checkpoint.enabled") from error  # fmt: skip
    for name, state in values.items():
        if not _is_json(state):
            raise ConfigError(f"get_extra_state of {name or 'the model'} gives what a checkpoint cannot hold",
                              expected="a tensor, or what JSON gives back as it is",
                              got=type(state).__name__, fix="--no-checkpoint.enabled")  # fmt: skip


def _is_json(value: object) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def form_of(tensor: Tensor) -> Form:
    """Its dtype and shape, as a manifest has them."""
    return dtype_name(tensor), tuple(tensor.shape)


def kept_forms(module: nn.Module) -> dict[str, Form]:
    """Names and forms of the buffers that a state dict has, too."""
    found = {slot.name: slot.tensor for slot in buffer_slots(module) if slot.persistent}
    return {name: form_of(tensor) for name, tensor in found.items() if tensor is not None}


def check_forms(module: nn.Module, before: Mapping[str, Form], step: int) -> None:
    """Refuse to go on when a buffer has another form than at the start: every save would be for nothing.

    Raises:
        CheckpointError: naming the buffer; on all ranks alike, because every rank has the same model.
    """
    now = kept_forms(module)
    if now == before:
        return
    name = next(name for name in (*now, *before) if now.get(name) != before.get(name))
    error = CheckpointError(
        f"buffer {name} is {_words(now.get(name))} at step {step} and was {_words(before.get(name))} at the start: no "
        "resume could take it; give it its last form in build_model, or register it with persistent=False if the layer "
        "makes it anew"
    )
    error.on_all_ranks = True
    raise error


def _words(form: Form | None) -> str:
    return f"{form[0]} {list(form[1])}" if form else "not there"


def caches_of_another_form(module: nn.Module, live: Mapping[str, Form], saved: Mapping[str, Form]) -> set[str]:
    """Names of buffers with persistent=False that are not here as they were saved; the layer makes them anew.

    Args:
        module: the model.
        live, saved: forms of the tensors of this run and of a checkpoint, by names such as `model/rope.cache`.
    """
    caches = [slot.name for slot in buffer_slots(module) if not slot.persistent]
    names = [f"{part}/{name}" for name in caches for part in ("model", "ema")]
    return {name for name in names if live.get(name) != saved.get(name)}


def extra_states(module: nn.Module) -> dict[str, object]:
    """What modules keep beside parameters and buffers, by module (torch.nn.Module.get_extra_state)."""
    return {name: owner.get_extra_state() for name, owner in _with_extra_state(module).items()}


def _with_extra_state(module: nn.Module) -> dict[str, nn.Module]:
    plain = nn.Module.get_extra_state
    return {name: owner for name, owner in module.named_modules() if type(owner).get_extra_state is not plain}


def set_extra_states(module: nn.Module, states: Mapping[str, object]) -> None:
    """Give them back, as far as there are any."""
    for name, owner in _with_extra_state(module).items():
        if name in states:
            owner.set_extra_state(cast(Tensor, states[name]))  # torch types it so, and documents any value


def split_extra(states: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Extra states that are tensors, as `extra/MODULE`, and the others, by module."""
    tensors = {f"extra/{name}": state for name, state in states.items() if isinstance(state, Tensor)}
    return tensors, {name: state for name, state in states.items() if not isinstance(state, Tensor)}
