"""What a recipe's author gets wrong in its loss is found with one batch, before anything is written."""

import json
import os
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.harness import run_ranks
from support.tiny import BASE
from torch import Tensor, nn
from torch.nn import functional as F

from distkit.assemble import assemble
from distkit.config.strategy import StrategyName
from distkit.data.reading.iterable import IterableData
from distkit.engine.fit import fit
from distkit.engine.probe import leaves, probe, untouched
from distkit.engine.run import Run
from distkit.engine.train_step import train_step
from distkit.entry import train
from distkit.errors import ConfigError, DataError
from distkit.losses import LossOutput
from distkit.recipe import Recipe
from distkit.runtime import Topology, read_topology
from distkit.runtime.process import start

Loss = Callable[[tiny.TinyConfig, nn.Module, dict[str, Tensor]], Any]


def build(folder: Path, recipe: Recipe[tiny.TinyConfig], config: tiny.TinyConfig = BASE) -> Run:
    config = replace(config, run_dir=folder / "run")
    return assemble(recipe, config, start(config, Topology()))


def cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["inputs"]), batch["labels"])


MISTAKES: dict[str, tuple[Loss, str]] = {
    "a tensor": (lambda _, model, batch: cross_entropy(model, batch), "Tensor"),
    "a tuple": (lambda _, model, batch: (cross_entropy(model, batch), {}), "tuple"),
    "a dict": (lambda _, model, batch: {"loss": cross_entropy(model, batch)}, "dict"),
    "nothing": (lambda _, model, batch: None, "NoneType"),
    "a number": (lambda _, model, batch: LossOutput(cross_entropy(model, batch).item()), "float"),  # type: ignore[arg-type]
    "a vector": (lambda _, model, batch: LossOutput(cross_entropy(model, batch)[None]), r"Tensor \[1\]"),
    "detached": (lambda _, model, batch: LossOutput(cross_entropy(model, batch).detach()), "without a gradient"),
    "a list of sums": (lambda _, model, batch: LossOutput(cross_entropy(model, batch), []), "sums must be a dict"),  # type: ignore[arg-type]
    "a vector of weights": (
        lambda _, model, batch: LossOutput(cross_entropy(model, batch), weight=torch.ones(8)), r"weight.*without dims",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_compute_loss_returned_is_named(mistake: str, tmp_path: Path) -> None:
    compute_loss, words = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=f"(?s)compute_loss.*{words}|compute_loss returned a loss {words}"):
        build(tmp_path, replace(tiny.RECIPE, compute_loss=compute_loss))
    assert not (tmp_path / "run").exists()


def test_a_mean_among_the_sums_is_noticed_and_means_have_a_place(tmp_path: Path) -> None:
    def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["inputs"]).argmax(1) == batch["labels"]).float().mean()

    def loss(kind: str) -> Loss:
        return lambda _, m, b: LossOutput(cross_entropy(m, b), **{kind: {"correct": accuracy(m, b)}})

    wrong, right = (replace(tiny.RECIPE, compute_loss=loss(kind)) for kind in ("sums", "means"))
    warned = build(tmp_path / "wrong", wrong).resume.warnings
    assert any("the sum correct of 8 samples is 0." in line and "means={'correct': ...}" in line for line in warned)
    run = build(tmp_path / "right", right)
    assert run.resume.warnings == []
    counted = fit(build(tmp_path / "sums", tiny.RECIPE))
    assert fit(run)["last"]["correct"] == pytest.approx(counted["last"]["correct"])  # type: ignore[index]


class Odd(tiny.Vectors):
    """A data set whose batches are a mapping but no dict, or hold a number."""

    def __init__(self, split: tiny.Split, how: str) -> None:
        super().__init__(split, 0.0)
        self.how = how

    def fetch(self, indices: Tensor) -> Any:
        batch = super().fetch(indices)
        return UserDict(batch) if self.how == "mapping" else {**batch, "scale": torch.tensor(1.0)}


