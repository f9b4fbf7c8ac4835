"""An optimizer's state as tensors by name and a JSON description of the rest, and back (C3).

Names are canonical parameter names, so the order of groups and the wrapping of the model do not matter. A tensor is
called `PARAMETER/KEY` (`PARAMETER/KEY/INDEX` in lists, `PARAMETER/KEY/indices` and `/values` where it is sparse).
Nothing splits such a name again: parameter names may contain a "/" themselves.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from distkit.config.optim import OptimConfig
from distkit.errors import CheckpointError, ConfigError
from distkit.optim.build import fill_momentum_
from distkit.optim.groups import ParamGroup

#: The JSON form of one value in optimizer.state: {"tensor": true}, {"sparse": {"shape": [...], "coalesced": bool}},
#: {"number": x}, {"list": [spec, ...]} or {"none": true}.
Spec = Mapping[str, object]
#: Before the hexadecimal bytes of a float that JSON has no number for.
_FLOAT = "float64:"
#: Names in a message before it says "and N more".
LISTED = 5


class OptimizerState:
    """The state of `optimizer`, read and restored under the names of `parameters`.

    A restore compares, allocates, has the tensors filled, and installs; only `install` changes the optimizer.

    Args:
        optimizer: may have any state, also none.
        parameters: the model's parameters by canonical name, tied ones once (distkit.optim.named_parameters).
        facts: the class of the configuration that `optimizer` was built from.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, Tensor], facts: type[OptimConfig]) -> None:
        self.optimizer, self.parameters, self.facts = optimizer, parameters, facts
        self._names = {parameter: name for name, parameter in parameters.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors in optimizer.state by name, not copied; numbers are in `structure`.

        Raises:
            ConfigError: the optimizer updates a parameter that is not in the model.
            TypeError: a state is neither tensor, number, list nor None.
        """
        return {path: value for path, value in self._values() if isinstance(value, Tensor)}

    def all_values(self) -> dict[str, Tensor]:
        """As `tensors`, with Python numbers as 0-dim float64 or int64 tensors on the CPU: what a digest covers."""
        return {path: value if isinstance(value, Tensor) else _as_tensor(value) for path, value in self._values()}

    def _values(self) -> Iterator[tuple[str, Tensor | float | int]]:
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                yield from _leaves(f"{self._name(parameter)}/{key}", value)

    def _name(self, parameter: Tensor) -> str:
        if parameter not in self._names:
            raise ConfigError(f"the optimizer updates a parameter of shape {list(parameter.shape)} that the model does "
                              "not have", fix="register it in build_model's module")  # fmt: skip
        return self._names[parameter]

    def structure(self) -> dict[str, object]:
        """The form of the state, and every number in it; strict JSON.

        Returns:
            {"class": name, "groups": [{"param_names": [...], hyperparameters...}], "state": {PARAMETER: {KEY: spec}}}.
            Finite floats are JSON numbers, which Python writes and reads to the bit; others are strings of their
            bytes. Hyperparameters are those that JSON has a form for; they are for people to read.

        Raises:
            ConfigError: the optimizer updates a parameter that is not in the model.
            TypeError: a state is neither tensor, number, list nor None.
        """
        state = {}
        for parameter, values in self.optimizer.state.items():
            name = self._name(parameter)
            state[name] = {str(key): _describe(f"{name}/{key}", value) for key, value in values.items()}
        groups = [self._describe_group(group) for group in self.optimizer.param_groups]
        return {"class": type(self.optimizer).__name__, "groups": groups, "state": state}

    def _describe_group(self, group: ParamGroup) -> dict[str, object]:
        described: dict[str, object] = {"param_names": [self._name(parameter) for parameter in group["params"]]}
        for key, value in group.items():
            parts = value if isinstance(value, list | tuple) else (value,)
            if key in ("params", "param_names") or not all(isinstance(x, str | float | int | None) for x in parts):
                continue
            plain = [encode_number(x) if isinstance(x, float | int) else x for x in parts]
            described[key] = plain if isinstance(value, list | tuple) else plain[0]
        return described

    def compare(self, structure: Mapping[str, object]) -> list[str]:
        """Why a saved state does not fit, in lines; [] if it does.

        Compared are the class, the names of the updated parameters, and the hyperparameters that decide which state
        there is (amsgrad). Learning rates and the like may change between runs.

        Args:
            structure: from `structure`.

        Raises:
            ConfigError: the optimizer updates a parameter that is not in the model.
        """
        if not {"class", "groups", "state"} <= structure.keys():
            return ["optimizer: the checkpoint has no state of one"]
        kind = type(self.optimizer).__name__
        if structure["class"] != kind:
            return [f"optimizer: {structure['class']} in the checkpoint, {kind} here"]
        here = {self._name(p): group for group in self.optimizer.param_groups for p in group["params"]}
        groups = cast(Sequence[Mapping[str, object]], structure["groups"])
        saved = {name: group for group in groups for name in cast(Sequence[str], group["param_names"])}
        lines = []
        if missing := here.keys() - saved.keys():
            lines.append(f"optimizer: not updated in the checkpoint, but here: {_few(missing)}")
        if unexpected := saved.keys() - here.keys():
            lines.append(f"optimizer: updated in the checkpoint, but not here: {_few(unexpected)}")
        if self.facts.flattens_parameters and not lines and list(saved) != list(here):
            lines.append(
                f"optimizer: {kind} keeps all parameters in one vector, in another order in the checkpoint than here"
            )
        for key in self.facts.state_depends_on:
            changed = [name for name in here.keys() & saved.keys() if _form(saved[name], key) != _form(here[name], key)]
            if changed:
                before, now = (_form(groups[min(changed)], key) for groups in (saved, here))
                lines.append(f"optimizer: {key} {before} in the checkpoint, {now} here: {_few(changed)}")
        return lines

    @torch.no_grad()
    def allocate(
        self, structure: Mapping[str, object], forms: Mapping[str, tuple[torch.dtype, Sequence[int]]]
    ) -> dict[str, Tensor]:
        """Uninitialised tensors for a saved state, laid out as torch's own would be; the optimizer is not changed.

        What has its parameter's shape takes its device, memory format and DTensor layout; other tensors are contiguous
        on the parameter's device, and scalars on the CPU unless the group is fused or capturable, or the optimizer
        keeps them on the device (`scalars_on_device`).

        Args:
            structure: from `structure`.
            forms: dtype and global shape of each saved tensor, under the names of `tensors`.

        Returns:
            The tensors to fill, under the same names.

        Raises:
            CheckpointError: structure, forms and model do not name the same things.
        """
        groups: dict[Tensor, ParamGroup] = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        owners: dict[str, tuple[Tensor, str]] = {}
        for name, state in _saved_state(structure).items():
            parameter = self.parameters.get(name)
            if parameter is None or parameter not in groups:
                raise CheckpointError(f"optimizer state of {name}, which is not updated here")
            for key, spec in state.items():
                owners |= dict.fromkeys(_tensor_names(f"{name}/{key}", spec), (parameter, key))
        if owners.keys() != forms.keys():
            raise CheckpointError(f"optimizer state and its tensors differ in: {_few(owners.keys() ^ forms.keys())}")
        return {
            path: self._empty(parameter, groups[parameter], key, forms[path][0], tuple(forms[path][1]))
            for path, (parameter, key) in owners.items()
        }

    def _empty(
        self, parameter: Tensor, group: ParamGroup, key: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Tensor:
        if key in self.facts.scalar_state:
            on_device = self.facts.scalars_on_device or group.get("fused") or group.get("capturable")
            return torch.empty(shape, dtype=dtype, device=parameter.device if on_device else "cpu")
        if shape == tuple(parameter.shape) and key not in self.facts.contiguous_state:
            return torch.empty_like(parameter, dtype=dtype)
        return parameter.new_empty(shape, dtype=dtype)

    def install(self, structure: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """Replace optimizer.state by the saved numbers and `tensors`, which are taken as they are, not copied.

        The state object stays, so optimizers that share one still do. Groups and their hyperparameters stay: torch
        keeps no state there, and the learning rate is a function of the step.

        Args:
            structure: from `structure`.
            tensors: what `allocate` gave, filled.

        Raises:
            KeyError: a parameter or tensor is missing; nothing is changed then.
            ValueError: a value has an unknown form; nothing is changed then.
        """
        state: dict[Tensor, dict[str, object]] = {
            self.parameters[name]: {key: _rebuild(f"{name}/{key}", spec, tensors) for key, spec in saved.items()}
            for name, saved in _saved_state(structure).items()
        }
        self.optimizer.state.clear()
        self.optimizer.state.update(state)
        # where SGD was not fused when it was saved, and some parameters had not had a gradient yet
        fill_momentum_(self.optimizer)


def _as_tensor(number: float | int) -> Tensor:
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64)


def _leaves(path: str, value: object) -> Iterator[tuple[str, Tensor | float | int]]:
    """The tensors and numbers in one value of optimizer.state, by name."""
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(f"{path}/{index}", inner)
    elif isinstance(value, Tensor) and value.layout is torch.sparse_coo:
        # both parts as they are, also uncoalesced: coalescing would change the order of later sums
        yield from ((f"{path}/indices", value._indices()), (f"{path}/values", value._values()))
    elif isinstance(value, Tensor | float | int):
        yield path, value
    elif value is not None:
        raise _no_form(path, value)


def _describe(path: str, value: object) -> Spec:
    if isinstance(value, Tensor):
        if value.layout is torch.sparse_coo:
            return {"sparse": {"shape": list(value.shape), "coalesced": value.is_coalesced()}}
        return {"tensor": True}
    if isinstance(value, list):
        return {"list": [_describe(f"{path}/{index}", inner) for index, inner in enumerate(value)]}
    if isinstance(value, float | int):
        return {"number": encode_number(value)}
    if value is None:
        return {"none": True}
    raise _no_form(path, value)


def _no_form(path: str, value: object) -> TypeError:
    return TypeError(f"optimizer state {path} is a {type(value).__name__}, which has no tensor form")


def _tensor_names(path: str, spec: Spec) -> Iterator[str]:
    """Names of the tensors that the value at `path` is made of."""
    if "list" in spec:
        for index, inner in enumerate(cast(Sequence[Spec], spec["list"])):
            yield from _tensor_names(f"{path}/{index}", inner)
    elif "sparse" in spec:
        yield from (f"{path}/indices", f"{path}/values")
    elif "tensor" in spec:
        yield path


def _rebuild(path: str, spec: Spec, tensors: Mapping[str, Tensor]) -> object:
    """The value at `path` as it was described, out of `tensors`."""
    if "list" in spec:
        parts = enumerate(cast(Sequence[Spec], spec["list"]))
        return [_rebuild(f"{path}/{index}", inner, tensors) for index, inner in parts]
    if "sparse" in spec:
        form = cast(Mapping[str, object], spec["sparse"])
        return torch.sparse_coo_tensor(
            tensors[f"{path}/indices"],
            tensors[f"{path}/values"],
            cast(list[int], form["shape"]),
            is_coalesced=cast(bool, form["coalesced"]),
            check_invariants=False,
        )
    if "tensor" in spec:
        return tensors[path]
    if "number" in spec:
        return decode_number(cast(float | int | str, spec["number"]))
    if "none" in spec:
        return None
    raise ValueError(f"optimizer state {path} has a form that is not known here: {sorted(spec)}")


def encode_number(value: float | int) -> float | int | str:
    """`value` for strict JSON: what is not finite becomes a string that keeps all its bits (a NaN has a sign too)."""
    if isinstance(value, float) and not math.isfinite(value):
        return _FLOAT + struct.pack(">d", value).hex()
    return value


def decode_number(value: float | int | str) -> float | int:
    """The number that `encode_number` was given."""
    if isinstance(value, str):
        number: float = struct.unpack(">d", bytes.fromhex(value.removeprefix(_FLOAT)))[0]
        return number
    return value


def _form(group: Mapping[str, object], key: str) -> object:
    return bool(group.get(key)) if key == "momentum" else group.get(key)


def _saved_state(structure: Mapping[str, object]) -> Mapping[str, Mapping[str, Spec]]:
    return cast(Mapping[str, Mapping[str, Spec]], structure["state"])


def _few(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:LISTED]) + (f" and {len(ordered) - LISTED} more" if len(ordered) > LISTED else "")
