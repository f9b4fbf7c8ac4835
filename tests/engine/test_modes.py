"""Parts of a model that stay in evaluation mode while the rest trains."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny
from support.harness import run_ranks
from support.tiny import BASE
from torch import Tensor, nn

from distkit.assemble import assemble
from distkit.config.strategy import StrategyName
from distkit.engine.fit import fit
from distkit.engine.modes import choose_modes_, describe_modes
from distkit.runtime import read_topology
from distkit.runtime.process import start


class TwoParts(nn.Module):
    """A backbone with statistics and dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(tiny.FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, tiny.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))  # type: ignore[no-any-return]


def in_eval(model: nn.Module) -> list[str]:
    choose_modes_(model)
    return [name for name, module in model.named_modules() if not module.training]


def test_what_the_recipe_left_in_evaluation_mode_stays_in_it() -> None:
    model = TwoParts()
    model.backbone[1].eval()
    assert in_eval(model) == ["backbone.1"]
    assert describe_modes(model) == "backbone.1"


def test_a_frozen_part_stays_in_it_with_its_dropout() -> None:
    model = TwoParts()
    model.backbone.requires_grad_(False)
    assert in_eval(model) == ["backbone", "backbone.0", "backbone.1", "backbone.2"]
    assert describe_modes(model) == "backbone"


def test_a_norm_alone_may_be_frozen() -> None:
    model = TwoParts()
    model.backbone[1].requires_grad_(False)
    assert in_eval(model) == ["backbone.1"]


def test_a_pretrained_model_trains_as_a_whole_but_for_what_is_frozen() -> None:
    model = TwoParts().eval()
    model.backbone[1].requires_grad_(False)
    assert in_eval(model) == ["backbone.1"]
    assert in_eval(TwoParts().eval()) == []


def test_a_layers_own_train_is_obeyed() -> None:
    class Stubborn(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> "Stubborn":
            return super().train(False)

    model = TwoParts()
    model.backbone[1] = Stubborn(8)
    assert in_eval(model) == ["backbone.1"]


def test_many_parts_are_counted() -> None:
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(8)])
    for module in list(model)[:7]:
        module.eval()
    choose_modes_(model)
    assert describe_modes(model) == "0, 1, 2, 3, 4 and 2 more"


def build_frozen(_config: tiny.TinyConfig) -> nn.Module:
    model = TwoParts()
    model.backbone.requires_grad_(False)
    model.backbone[1].running_mean.fill_(0.25)  # type: ignore[union-attr,operator]
    return model


def trained(folder: str, strategy: StrategyName) -> tuple[list[Tensor], list[Tensor], str]:
    """The backbone's running mean and the head before and after training with evaluations; what the start says."""
    config = replace(BASE, run_dir=Path(folder) / "run", num_steps=6, eval_every=2, strategy=strategy)
    recipe = replace(tiny.RECIPE, build_model=build_frozen)
    run = assemble(recipe, config, start(config, read_topology(os.environ)))

    def values() -> list[Tensor]:
        weights = run.strategy.whole_weights()  # on rank 0
        return [weights[name].clone() for name in ("backbone.1.running_mean", "head.weight") if weights]

    before = values()
    fit(run)
    after = values()
    run.runtime.close()
    return before, after, run.facts["model"]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_statistics_of_a_frozen_backbone_stay(strategy: StrategyName, tmp_path: Path) -> None:
    (mean, head), (mean_after, head_after), said = run_ranks(
        trained, 1 if strategy == "single" else 2, str(tmp_path), strategy
    )[0]
    assert mean.tolist() == [0.25] * 8
    assert torch.equal(mean, mean_after)
    assert not torch.equal(head, head_after)
    assert said.endswith("; in evaluation mode: backbone")
