"""What an optimizer has learned, as tensors by name and a JSON description of the rest (C3).

Names are canonical parameter names, so that groups may be ordered and models wrapped as they like. A tensor is called
`PARAMETER/KEY` (`PARAMETER/KEY/INDEX` in lists, `PARAMETER/KEY/indices` and `/values` where it is sparse). Nothing ever
takes such a name apart: parameter names may hold a "/" themselves.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distkit.errors import ConfigError
from distkit.optim.groups import ParamGroup, named_parameters

#: The JSON form of one value in optimizer.state: {"tensor": true}, {"sparse": {"shape": [...], "coalesced": bool}},
#: {"number": x}, {"list": [spec, ...]} or {"none": true}.
Spec = Mapping[str, object]
#: Before the hexadecimal bytes of a float that JSON has no number for.
_FLOAT = "float64:"


def named_optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Every value in optimizer.state as `PARAMETER/KEY` (`PARAMETER/KEY/INDEX` in lists) -> tensor, not copied.

    Names are canonical, so they do not depend on the order of groups or on wrappers. Python numbers become 0-dim
    float64 or int64 tensors on the CPU; None is left out.

    Raises:
        ConfigError: the optimizer updates a parameter that is not in the model.
    """
    names = canonical_names(model)
    flat: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        _flatten(name_of(parameter, names), state, flat)
    return flat


def _flatten(path: str, value: object, flat: dict[str, Tensor]) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(f"{path}/{key}", inner, flat)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _flatten(f"{path}/{index}", inner, flat)
    elif isinstance(value, Tensor):
        flat.update(_tensors_in(path, value))
    elif isinstance(value, float | int):
        flat[path] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    elif value is not None:
        raise _no_form(path, value)


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The tensors in optimizer.state by name, not copied; Python numbers are in `optimizer_structure`.

    Raises:
        ConfigError: the optimizer updates a parameter that is not in the model.
    """
    names = canonical_names(model)
    return {
        path: tensor
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        for path, tensor in _tensors_in(f"{name_of(parameter, names)}/{key}", value)
    }


def _tensors_in(path: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _tensors_in(f"{path}/{index}", inner)
    elif isinstance(value, Tensor) and value.layout is torch.sparse_coo:
        # the parts as they lie there, also uncoalesced: coalescing would change the order of later sums
        yield from ((f"{path}/indices", value._indices()), (f"{path}/values", value._values()))
    elif isinstance(value, Tensor):
        yield path, value


def optimizer_structure(optimizer: Optimizer, model: nn.Module) -> dict[str, object]:
    """The form of an optimizer's state, and every number in it; strict JSON.

    Returns:
        {"class": name, "groups": [{"param_names": [...], hyperparameters...}], "state": {PARAMETER: {KEY: spec}}}.
        A spec is {"tensor": true}, {"sparse": {"shape": [...], "coalesced": bool}}, {"number": x}, {"list": [spec...]}
        or {"none": true}. Finite floats are JSON numbers, which Python writes and reads to the bit; others are strings
        of their bytes. Hyperparameters are those that JSON has a form for; they are for people to read.

    Raises:
        ConfigError: the optimizer updates a parameter that is not in the model.
        TypeError: a state is neither tensor, number, list nor None.
    """
    names = canonical_names(model)
    state = {}
    for parameter, values in optimizer.state.items():
        name = name_of(parameter, names)
        state[name] = {str(key): _describe(f"{name}/{key}", value) for key, value in values.items()}
    groups = [_describe_group(group, names) for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


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


def _describe_group(group: ParamGroup, names: Mapping[Tensor, str]) -> dict[str, object]:
    described: dict[str, object] = {"param_names": [name_of(parameter, names) for parameter in group["params"]]}
    for key, value in group.items():
        parts = value if isinstance(value, list | tuple) else (value,)
        if key in ("params", "param_names") or not all(isinstance(x, str | float | int | None) for x in parts):
            continue
        plain = [encode_number(x) if isinstance(x, float | int) else x for x in parts]
        described[key] = plain if isinstance(value, list | tuple) else plain[0]
    return described


def tensor_names(path: str, spec: Spec) -> Iterator[str]:
    """Names of the tensors that the value at `path` is made of."""
    if "list" in spec:
        for index, inner in enumerate(cast(Sequence[Spec], spec["list"])):
            yield from tensor_names(f"{path}/{index}", inner)
    elif "sparse" in spec:
        yield from (f"{path}/indices", f"{path}/values")
    elif "tensor" in spec:
        yield path


def rebuild(path: str, spec: Spec, tensors: Mapping[str, Tensor]) -> object:
    """The value at `path` as it was described, out of `tensors`, which are not copied.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a spec of another form.
    """
    if "list" in spec:
        parts = enumerate(cast(Sequence[Spec], spec["list"]))
        return [rebuild(f"{path}/{index}", inner, tensors) for index, inner in parts]
    if "sparse" in spec:
        form = cast(Mapping[str, object], spec["sparse"])
        return torch.sparse_coo_tensor(
            tensors[f"{path}/indices"], tensors[f"{path}/values"], cast(list[int], form["shape"]),
            is_coalesced=cast(bool, form["coalesced"]), check_invariants=False,
        )  # fmt: skip
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


def canonical_names(model: nn.Module) -> dict[Tensor, str]:
    """Parameter -> its canonical name."""
    return {parameter: name for name, parameter in named_parameters(model).items()}


def name_of(parameter: Tensor, names: Mapping[Tensor, str]) -> str:
    """The canonical name of a parameter that an optimizer updates.

    Raises:
        ConfigError: it is not in the model.
    """
    if parameter not in names:
        raise ConfigError(f"the optimizer updates a parameter of shape {list(parameter.shape)} that the model does "
                          "not have", fix="register it in build_model's module")  # fmt: skip
    return names[parameter]


def _no_form(path: str, value: object) -> TypeError:
    return TypeError(f"optimizer state {path} is a {type(value).__name__}, which has no tensor form")
