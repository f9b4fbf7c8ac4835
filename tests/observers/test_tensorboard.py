import warnings
from pathlib import Path

import pytest

from distkit.observers import RunInfo
from distkit.observers.tensorboard import TensorboardObserver

pytest.importorskip("tensorboard")


def run(log_dir: Path, start: int, stop: int) -> None:
    observer = TensorboardObserver(log_dir)
    observer.start(RunInfo(recipe="cifar10", run_dir=log_dir, num_steps=10, facts={}), start)
    for step in range(start + 1, stop + 1):
        observer.record({"event": "train", "step": step, "loss": 1 / step, "ok": True, "name": "x"})
    observer.record({"event": "eval", "step": stop, "accuracy": 0.5})
    observer.record({"event": "note", "step": stop, "message": "hello"})
    observer.close("completed", "")


def curves(log_dir: Path) -> dict[str, list[tuple[int, float]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    reader = EventAccumulator(str(log_dir))
    reader.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_numbers_of_train_and_eval_lie_at_their_steps(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    assert curves(tmp_path) == {"train/loss": [(1, 1.0), (2, 0.5), (3, 0.3333)], "eval/accuracy": [(3, 0.5)]}


def test_a_resumed_run_hides_what_was_written_after_its_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, 0, 4)
    run(tmp_path, 2, 3)
    assert curves(tmp_path)["train/loss"] == [(1, 1.0), (2, 0.5), (3, 0.3333)]


def test_a_run_that_begins_again_hides_all_of_the_attempt_before(tmp_path: Path) -> None:
    run(tmp_path, 0, 4)
    run(tmp_path, 0, 2)
    assert curves(tmp_path)["train/loss"] == [(1, 1.0), (2, 0.5)]


def test_going_back_hides_what_came_after(tmp_path: Path) -> None:
    observer = TensorboardObserver(tmp_path)
    observer.start(RunInfo(recipe="cifar10", run_dir=tmp_path, num_steps=10, facts={}), 0)
    for step in (1, 2, 3, 4):
        observer.record({"event": "train", "step": step, "loss": float(step)})
    observer.go_back(2)
    observer.record({"event": "train", "step": 3, "loss": 9.0})
    observer.close("completed", "")
    assert curves(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 9.0)]