def test_a_batch_may_be_a_mapping_that_is_no_dict(tmp_path: Path) -> None:
    recipe = replace(tiny.RECIPE, build_dataset=lambda _config, split: Odd(split, "mapping"))
    plain = train(tiny.RECIPE, replace(BASE, run_dir=tmp_path / "plain"))
    assert train(recipe, replace(BASE, run_dir=tmp_path / "run"))["state_digest"] == plain["state_digest"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_batch_that_has_no_size_is_named(split: str, tmp_path: Path) -> None:
    def build_dataset(_config: tiny.TinyConfig, this: tiny.Split) -> tiny.Vectors:
        return Odd(this, "number") if this == split else tiny.Vectors(this, 0.0)

    with pytest.raises(DataError, match="how many samples"):
        build(tmp_path, replace(tiny.RECIPE, build_dataset=build_dataset))
    assert not (tmp_path / "run").exists()


class Criterion(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.ones(tiny.CLASSES))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits * self.centers, labels)


def refused(folder: str, strategy: StrategyName) -> str:
    """What is said of a criterion outside of the model, on this rank."""
    criterion = Criterion()

    def compute_loss(_config: tiny.TinyConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        return LossOutput(criterion(model(batch["inputs"]), batch["labels"]))

    config = replace(BASE, run_dir=Path(folder) / "run", strategy=strategy)
    recipe = replace(tiny.RECIPE, compute_loss=compute_loss, best=("loss", "min"))
    runtime = start(config, read_topology(os.environ))
    try:
        assemble(recipe, config, runtime)
    except ConfigError as error:
        return str(error)
    finally:
        runtime.close()
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "zero1", "zero3"])
def test_parameters_outside_of_the_model_are_refused(strategy: StrategyName, tmp_path: Path) -> None:
    for said in run_ranks(refused, 1 if strategy == "single" else 2, str(tmp_path), strategy):
        assert "compute_loss trains 1 parameters that are not in the model" in said
        assert f"one of shape [{tiny.CLASSES}]" in said


