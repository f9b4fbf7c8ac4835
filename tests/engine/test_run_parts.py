"""Small parts of the engine: clock, meter, run directory."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distkit.engine.clock import Clock
from distkit.engine.meter import FOLD_ELEMENTS, FOLD_EVERY, Meter
from distkit.engine.run import Progress, Trackers
from distkit.engine.run_dir import RunDirectory, check_usable
from distkit.errors import ConfigError, TrainingError
from distkit.files import write_json
from distkit.losses import LossOutput
from distkit.runtime import Topology
from distkit.runtime.process import Runtime

RUNTIME = Runtime(topology=Topology(), device=torch.device("cpu"))


class Time:
    """A clock that tests set forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("distkit.engine.clock.perf_counter", lambda: self.now)


def test_clock_leaves_out_what_is_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    clock = Clock()
    time.now += 0.5
    with clock.excluded():
        time.now += 3
    assert clock.lap(100) == pytest.approx(200)
    time.now += 1.5
    clock.lap(300)
    assert clock.seconds == pytest.approx(2)
    assert clock.average() == pytest.approx(200)


def test_meter_means_over_unequal_batches_and_many_folds() -> None:
    meter = Meter(RUNTIME)
    losses = torch.arange(2 * FOLD_EVERY + 5, dtype=torch.float32)
    sizes = [4 if i % 3 else 7 for i in range(len(losses))]
    for loss, size in zip(losses, sizes, strict=True):
        meter.add(LossOutput(loss, {"correct": torch.tensor(size - 1)}), size)
    means = meter.reduce()
    total = sum(sizes)
    assert means.samples == total
    assert means.loss == pytest.approx(sum(x * n for x, n in zip(losses.tolist(), sizes, strict=True)) / total)
    assert means.metrics == {"correct": pytest.approx((total - len(sizes)) / total)}
    with pytest.raises(TrainingError, match="no sample"):
        meter.reduce()


def test_meter_copies_what_the_next_forward_writes_over() -> None:
    meter = Meter(RUNTIME, copies=True)
    loss, count, weight = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for value in (1.0, 2.0, 3.0):
        loss.fill_(value)
        count.fill_(2 * value)
        weight.fill_(value)
        meter.add(LossOutput(loss, {"correct": count}, weight), 2)
    means = meter.reduce()
    assert means.loss == pytest.approx(14 / 6)
    assert means.metrics == {"correct": pytest.approx(12 / 6)}


def test_meter_means_over_weights_and_a_metric_that_is_not_always_there() -> None:
    meter = Meter(RUNTIME)
    meter.add(LossOutput(torch.tensor(2.0), weight=torch.tensor(3)), 2)
    meter.add(LossOutput(torch.tensor(6.0), {"seen": torch.tensor(1.0)}, torch.tensor(1)), 2)
    means = meter.reduce()
    assert (means.loss, means.samples, means.metrics) == (3.0, 4, {"seen": 0.25})


def test_meter_means_of_means_are_those_over_samples() -> None:
    meter, generator = Meter(RUNTIME), torch.Generator().manual_seed(0)
    hits = torch.rand(2 * FOLD_EVERY + 9, 7, generator=generator) < 0.3
    sizes = [7 if i % 3 else 4 for i in range(len(hits))]
    for row, size in zip(hits, sizes, strict=True):
        here = row[:size].float()
        meter.add(LossOutput(torch.tensor(0.0), {"hits": here.sum()}, means={"accuracy": here.mean()}), size)
    metrics = meter.reduce().metrics
    assert metrics["accuracy"] == pytest.approx(metrics["hits"], rel=1e-7)
    meter.add(LossOutput(torch.tensor(0.0), means={"accuracy": torch.tensor(0.25)}), 3)
    state = meter.state_tensors()
    again = Meter(RUNTIME)
    again.load_state_tensors(state)
    assert again.reduce().metrics == {"accuracy": 0.25}


def confusion_metrics(sums: dict[str, torch.Tensor], num_samples: int) -> dict[str, float]:
    matrix = sums["confusion"]
    assert matrix.dtype == torch.float64
    return {"accuracy": (matrix.trace() / num_samples).item(), "precision": matrix[1, 1] / matrix[:, 1].sum()}


def test_meter_makes_metrics_of_sums_of_any_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, guesses = torch.randint(0, 3, (2, FOLD_EVERY + 30, 8), generator=generator)
    meter, again = Meter(RUNTIME, confusion_metrics), Meter(RUNTIME, confusion_metrics)
    for index, (label, guess) in enumerate(zip(labels, guesses, strict=True)):
        if index == 200:
            again.load_state_tensors(meter.state_tensors())
        matrix = torch.bincount(3 * label + guess, minlength=9).view(3, 3)
        for each in (meter, again)[: 1 + (index >= 200)]:
            each.add(LossOutput(torch.tensor(1.0), {"confusion": matrix}, means={"half": torch.tensor(0.5)}), 8)
    expected = {
        "accuracy": (labels == guesses).double().mean().item(),
        "precision": ((labels == 1) & (guesses == 1)).sum().item() / (guesses == 1).sum().item(),
        "half": 0.5,
    }
    assert meter.reduce().metrics == expected
    assert again.reduce().metrics == expected


