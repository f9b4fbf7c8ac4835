"""What a forward or a compute_loss changes by itself: noticed in the first batch, put back, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.harness import run_ranks
from support.tiny import BASE, CLASSES, FEATURES, RECIPE, TinyConfig
from torch import Tensor, nn

from distkit.assemble import assemble
from distkit.config import StrategyName
from distkit.engine.fit import fit
from distkit.entry import train
from distkit.errors import ConfigError
from distkit.losses import LossOutput
from distkit.runtime import read_topology
from distkit.runtime.process import start

Batch = Mapping[str, Tensor]
CONFIG = replace(BASE, num_steps=5, report_every=1)


class Moving(nn.Module):
    """A network whose forward changes a parameter that is not trained: a mean of its batches, or their number."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts = counts
        self.net = nn.Linear(FEATURES, CLASSES)
        self.seen = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.seen.add_(1.0) if self.counts else self.seen.lerp_(x.mean(), 0.5)
        return self.net(x) + 0 * self.seen.mean()  # type: ignore[no-any-return]


def outcome(folder: str, strategy: StrategyName, counts: bool) -> float | str:
    """The parameter at the end, or why the run was refused."""
    config = replace(CONFIG, strategy=strategy, run_dir=Path(folder) / "run")
    recipe = replace(RECIPE, build_model=lambda config: Moving(counts))
    runtime = start(config, read_topology(os.environ))
    try:
        run = assemble(recipe, config, runtime)
    except ConfigError as error:
        return str(error)
    fit(run)
    run.directory.release()
    return float(run.strategy.whole_weights().get("seen", torch.tensor(-1.0)).mean())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "counts", "expected"),
    [
        ("ddp", True, 5.0),
        ("ddp", False, "the parameter seen in place, and differently on each rank"),
        ("fsdp", True, "the parameter seen in place, which fsdp loses"),
        ("zero1", False, "the parameter seen in place, and differently on each rank"),
        ("zero3", True, "the parameter seen in place, which zero3 loses"),
    ],
)
def test_a_parameter_that_the_forward_changes(
    strategy: StrategyName, counts: bool, expected: float | str, tmp_path: Path
) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    first, second = run_ranks(outcome, 2, str(tmp_path), strategy, counts)
    if isinstance(expected, str):
        assert expected in str(first)
        assert first == second
        assert not (tmp_path / "run").exists()
    else:
        assert first == expected


def test_nothing_of_the_first_batch_is_left_in_the_parameters(tmp_path: Path) -> None:
    assert outcome(str(tmp_path), "single", True) == 5.0


@pytest.mark.distributed
def test_embeddings_that_are_cut_back_in_the_forward_differ_between_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(embed, 2, str(tmp_path), "ddp")
    assert "the parameter table.weight in place, and differently on each rank" in first
    assert first == second
    assert embed(str(tmp_path), "single") == "trained"


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(96, CLASSES, max_norm=0.5)

    def forward(self, indices: Tensor) -> Tensor:
        return self.table(indices)  # type: ignore[no-any-return]


def embed(folder: str, strategy: StrategyName) -> str:
    def compute_loss(config: TinyConfig, model: nn.Module, batch: Batch) -> LossOutput:
        return LossOutput(F.cross_entropy(model(batch["indices"]), batch["labels"]))

    recipe = replace(RECIPE, build_model=lambda config: Embedded(), compute_loss=compute_loss, best=("loss", "min"))
    config = replace(CONFIG, strategy=strategy, run_dir=Path(folder) / "run")
    try:
        fit(assemble(recipe, config, start(config, read_topology(os.environ))))
    except ConfigError as error:
        return str(error)
    return "trained"


def retained(model: nn.Module, loss: Tensor) -> None:
    if model.training:
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]


def plain(model: nn.Module, loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def twice(model: nn.Module, loss: Tensor) -> None:
    if model.training:
        sum(p.sum() for p in model.parameters()).backward()  # type: ignore[no-untyped-call, union-attr]


def dropped(model: nn.Module, loss: Tensor) -> None:
    model.zero_grad()


def stepped(model: nn.Module, loss: Tensor) -> None:
    if model.training:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.mark.parametrize("act", [retained, plain, twice, dropped, stepped])
def test_a_loss_that_makes_or_drops_gradients_is_refused(
    act: Callable[[nn.Module, Tensor], None], tmp_path: Path
) -> None:
    def compute_loss(config: TinyConfig, model: nn.Module, batch: Batch) -> LossOutput:
        loss = F.cross_entropy(model(batch["inputs"]), batch["labels"])
        act(model, loss)
        return LossOutput(loss)

    recipe = replace(RECIPE, compute_loss=compute_loss, best=("loss", "min"))
    with pytest.raises(ConfigError, match="compute_loss changes the gradients itself"):
        train(recipe, replace(CONFIG, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_tensor_that_nothing_moves_is_refused(tmp_path: Path) -> None:
    log_variance = torch.zeros(2, requires_grad=True)

    def compute_loss(config: TinyConfig, model: nn.Module, batch: Batch) -> LossOutput:
        loss = F.cross_entropy(model(batch["inputs"]), batch["labels"])
        return LossOutput((loss * (-log_variance).exp() + log_variance).sum())

    recipe = replace(RECIPE, compute_loss=compute_loss, best=("loss", "min"))
    with pytest.raises(ConfigError, match="trains 1 tensors that are no parameters") as caught:
        train(recipe, replace(CONFIG, run_dir=tmp_path / "run"))
    assert "one of shape [2]" in str(caught.value)


def test_a_gradient_penalty_is_no_such_tensor(tmp_path: Path) -> None:
    def compute_loss(config: TinyConfig, model: nn.Module, batch: Batch) -> LossOutput:
        inputs = batch["inputs"].detach().clone().requires_grad_()
        loss = F.cross_entropy(model(inputs), batch["labels"])
        if not model.training:
            return LossOutput(loss)
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        return LossOutput(loss + slope.square().sum())

    recipe = replace(RECIPE, compute_loss=compute_loss, best=("loss", "min"))
    assert train(recipe, replace(CONFIG, run_dir=tmp_path / "run"))["step"] == 5


def test_a_loss_module_outside_of_the_model_is_refused_when_compiled_too(tmp_path: Path) -> None:
    criterion = nn.Linear(CLASSES, CLASSES)

    def compute_loss(config: TinyConfig, model: nn.Module, batch: Batch) -> LossOutput:
        return LossOutput(F.cross_entropy(criterion(model(batch["inputs"])), batch["labels"]))

    recipe = replace(RECIPE, compute_loss=compute_loss, best=("loss", "min"))
    with pytest.raises(ConfigError, match="2 parameters that are not in the model"):
        train(recipe, replace(CONFIG, run_dir=tmp_path / "run", compile=True, compile_backend="eager"))


def test_a_gradient_penalty_leaves_no_change_of_the_forward_either(tmp_path: Path) -> None:
    def compute_loss(config: TinyConfig, model: nn.Module, batch: Batch) -> LossOutput:
        inputs = batch["inputs"].detach().clone().requires_grad_()
        return LossOutput(F.cross_entropy(model(inputs), batch["labels"]))

    config = replace(CONFIG, run_dir=tmp_path / "run")
    recipe = replace(RECIPE, build_model=lambda config: Moving(True), compute_loss=compute_loss, best=("loss", "min"))
    run = assemble(recipe, config, start(config, read_topology(os.environ)))
    assert run.strategy.module.seen.tolist() == [0.0] * 4  # type: ignore[operator, union-attr]
    run.directory.release()
