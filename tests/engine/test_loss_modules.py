"""A loss with parameters is trained and saved with the model; a helper is neither, and known by its digest."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.harness import run_ranks
from support.tiny import BASE, CLASSES, FEATURES, RECIPE, TinyConfig
from torch import Tensor, nn

from distkit.assemble import assemble
from distkit.config import CheckpointConfig, Constant, StrategyName
from distkit.engine.fit import fit
from distkit.entry import train
from distkit.errors import ConfigError, TrainingError
from distkit.load import load_run
from distkit.losses import LossOutput
from distkit.recipe import Recipe
from distkit.runtime import read_topology
from distkit.runtime.process import start

CONFIG = replace(BASE, num_steps=8, schedule=Constant(), checkpoint=CheckpointConfig(save_every=4))


class Scaled(nn.Module):
    """Cross entropy with a weight of each logit that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits * self.scale, labels)


def compute_loss(config: TinyConfig, model: nn.Module, batch: dict[str, Tensor], frozen: nn.Module) -> LossOutput:
    logits = model(batch["inputs"]).float()
    loss = model.criterion(logits, batch["labels"])  # type: ignore[operator]
    target = frozen(batch["inputs"]).softmax(1)
    return LossOutput(loss + F.cross_entropy(logits, target))


def build_frozen(config: TinyConfig) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.BatchNorm1d(CLASSES), nn.Dropout(0.5))


HELPED = replace(RECIPE, compute_loss=compute_loss, build_loss=lambda config: Scaled(), build_frozen=build_frozen,
                 best=("loss", "min"))  # fmt: skip


def train_here(folder: str, strategy: StrategyName, num_steps: int = 8) -> str:
    config = replace(CONFIG, num_steps=num_steps, strategy=strategy, run_dir=Path(folder) / "run")
    run = assemble(HELPED, config, start(config, read_topology(os.environ)))
    digest = fit(run)["state_digest"]
    run.directory.release()
    run.runtime.close()
    return str(digest)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1"])
def test_all_strategies_train_a_loss_and_resume_to_the_bit(strategy: StrategyName, tmp_path: Path) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    (alone,) = run_ranks(train_here, 1, str(tmp_path / "alone"), "single")
    first, second = run_ranks(train_here, 2, str(tmp_path / "whole"), strategy)
    run_ranks(train_here, 2, str(tmp_path / "parts"), strategy, 4)
    assert run_ranks(train_here, 2, str(tmp_path / "parts"), strategy) == [first, second] == [first] * 2
    one, two = (load_file(tmp_path / name / "run" / "weights.safetensors") for name in ("alone", "whole"))
    assert alone
    assert one.keys() == two.keys()
    assert not torch.equal(one["criterion.scale"], torch.ones(CLASSES))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_helper_is_nowhere_and_the_loss_is_loaded(tmp_path: Path) -> None:
    train(HELPED, replace(CONFIG, run_dir=tmp_path / "run"))
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    assert {name.split(".")[0] for name in weights} == {"0", "4", "criterion"}
    _, model = load_run(tmp_path / "run", recipe=HELPED)
    assert torch.equal(model.criterion.scale, weights["criterion.scale"])  # type: ignore[union-attr, arg-type]


def test_another_helper_is_refused_at_a_resume(tmp_path: Path) -> None:
    train(HELPED, replace(CONFIG, num_steps=4, run_dir=tmp_path / "run"))

    def other(config: TinyConfig) -> nn.Module:
        helper = build_frozen(config)
        nn.init.zeros_(helper[0].weight)  # type: ignore[index, arg-type]
        return helper

    for recipe in (replace(HELPED, build_frozen=other), replace(HELPED, build_frozen=None, compute_loss=without)):
        with pytest.raises(ConfigError, match="was trained with another helper of build_frozen"):
            train(recipe, replace(CONFIG, run_dir=tmp_path / "run"))


def without(config: TinyConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
    return LossOutput(model.criterion(model(batch["inputs"]), batch["labels"]))  # type: ignore[operator]


def test_a_helper_that_something_changes_is_noticed(tmp_path: Path) -> None:
    def changing(config: TinyConfig, model: nn.Module, batch: dict[str, Tensor], frozen: nn.Module) -> LossOutput:
        with torch.no_grad():
            frozen[0].bias.add_(1.0)  # type: ignore[index, union-attr, operator]
        return compute_loss(config, model, batch, frozen)

    with pytest.raises(TrainingError, match="other values than at the start"):
        train(replace(HELPED, compute_loss=changing), replace(CONFIG, run_dir=tmp_path / "run"))


class Own(nn.Linear):
    criterion = "mine"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (replace(HELPED, build_frozen=lambda config: None), "build_frozen returned no module"),
        (replace(HELPED, build_loss=lambda config: F.cross_entropy), "build_loss returned no module"),
        (replace(HELPED, compute_loss=without), "its compute_loss does not take what it builds"),
        (replace(HELPED, build_model=lambda config: Own(FEATURES, CLASSES)), "the model has something of that name"),
    ],
)
def test_what_does_not_fit_is_named(recipe: Recipe[TinyConfig], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        train(recipe, replace(CONFIG, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