def test_large_sums_are_added_up_early() -> None:
    meter = Meter(RUNTIME, lambda sums, _: {"sum": sums["large"].sum()})
    for _ in range(3):
        meter.add(LossOutput(torch.tensor(0.0), {"large": torch.ones(FOLD_ELEMENTS)}), 1)
        assert not meter._pending
    assert meter.reduce().metrics == {"sum": 3.0 * FOLD_ELEMENTS}


def test_a_sum_may_have_no_elements() -> None:
    meter = Meter(RUNTIME, lambda sums, _: {"elements": sums["none"].numel()})
    meter.add(LossOutput(torch.tensor(0.0), {"none": torch.zeros(0)}), 1)
    assert meter.reduce().metrics == {"elements": 0.0}


def test_a_sum_that_changes_its_shape_is_named() -> None:
    meter = Meter(RUNTIME, lambda sums, _: {})
    for size in (2, 3):
        meter.add(LossOutput(torch.tensor(0.0), {"counts": torch.ones(size)}), 1)
    with pytest.raises(TrainingError, match=r"sums\['counts'\] in several shapes: \[2\], \[3\]"):
        meter.reduce()


@pytest.mark.parametrize(("returned", "words"), [
    (None, "compute_metrics returned no dict of numbers"),
    ({"f1": "high"}, "f1 is no number"),
    ({"f1": torch.ones(2)}, "f1 is no number"),
    ({"lr": 1.0}, "lr is the name of something else"),
    ({"half": 1.0}, "half is the name of something else"),
])  # fmt: skip
def test_metrics_that_cannot_be_reported(returned: object, words: str) -> None:
    meter = Meter(RUNTIME, lambda sums, num_samples: returned)  # type: ignore[arg-type, return-value]
    meter.add(LossOutput(torch.tensor(0.0), means={"half": torch.tensor(0.5)}), 1)
    with pytest.raises(ConfigError, match=words):
        meter.reduce()


def test_a_matrix_needs_a_function_that_makes_numbers_of_it() -> None:
    with pytest.raises(ConfigError, match=r"sums\['confusion'\] must be a tensor without dims") as caught:
        Meter(RUNTIME).add(LossOutput(torch.tensor(0.0), {"confusion": torch.ones(2, 2)}), 1)
    assert "Recipe.compute_metrics" in str(caught.value)


@pytest.mark.parametrize(("output", "words"), [
    (LossOutput(torch.tensor(0.0), {"a": torch.tensor(1)}, means={"a": torch.tensor(1.0)}), "a is among the sums and"),
    (LossOutput(torch.tensor(0.0), means={"lr": torch.tensor(1.0)}), "must not be named lr"),
    (LossOutput(torch.tensor(0.0), means={"a": torch.ones(2)}), r"means\['a'\] must be a tensor without dims"),
    (LossOutput(torch.tensor(0.0), means=[]), "means must be a dict"),  # type: ignore[arg-type]
])  # fmt: skip
def test_means_that_cannot_be_reported(output: LossOutput, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Meter(RUNTIME).add(output, 4)


def test_meter_counts_exactly_past_float32() -> None:
    meter = Meter(RUNTIME)
    for _ in range(3):
        meter.add(LossOutput(torch.tensor(0.0), {"correct": torch.tensor(2**24 + 1)}), 2**24 + 1)
    assert meter.reduce().metrics["correct"] == 1.0


def test_meter_keeps_no_graph() -> None:
    meter = Meter(RUNTIME)
    leaf = torch.ones((), requires_grad=True)
    meter.add(LossOutput(leaf * 2), 1)
    assert not meter._pending[0].loss.requires_grad


def test_progress_state() -> None:
    progress = Progress()
    progress.load_state_dict({"step": 7})
    assert progress.state_dict() == {"step": 7}


def test_only_the_writer_writes(tmp_path: Path) -> None:
    quiet = RunDirectory(tmp_path / "quiet", writes=False)
    quiet.create({}, {}, None, saves=True)
    quiet.write_status("running", 1)
    quiet.write_summary({})
    assert not (tmp_path / "quiet").exists()
    loud = RunDirectory(tmp_path / "loud", writes=True)
    loud.create({"seed": 1}, {"python": "3"}, None, saves=False)
    loud.write_status("failed", 3, "ValueError: x")
    assert json.loads((loud.path / "status.json").read_text())["reason"] == "ValueError: x"
    loud.release()
    names = ["attempts.jsonl", "config.json", "environment.json", "status.json"]
    assert sorted(path.name for path in loud.path.iterdir()) == names


def test_attempts_are_counted_and_a_completed_run_is_known(tmp_path: Path) -> None:
    for attempt in (1, 2):
        directory = RunDirectory(tmp_path / "run", writes=True)
        directory.claim()
        directory.create({}, {}, None, saves=True)
        assert directory.attempt == attempt
        assert directory.completed_steps() == -1
        directory.write_status("running", 3)
        directory.release()
    directory.write_status("completed", 20)
    assert directory.completed_steps() == 20
    (tmp_path / "run" / "status.json").write_text("{")
    assert directory.completed_steps() == -1


def link_to_a_file(path: Path) -> None:
    path.symlink_to(__file__)


def link_to_a_folder(path: Path) -> None:
    path.symlink_to(Path(__file__).parent)


@pytest.mark.parametrize("name", ["config.json", "status.json", "attempts.jsonl", "summary.json", "metrics.jsonl",
                                  "weights.safetensors", "ema.safetensors"])  # fmt: skip
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_to_a_file])
def test_what_is_no_file_is_refused_before_the_run(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / name)
    directory = RunDirectory(tmp_path, writes=True)
    directory.claim()
    assert directory.completed_steps() == -1
    with pytest.raises(ConfigError, match=f"{name} is not a regular file"):
        directory.create({}, {}, None, saves=True)
    directory.release()


