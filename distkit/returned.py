"""What the functions of a recipe return, looked at once: a mistake is named by its function before anything starts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast

import numpy as np
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from distkit.config import TrainConfig
from distkit.errors import ConfigError, DataError, DistkitError, raised_inside, shorten
from distkit.losses import LossOutput
from distkit.optim import ParamGroup, named_parameters
from distkit.schedules import Schedule
from distkit.tensors.spec import is_expanded

C = TypeVar("C", bound=TrainConfig)


@contextmanager
def calling(function: str) -> Iterator[None]:
    """What the recipe's `function` raises by itself is its own, and says in which function it was."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, DistkitError):
            error.add_note(f"in {function} of the recipe")
        raise


def asked_for(function: Callable[..., object], **offered: object) -> dict[str, object]:
    """Those of `offered` that `function` has a parameter for, by name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # what is no function is refused when it is called
        return {}
    return {name: value for name, value in offered.items() if name in parameters}


def check_config(config: object, kind: type[C]) -> C:
    """What resolve_config returned.

    Raises:
        ConfigError: it is no configuration of the recipe.
    """
    if not isinstance(config, kind):
        raise ConfigError("resolve_config returned no configuration of the recipe", expected=f"a {kind.__name__}",
                          got=_kind(config), fix="return dataclasses.replace(config, …)")  # fmt: skip
    return config


def check_nothing(value: object) -> None:
    """What init_model_ returned.

    Raises:
        ConfigError: it is something, which would be ignored.
    """
    if value is not None:
        raise ConfigError("init_model_ returned something, which would be ignored", got=_kind(value),
                          expected="nothing: it changes the model that it is given")  # fmt: skip


def check_model(model: object) -> nn.Module:
    """What build_model returned.

    Raises:
        ConfigError: it is no module, or has nothing to train.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError("build_model returned no module", expected="one torch.nn.Module", got=_kind(model),
                          fix="return model")  # fmt: skip
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ConfigError(f"build_model returned a model whose {name} has no shape yet",
                              expected="a model that has been called once, or layers with all their sizes",
                              fix="model(torch.zeros(1, ...)) in build_model")  # fmt: skip
        if tensor.is_meta:
            raise ConfigError(f"build_model returned a model whose {name} is on the meta device, without values",
                              expected="a model on the CPU, with its initial weights",
                              fix="build_model without torch.device('meta')")  # fmt: skip
    for name, parameter in model.named_parameters():
        if is_expanded(parameter):
            raise ConfigError(f"build_model returned a model whose {name} is expanded: its elements share memory",
                              expected="a parameter with memory for each element",
                              fix="nn.Parameter(tensor.clone())")  # fmt: skip
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("the model of build_model has no parameter to train",
                          expected="at least one with requires_grad", got=_kind(model))  # fmt: skip
    return model


def add_loss_(model: nn.Module, loss: object) -> None:
    """Make what build_loss returned the model's `criterion`.

    Raises:
        ConfigError: it is no module, or the model has something of that name.
    """
    if not isinstance(loss, nn.Module):
        raise ConfigError("build_loss returned no module", expected="one torch.nn.Module", got=_kind(loss),
                          fix="return criterion")  # fmt: skip
    if hasattr(model, "criterion"):
        raise ConfigError("build_loss makes model.criterion, and the model has something of that name",
                          expected="one of the two", got=_kind(model.criterion))  # fmt: skip
    if isinstance(model, nn.Sequential):
        kind = type(model)
        model.__class__ = type(kind.__name__, (_LossApart, kind), {"__module__": kind.__module__})
    model.criterion = loss


class _LossApart:
    """For nn.Sequential, whose forward goes through all of its modules."""

    _modules: Mapping[str, nn.Module]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for name, module in self._modules.items() if name != "criterion"])

    def __len__(self) -> int:
        return len(self._modules) - 1


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
    if isinstance(dataset, Tensor | np.ndarray):
        raise DataError(what, expected=expected, got=f"shape {list(dataset.shape)}",
                        fix="return torch.utils.data.TensorDataset(values)")  # fmt: skip
    if isinstance(dataset, str | bytes | set | frozenset):
        raise DataError(what, expected=expected, got=repr(dataset)[:60])