def test_a_gradient_of_the_inputs_is_no_mistake(tmp_path: Path) -> None:
    def compute_loss(_config: tiny.TinyConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        inputs = batch["inputs"].detach().requires_grad_()
        return LossOutput(F.cross_entropy(model(inputs), batch["labels"]))

    assert build(tmp_path, replace(tiny.RECIPE, compute_loss=compute_loss, best=("loss", "min"))).progress.step == 0


def test_leaves_of_a_graph() -> None:
    a, b, c = (torch.ones((), requires_grad=True) for _ in range(3))
    found = list(leaves(a * b + (a * c).detach() + a))
    assert {id(leaf) for leaf in found} == {id(a), id(b)}


class Counts(nn.Module):
    """Keeps what a forward changes in each way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(tiny.FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, tiny.CLASSES)
        self.register_buffer("late", None)
        self.register_buffer("memory", torch.zeros(2))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.late, self.memory = x.detach().sum(), torch.ones(3)
        self.register_buffer("later", torch.ones(1))
        return self.head(self.inner(x))  # type: ignore[no-any-return]

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    run = build(tmp_path, replace(tiny.RECIPE, build_model=lambda config: Counts(), best=("loss", "min")))
    module = run.strategy.module
    before = {name: value.clone() for name, value in module.named_buffers()}
    draw = torch.get_rng_state()
    probe(run)
    assert torch.equal(torch.get_rng_state(), draw)
    assert module.calls == 0
    assert module.late is None
    assert {name: value.tolist() for name, value in module.named_buffers()} == {
        name: value.tolist() for name, value in before.items()
    }
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(part.training for part in module.modules())
    train_step(run)
    assert module.calls == 1


def test_what_was_there_is_put_back_also_after_an_error(tmp_path: Path) -> None:
    run = build(tmp_path, tiny.RECIPE)
    module = run.strategy.module

    def fail() -> None:
        with untouched(run):
            module.eval()
            raise ValueError("now")

    with pytest.raises(ValueError, match="now"):
        fail()
    assert module.training


def test_data_that_can_be_read_once_only_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torchdata")

    class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            vectors = tiny.Vectors("train", 0.0)
            for index in range(len(vectors)):
                yield {name: values[0] for name, values in vectors.fetch(torch.tensor([index])).items()}

    def build_dataset(_config: tiny.TinyConfig, split: tiny.Split) -> Any:
        return (
            IterableData(build=lambda _rank, _world_size: Stream(), samples_per_epoch=64) if split == "train" else None
        )

    run = build(tmp_path, replace(tiny.RECIPE, build_dataset=build_dataset), replace(BASE, eval_every=None))
    assert run.loader.microbatch(0, 0)["indices"].tolist() == list(range(8))  # type: ignore[index,call-overload]
    run.loader.close()


class WithCriterion(nn.Module):
    """A model that holds its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.criterion = nn.Linear(tiny.FEATURES, tiny.CLASSES), Criterion()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def of_the_model(_config: tiny.TinyConfig, model: Any, batch: dict[str, Tensor]) -> LossOutput:
    return LossOutput(model.criterion(model(batch["inputs"]), batch["labels"]))


def of_a_part(_config: tiny.TinyConfig, model: Any, batch: dict[str, Tensor]) -> LossOutput:
    return LossOutput(model.criterion(model.body(batch["inputs"]), batch["labels"]))


def centers(folder: str, strategy: StrategyName, compute_loss: Loss) -> list[float] | str:
    """The criterion's parameters after three steps, or what is refused."""
    config = replace(BASE, run_dir=Path(folder) / "run", strategy=strategy, num_steps=4)
    recipe = replace(tiny.RECIPE, build_model=lambda config: WithCriterion(), compute_loss=compute_loss,
                     best=("loss", "min"))  # fmt: skip
    runtime = start(config, read_topology(os.environ))
    try:
        run = assemble(recipe, config, runtime)
        for _ in range(3):
            train_step(run)
        run.loader.close()
        weights = run.strategy.whole_weights()
        return weights["criterion.centers"].tolist() if weights else []
    except ConfigError as error:
        return str(error)
    finally:
        runtime.close()


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_a_criterion_in_the_model_is_trained_on_several_ranks(strategy: StrategyName, tmp_path: Path) -> None:
    (alone,) = run_ranks(centers, 1, str(tmp_path / "alone"), "single", of_the_model)
    several = run_ranks(centers, 2, str(tmp_path / "several"), strategy, of_the_model)[0]
    assert several == pytest.approx(alone, abs=1e-6)
    assert alone != pytest.approx([1.0] * tiny.CLASSES, abs=1e-3)


@pytest.mark.distributed
def test_a_loss_that_never_calls_the_model_is_refused_on_several_ranks(tmp_path: Path) -> None:
    (alone,) = run_ranks(centers, 1, str(tmp_path / "alone"), "single", of_a_part)
    assert len(alone) == tiny.CLASSES
    for said in run_ranks(centers, 2, str(tmp_path / "several"), "ddp", of_a_part):
        assert "never the model itself" in said


def test_sums_that_look_like_means_are_noted_once(tmp_path: Path) -> None:
    def compute_loss(_config: tiny.TinyConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        hits = model(batch["inputs"]).argmax(1) == batch["labels"]
        sums = {"mean": hits.float().mean() * 0 + 0.25, "late": torch.tensor(0.0 if model.training else 0.5),
                "any": hits.any() | True, "count": hits.float().sum(), "number": hits.sum()}  # fmt: skip
        return LossOutput(F.cross_entropy(model(batch["inputs"]), batch["labels"]), sums)

    recipe = replace(tiny.RECIPE, compute_loss=compute_loss, best=("loss", "min"))
    train(recipe, replace(BASE, run_dir=tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    notes = [line["message"] for line in lines if line["event"] == "note" and "belongs into" in line["message"]]
    assert [note.split("the sum ")[1].split()[0] for note in notes] == ["mean", "any", "late"]
    assert notes[0].endswith("LossOutput(loss, means={'mean': ...})")