@pytest.mark.parametrize("name", ["checkpoints", "recipe", "submissions", "tensorboard", "wandb"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, link_to_a_folder])
def test_what_is_no_folder_is_refused_before_the_run(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / name)
    before = sorted(Path(__file__).parent.iterdir())
    directory = RunDirectory(tmp_path, writes=True)
    directory.claim()
    with pytest.raises(ConfigError, match=f"{name} is (not a regular folder|a symbolic link)"):
        directory.create({}, {}, None, saves=True)
    directory.release()
    assert sorted(Path(__file__).parent.iterdir()) == before


def test_what_is_not_finite_is_strict_json(tmp_path: Path) -> None:
    values = {"loss": math.nan, "best": {"top1": math.inf}, "list": [1.5, -math.inf]}
    write_json(tmp_path / "a.json", values)

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {"loss": None, "best": {"top1": None}, "list": [1.5, None]}
    trackers = Trackers(last={"step": 3.0, "loss": math.nan, "top1": -math.inf}, best=None)
    again = Trackers()
    again.load_state_dict(json.loads(json.dumps(trackers.state_dict(), allow_nan=False)))
    assert again.best is None
    assert again.last is not None
    assert math.isnan(again.last["loss"])
    assert again.last["step"] == 3.0
    assert again.last["top1"] == -math.inf


def test_a_status_that_nests_too_deep_is_none(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("[" * 200_000)
    assert RunDirectory(tmp_path, writes=True).completed_steps() == -1


def test_a_status_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, writes=True)
    (tmp_path / "status.json").mkdir()
    with pytest.raises(TrainingError, match=r"cannot write .*status\.json: Is a directory"):
        directory.write_status("failed", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_directory_that_another_run_began_meanwhile_is_not_taken(tmp_path: Path) -> None:
    late = RunDirectory(tmp_path / "run", writes=True)
    late.claim()  # it does not exist yet
    first = RunDirectory(tmp_path / "run", writes=True)
    first.create({}, {}, None, saves=False)
    first.release()
    with pytest.raises(ConfigError, match=r"started in .* just now"):
        late.create({}, {}, None, saves=False)
    assert not (tmp_path / "run" / "lease.json").exists()


def test_what_a_killed_run_left_half_made_is_swept(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", writes=True)
    for name in (".tmp-step-000000005", ".trash-step-000000001", "step-000000003"):
        (directory.checkpoints / name).mkdir(parents=True)
    directory.claim()
    directory.create({}, {}, None, saves=True)
    directory.release()
    assert [path.name for path in directory.checkpoints.iterdir()] == ["step-000000003"]


def test_a_restored_clock_continues_the_open_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    clock = Clock()
    time.now += 1
    clock.lap(100)
    time.now += 0.5
    state = clock.state_dict()
    resumed = Clock()
    resumed.load_state_dict(state)
    time.now += 20  # between two attempts; it does not count
    resumed.begin()
    assert resumed.lap(50) == pytest.approx(100)
    assert resumed.average() == pytest.approx(100)


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    check_usable(tmp_path / "new" / "deep", resumes=False)
    check_usable(tmp_path, resumes=False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="already holds a run"):
        check_usable(tmp_path, resumes=False)
    check_usable(tmp_path, resumes=True)
    with pytest.raises(ConfigError, match="is a file"):
        check_usable(tmp_path / "config.json", resumes=True)