def check_schedule(schedule: object, num_steps: int = 1) -> Schedule:
    """What build_schedule returned, asked for the first, a middle and the last of `num_steps`.

    Raises:
        ConfigError: it is no function of the step, or gives no number.
    """
    expected, fix = (
        "a function step -> multiplier of the peak learning rate",
        "return lambda step: 1 - step / num_steps",
    )
    if not callable(schedule) or isinstance(schedule, type | nn.Module):
        raise ConfigError("build_schedule returned no schedule", expected=expected, got=_kind(schedule), fix=fix)
    for step in sorted({0, num_steps // 2, num_steps - 1}):
        try:
            value = cast(Callable[[int], object], schedule)(step)
        except TypeError as error:
            if raised_inside(error):
                raise
            raise ConfigError("build_schedule returned a function that takes no step", expected=expected, got=error,
                              fix=fix) from error  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"the schedule of build_schedule gives no number >= 0 for step {step}", expected=expected,
                              got=repr(value)[:60])  # fmt: skip
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
        for key in ("lr", "weight_decay"):
            value = group.get(key, 0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"group {number} of build_param_groups has a {key} that is no number >= 0",
                                  expected=expected, got=repr(value)[:60])  # fmt: skip
    if not seen:
        raise ConfigError("build_param_groups returned groups without a parameter", expected=expected,
                          got=f"{len(checked)} groups")  # fmt: skip
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
    if not isinstance(parameters, Iterable):
        return [parameters]
    listed: list[object] = []
    for each in parameters:
        listed.append(each)
        if not isinstance(each, Tensor):
            break  # it is refused, and there may be no end
    return listed


def _kind(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"a {type(value).__name__}"


#: Names of an event's own fields, which a sum may not take.
RESERVED = frozenset({"event", "step", "epoch", "loss", "lr", "samples", "samples_per_second", "data_wait_seconds",
                      "mfu", "grad_norm", "loss_scale", "skipped_updates", "best"})  # fmt: skip


def check_output(output: LossOutput, any_shape: bool = False) -> None:
    """Refuse what cannot be trained on or reported; costs nothing on the device.

    Args:
        output: what compute_loss returned.
        any_shape: of the sums, as the recipe has a compute_metrics.

    Raises:
        ConfigError: naming what compute_loss returned, or the field of LossOutput, and what it should be.
    """
    if not isinstance(output, LossOutput):
        raise ConfigError("compute_loss returned no LossOutput", expected="LossOutput(loss), and what else it holds",
                          got=type(output).__name__, fix="return LossOutput(loss)")  # fmt: skip
    fields: dict[str, object] = {"loss": output.loss}
    for what, values in (("sums", output.sums), ("means", output.means)):
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise ConfigError(f"compute_loss: {what} must be a dict", expected='{"correct": tensor}',
                              got=repr(values)[:80])  # fmt: skip
        fields |= {f"{what}[{name!r}]": value for name, value in values.items()}
    if output.weight is not None:
        fields["weight"] = output.weight
    for name, value in fields.items():
        if any_shape and name.startswith("sums[") and isinstance(value, Tensor):
            continue
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = list(value.shape) if isinstance(value, Tensor) else repr(value)[:60]
            raise ConfigError(f"compute_loss: {name} must be a tensor without dims",
                              expected="one number a microbatch, as a tensor: mean() for loss and means, sum() for "
                                       "sums (of any shape with Recipe.compute_metrics)",
                              got=f"{type(value).__name__} {got}")  # fmt: skip
    if taken := RESERVED & (output.sums.keys() | output.means.keys()):
        raise ConfigError(f"compute_loss: sums and means must not be named {', '.join(sorted(taken))}",
                          expected="names that events do not have already")  # fmt: skip
    if both := output.sums.keys() & output.means.keys():
        raise ConfigError(f"compute_loss: {', '.join(sorted(both))} is among the sums and among the means",
                          expected="each name once")  # fmt: skip


def check_metrics(metrics: object, taken: Iterable[str]) -> dict[str, float]:
    """What compute_metrics returned, numbers as floats.

    Args:
        metrics: it.
        taken: names of means, which are reported beside it.

    Raises:
        ConfigError: no dict of numbers, or a name that events have already.
    """
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise ConfigError("compute_metrics returned no dict of numbers", expected='{"f1": 0.5}', got=_kind(metrics))
    checked = {}
    for name, value in metrics.items():
        number = value.item() if isinstance(value, Tensor | np.generic) and math.prod(value.shape) == 1 else value
        if isinstance(number, bool | complex) or not isinstance(number, int | float):
            raise ConfigError(f"compute_metrics: {name} is no number", expected="a float", got=repr(value)[:60])
        checked[name] = float(number)
    if odd := sorted(checked.keys() & (RESERVED | set(taken))):
        raise ConfigError(f"compute_metrics: {', '.join(odd)} is the name of something else in an event",
                          expected="other names")  # fmt: skip
    return checked
