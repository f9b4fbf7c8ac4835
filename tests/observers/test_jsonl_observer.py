import json
import os
from pathlib import Path

import pytest

from distkit.errors import TrainingError
from distkit.observers import Event, JsonlObserver, RunInfo
from distkit.observers.jsonl import TAIL_BYTES


def info(run_dir: Path) -> RunInfo:
    return RunInfo(recipe="cifar10", run_dir=run_dir, num_steps=10, facts={})


def write(path: Path, *events: Event, step: int = 0) -> None:
    observer = JsonlObserver(path)
    observer.start(info(path.parent), step)
    for event in events:
        observer.record(event)
    observer.close("completed", "")


def test_lines_are_on_disk_at_once_and_exact(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    observer = JsonlObserver(path)
    observer.start(info(tmp_path), 0)
    event = {"event": "train", "step": 1, "loss": 0.1 + 0.2, "ok": True, "text": "ü\n", "none": None}
    observer.record(event)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [event]
    observer.close("completed", "")
    observer.close("completed", "")


def test_nonfinite_values_become_null_and_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, {"event": "train", "step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})

    def refuse(constant: str) -> None:
        raise AssertionError(f"not JSON: {constant}")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "event": "train",
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.1,
        "nonfinite": ["loss", "grad_norm"],
    }


@pytest.mark.parametrize("torn", [b"", b'{"event": "tr', b"x" * (3 * TAIL_BYTES + 5)])
def test_a_resumed_run_appends_after_the_last_whole_line(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, {"event": "train", "step": 1}, {"event": "train", "step": 2})
    with open(path, "ab") as file:
        file.write(torn)
    write(path, {"event": "train", "step": 3}, step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_file_of_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event"')
    write(path)
    assert path.read_bytes() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    observer = JsonlObserver(path)
    observer.start(info(tmp_path), 0)
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: No space left"):
        observer.record({"event": "train", "step": 1})
    observer.close("failed", "")


def test_a_path_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"gone/metrics\.jsonl"):
        write(tmp_path / "gone" / "metrics.jsonl")
