"""What the functions of a recipe return, looked at once: a mistake is named by its function before anything starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

from torch import Tensor, nn
from torch.utils.data import DataLoader

from distkit.errors import ConfigError, DataError, shorten
from distkit.optim import ParamGroup, named_parameters
from distkit.schedules import Schedule


def check_model(model: object) -> nn.Module:
    """What build_model returned.

    Raises:
        ConfigError: it is no module, or has nothing to train.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError("build_model returned no module", expected="one torch.nn.Module", got=_kind(model),
                          fix="return model")  # fmt: skip
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("the model has no parameter to train", expected="at least one with requires_grad")
    return model


def check_dataset(dataset: object, split: str) -> None:
    """What build_dataset returned, as far as `as_dataset` would mistake it for a data set.

    Raises:
        DataError: it is a loader, a tuple or a string.
    """
    what = f"build_dataset returned {_kind(dataset)} for the split {split}"
    expected = "one data set: __len__ and fetch(indices), or a torch data set with __len__ and __getitem__"
    if isinstance(dataset, DataLoader):
        raise DataError(what, expected=expected, fix="return loader.dataset: distkit reads, shuffles and batches")
    if isinstance(dataset, tuple):
        raise DataError(what, expected=expected, got=f"a tuple of {len(dataset)}",
                        fix="return torch.utils.data.TensorDataset(inputs, labels)")  # fmt: skip
    if isinstance(dataset, str | bytes):
        raise DataError(what, expected=expected, got=repr(dataset)[:60])


def check_schedule(schedule: object) -> Schedule:
    """What build_schedule returned.

    Raises:
        ConfigError: it is no function of the step, or gives no number.
    """
    expected = "a function step -> multiplier of the peak learning rate"
    if not callable(schedule):
        raise ConfigError("build_schedule returned no schedule", expected=expected, got=_kind(schedule),
                          fix="return lambda step: 1 - step / num_steps")  # fmt: skip
    first = cast(Callable[[int], object], schedule)(0)
    if isinstance(first, bool) or not isinstance(first, int | float) or not math.isfinite(first):
        raise ConfigError("the schedule of build_schedule gives no number for step 0", expected=expected,
                          got=repr(first)[:60])  # fmt: skip
    return cast(Schedule, schedule)


def check_groups(groups: object, model: nn.Module) -> list[ParamGroup]:
    """What build_param_groups returned, the parameters of each group as a list.

    Raises:
        ConfigError: no list of groups, a parameter that is not in the model, or one that is in two groups.
    """
    expected = '[{"params": [...], "lr": ...}, ...], with parameters of the model'
    if not isinstance(groups, list | tuple) or not all(
        isinstance(group, dict) and "params" in group for group in groups
    ):
        inner = f" of {_kind(groups[0])}" if isinstance(groups, list | tuple) and groups else ""
        raise ConfigError("build_param_groups returned no parameter groups", expected=expected,
                          got=_kind(groups) + inner, fix='return [{"params": list(model.parameters())}]')  # fmt: skip
    checked = [{**group, "params": _listed(group["params"])} for group in groups]
    names, seen = {id(parameter): name for name, parameter in named_parameters(model).items()}, set()
    for number, group in enumerate(checked):
        for parameter in group["params"]:
            if id(parameter) not in names:
                got = list(parameter.shape) if isinstance(parameter, Tensor) else _kind(parameter)
                raise ConfigError(f"group {number} of build_param_groups has a parameter that is not in the model",
                                  expected=expected, got=got)  # fmt: skip
            if id(parameter) in seen:
                raise ConfigError(
                    f"build_param_groups has {names[id(parameter)]} twice", expected="each parameter once"
                )
            seen.add(id(parameter))
    return checked


def left_out(groups: list[ParamGroup], model: nn.Module) -> str:
    """The parameters that are trained by no group, as a note; "" where there is none."""
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    names = [name for name, p in named_parameters(model).items() if p.requires_grad and id(p) not in grouped]
    if not names:
        return ""
    return f"build_param_groups leaves out {len(names)} parameters, which will not move: {shorten(names)}"


def _listed(parameters: object) -> list[object]:
    if isinstance(parameters, Tensor):
        return [parameters]
    return list(parameters) if isinstance(parameters, Iterable) else [parameters]


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
