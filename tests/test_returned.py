"""Each function of a recipe returns each wrong kind of value: one message that names it, and nothing is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.tiny import BASE
from torch import nn
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader, TensorDataset

from distkit.assemble import assemble
from distkit.config import Constant
from distkit.errors import ConfigError
from distkit.returned import check_groups, check_schedule, left_out
from distkit.runtime import Topology
from distkit.runtime.process import start

CONFIG = replace(BASE, schedule=Constant())
PAIRS = TensorDataset(torch.zeros(32, tiny.FEATURES), torch.zeros(32, dtype=torch.int64))
OPTIMIZER = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
WRONG: dict[str, dict[str, Any]] = {
    "build_model": {
        "a tuple": (nn.Linear(1, 1), 3), "None": None, "a list": [nn.Linear(1, 1)], "a class": nn.Linear,
        "a string": "resnet18", "a state dict": nn.Linear(1, 1).state_dict(),
    },
    "build_dataset": {
        "None": None, "a tuple": (torch.zeros(3, 2), torch.zeros(3)), "a loader": DataLoader(PAIRS), "a path": "data",
        "a number": 3, "a dict": {"train": PAIRS}, "an iterator": iter([1]), "nothing in it": [],
    },
    "build_schedule": {
        "None": None, "a number": 0.1, "a scheduler": ConstantLR(OPTIMIZER), "a string": "cosine",
        "words": lambda step: "high", "NaN": lambda step: float("nan"), "no number": lambda step: None,
    },
    "build_param_groups": {
        "None": None, "an optimizer": OPTIMIZER,
        "parameters": lambda model: list(model.parameters()), "a generator": lambda model: model.parameters(),
        "a dict": lambda model: {"params": list(model.parameters())}, "others": OPTIMIZER.param_groups,
        "one twice": lambda model: [{"params": list(model.parameters())}] * 2, "names": [{"params": ["head.weight"]}],
        "nothing": [], "empty groups": [{"params": []}],
    },
}  # fmt: skip


@pytest.mark.parametrize(("function", "kind"), [(f, kind) for f, kinds in WRONG.items() for kind in kinds])
def test_a_wrong_value_is_named_by_its_function(function: str, kind: str, tmp_path: Path) -> None:
    value = WRONG[function][kind]

    def give(_config: object, *rest: Any) -> Any:
        return value(rest[0]) if callable(value) and function == "build_param_groups" else value

    config = replace(CONFIG, run_dir=tmp_path / "run")
    recipe = replace(tiny.RECIPE, **{function: give})
    with pytest.raises(ConfigError) as caught:
        assemble(recipe, config, start(config, Topology()))
    message = str(caught.value)
    assert "parameter" in message if kind in ("nothing", "empty groups") else function in message
    assert len(message.splitlines()) < 10
    assert not (tmp_path / "run").exists()


def test_groups_as_torch_takes_them_are_taken() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    groups = check_groups(({"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].weight}), model)
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(model[0].weight), id(model[0].bias)], [id(model[1].weight)],
    ]  # fmt: skip
    assert groups[0]["lr"] == 0.1
    assert left_out(groups, model) == "build_param_groups leaves out 1 parameters, which will not move: 1.bias"
    model[1].bias.requires_grad_(False)
    assert left_out(groups, model) == ""


def test_a_schedule_may_be_anything_that_can_be_called() -> None:
    class Ramp:
        def __call__(self, step: int) -> float:
            return step / 10

    assert check_schedule(Ramp())(5) == 0.5


def test_what_groups_leave_out_is_said_at_the_start(tmp_path: Path) -> None:
    config = replace(CONFIG, run_dir=tmp_path / "run")
    recipe = replace(tiny.RECIPE, build_param_groups=lambda config, model: [{"params": [model[0].weight]}])
    run = assemble(recipe, config, start(config, Topology()))
    assert any("leaves out 3 parameters" in note for note in run.resume.warnings)
