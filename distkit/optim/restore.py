"""An optimizer's saved state, put into one that was built anew: nothing of it changes before everything is at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Optimizer

from distkit.errors import CheckpointError
from distkit.optim.build import fill_momentum_
from distkit.optim.groups import ParamGroup, named_parameters
from distkit.optim.state import Spec, canonical_names, name_of, rebuild, tensor_names

#: Names in a message before it says "and N more".
LISTED = 5
#: State of one number a parameter: plain tensors, also beside DTensors.
_SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
#: Adafactor's factors lie contiguously, whatever their parameter's memory format.
_FACTORS = frozenset({"row_var", "col_var"})
#: Class -> the hyperparameters that decide which state there is. Of momentum only whether there is any.
_FORMING = {
    "SGD": ("momentum", "kind"),
    "RMSprop": ("momentum", "centered"),
    "Adam": ("amsgrad",),
    "AdamW": ("amsgrad",),
    "MuonWithAdamW": ("kind",),
    "LBFGS": ("history_size",),
}


@torch.no_grad()
def allocate_optimizer_state(
    optimizer: Optimizer,
    model: nn.Module,
    structure: Mapping[str, object],
    shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]],
) -> dict[str, Tensor]:
    """Uninitialised tensors for a saved state, laid out as torch's own would be; the optimizer is not changed.

    What has its parameter's shape takes its device, memory format and DTensor layout; other tensors are contiguous on
    the parameter's device, and step counters on the CPU unless the group is fused or capturable, or ASGD's.

    Args:
        optimizer: built over `model`.
        model: with the saved parameter names.
        structure: from `optimizer_structure`.
        shapes: dtype and global shape of each saved tensor, under the names of `optimizer_tensors`.

    Returns:
        The tensors to fill, under the same names.

    Raises:
        CheckpointError: structure, shapes and model do not name the same things.
    """
    parameters = named_parameters(model)
    groups: dict[Tensor, ParamGroup] = {p: group for group in optimizer.param_groups for p in group["params"]}
    places: dict[str, tuple[Tensor, str]] = {}
    for name, state in _state_of(structure).items():
        if name not in parameters or parameters[name] not in groups:
            raise CheckpointError(f"optimizer state of {name}, which is not updated here")
        for key, spec in state.items():
            places |= dict.fromkeys(tensor_names(f"{name}/{key}", spec), (parameters[name], key))
    if places.keys() != shapes.keys():
        raise CheckpointError(f"optimizer state and its tensors differ in: {_few(places.keys() ^ shapes.keys())}")
    on_device = isinstance(optimizer, ASGD)
    return {
        path: _allocate(parameter, groups[parameter], key, shapes[path][0], tuple(shapes[path][1]), on_device)
        for path, (parameter, key) in places.items()
    }


def _allocate(
    parameter: Tensor, group: ParamGroup, key: str, dtype: torch.dtype, shape: tuple[int, ...], on_device: bool
) -> Tensor:
    if key in _SCALARS:
        on_device = on_device or bool(group.get("fused") or group.get("capturable"))
        return torch.empty(shape, dtype=dtype, device=parameter.device if on_device else "cpu")
    if shape == tuple(parameter.shape) and key not in _FACTORS:
        return torch.empty_like(parameter, dtype=dtype)
    return parameter.new_empty(shape, dtype=dtype)


def install_optimizer_state(
    optimizer: Optimizer, model: nn.Module, structure: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> None:
    """Replace optimizer.state by the saved numbers and `tensors`, which are taken as they are, not copied.

    The state object stays, so optimizers that share one still do. Groups and their hyperparameters stay: torch keeps
    no state there, and the learning rate is a function of the step.

    Args:
        optimizer: built over `model`.
        model: with the saved parameter names.
        structure: from `optimizer_structure`.
        tensors: by the names of `optimizer_tensors`, as `allocate_optimizer_state` made them.

    Raises:
        KeyError: a parameter or tensor is missing; nothing is changed then.
        ValueError: a value has a form that is not known; nothing is changed then.
    """
    parameters = named_parameters(model)
    state: dict[Tensor, dict[str, object]] = {
        parameters[name]: {key: rebuild(f"{name}/{key}", spec, tensors) for key, spec in saved.items()}
        for name, saved in _state_of(structure).items()
    }
    optimizer.state.clear()
    optimizer.state.update(state)
    if isinstance(optimizer, SGD) and any(group.get("fused") for group in optimizer.param_groups):
        # it was saved where SGD was not fused, and not every parameter had had a gradient
        fill_momentum_(optimizer)


def compare_optimizers(structure: Mapping[str, object], optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Why a saved state does not fit `optimizer`, in lines; [] if it does.

    Compared are the class, the names of the updated parameters, and the hyperparameters that decide which state there
    is (amsgrad). Learning rates and the like may change between runs.

    Args:
        structure: from `optimizer_structure`.
        optimizer: built over `model`, not changed.
        model: of this run.

    Raises:
        ConfigError: the optimizer updates a parameter that is not in the model.
    """
    if not {"class", "groups", "state"} <= structure.keys():
        return ["optimizer: the checkpoint has no state of one"]
    kind = type(optimizer).__name__
    if structure["class"] != kind:
        return [f"optimizer: {structure['class']} in the checkpoint, {kind} here"]
    names = canonical_names(model)
    here = {name_of(p, names): group for group in optimizer.param_groups for p in group["params"]}
    groups = cast(Sequence[Mapping[str, object]], structure["groups"])
    saved = {name: group for group in groups for name in cast(Sequence[str], group["param_names"])}
    lines = []
    if missing := here.keys() - saved.keys():
        lines.append(f"optimizer: not updated in the checkpoint, but here: {_few(missing)}")
    if unexpected := saved.keys() - here.keys():
        lines.append(f"optimizer: updated in the checkpoint, but not here: {_few(unexpected)}")
    if kind == "LBFGS" and not lines and list(saved) != list(here):
        lines.append(
            "optimizer: LBFGS keeps all parameters in one vector, in another order in the checkpoint than here"
        )
    for key in _FORMING.get(kind, ()):
        changed = [name for name in here.keys() & saved.keys() if _form(saved[name], key) != _form(here[name], key)]
        if changed:
            first = min(changed)
            before, now = _form(saved[first], key), _form(here[first], key)
            lines.append(f"optimizer: {key} {before} in the checkpoint, {now} here: {_few(changed)}")
    return lines


def _form(group: Mapping[str, object], key: str) -> object:
    return bool(group.get(key)) if key == "momentum" else group.get(key)


def _state_of(structure: Mapping[str, object]) -> Mapping[str, Mapping[str, Spec]]:
    return cast(Mapping[str, Mapping[str, Spec]], structure["state"])


def _few(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:LISTED]) + (f" and {len(ordered) - LISTED} more" if len(ordered) > LISTED else "")
