import errno
import io
import json
import os
import random
import stat
import tracemalloc
from pathlib import Path

import pytest

from distkit.errors import TrainingError
from distkit.observers import Event, RunInfo, jsonl
from distkit.observers.jsonl import TAIL_BYTES, JsonlObserver, cut_back


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


def train(*steps: int) -> str:
    return "".join(json.dumps({"event": "train", "step": step, "loss": 1 / (step + 1)}) + "\n" for step in steps)


SAVED_LATE = json.dumps({"event": "checkpoint", "step": 4}) + "\n"


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        (train(1, 2, 3, 4), 4, train(1, 2, 3, 4)),
        (train(1, 2, 3, 4), 2, train(1, 2)),
        (train(1, 2), 0, ""),
        (train(0, 1, 0, 2), 0, train(0, 0)),
        (train(3, 4, 5) + SAVED_LATE + train(6), 4, train(3, 4) + SAVED_LATE),
        (train(3, 4, 5) + SAVED_LATE + train(6), 3, train(3)),
        (train(1, 2, 3, 2, 3), 2, train(1, 2, 2)),
        ('{"event": "note"}\n\nwords\n' + train(1, 9) + '{"event": "note"}\n', 1,
         '{"event": "note"}\n\nwords\n' + train(1) + '{"event": "note"}\n'),
        (train(1) + "words\n\n", 1, train(1)),
        (train(1) + "words\n" + train(2), 1, train(1)),
        (train(1) + "words\n" + train(2) + "\x00" * 50, 1, train(1)),
        (train(1, 9, 1) + "words\n" + train(9), 1, train(1, 1)),
        ("words\n" * 3, 5, ""),
    ],
)  # fmt: skip
def test_later_steps_and_what_is_broken_at_the_end_go(tmp_path: Path, before: str, step: int, after: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(before)
    cut_back(path, step)
    assert path.read_text() == after
    cut_back(path, step)
    assert path.read_text() == after
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("line", "goes"),
    [
        ('{"step":6}', True),
        ('{"a": "\\"step\\": 9", "step" : 6.0}', True),
        ('{"a": "\\"step\\": 9", "step": 5}', False),
        ('{"step": 6e0, "a": "ü"}', True),
        ('{"step": -6}', False),
        ('{"step": true}', False),
        ('{"step": "6"}', False),
        ('{"step": null}', False),
        ('{"inner": {"step": 6}}', False),
        ('[{"step": 6}]', False),
        ('{"steps": 6}', False),
        ('{"step": 6', False),
        ('{"step": 6}\r', True),
    ],
)
def test_only_a_number_called_step_counts(tmp_path: Path, line: str, goes: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((line + "\n" + train(1)).encode())
    cut_back(path, 5)
    assert path.read_bytes().decode() == ("" if goes else line + "\n") + train(1)


@pytest.mark.parametrize("seed", range(12))
def test_it_keeps_what_a_plain_filter_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", draw.choice([1, 64, 500]))
    monkeypatch.setattr(jsonl, "TAIL_BYTES", draw.choice([1, 7, 64]))
    steps = [max(0, number // 2 + draw.choice([0, 0, 0, -7])) for number in range(120)]
    lines = [train(step) if draw.random() < 0.9 else draw.choice(["\n", "words\n", '{"a": 1}\n']) for step in steps]
    path, limit = tmp_path / "metrics.jsonl", draw.randrange(70)
    path.write_text("".join(lines) + '{"step"')
    cut_back(path, limit)

    def parsed(line: str) -> object:
        return json.loads(line) if line.startswith("{") else None

    def stays(line: str) -> bool:
        event = parsed(line)
        return not isinstance(event, dict) or event.get("step", 0) <= limit

    kept = [line for line in lines if stays(line)]
    while kept and parsed(kept[-1]) is None:
        kept.pop()
    assert path.read_text() == "".join(kept)


def test_nothing_is_written_when_nothing_must_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(train(*range(1000)))
    os.utime(path, (1, 1))
    before = path.stat()
    cut_back(path, 999)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_file_written_anew_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(train(1, 3, 2))
    path.chmod(0o640)
    write(path, {"event": "train", "step": 3}, step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_not_followed_and_a_fifo_not_waited_for(tmp_path: Path) -> None:
    real, path = tmp_path / "real.jsonl", tmp_path / "metrics.jsonl"
    real.write_text(train(1, 3))
    for target in (real, tmp_path / "nothing"):
        path.symlink_to(target)
        with pytest.raises(TrainingError, match="is a symbolic link"):
            write(path, {"event": "train", "step": 3}, step=2)
        path.unlink()
    assert real.read_text() == train(1, 3)
    os.mkfifo(path)
    with pytest.raises(TrainingError, match="is not a regular file"):
        write(path, {"event": "train", "step": 3}, step=2)


def test_lines_without_an_end_and_files_without_bounds(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(train(1, 3).encode() + b"x" * 3_000_000 + train(2).encode() + bytes(2_000_000))
    cut_back(path, 1)
    assert path.read_bytes() == train(1).encode()
    os.truncate(path, 2**40)
    with pytest.raises(OSError, match="more than"):
        cut_back(path, 1)


def test_a_kill_or_a_full_disk_while_writing_anew_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(train(1, 3, 2))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(TrainingError, match=r"metrics\.jsonl: No space left"):
            write(path, step=2)
    assert path.read_text() == train(1, 3, 2)
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / ".tmp-metrics.jsonl-0123abcd").write_text(train(*range(99)))  # of a run that was killed here
    write(path, step=2)
    assert path.read_text() == train(1, 2)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("late", ["", SAVED_LATE])
def test_a_large_file_costs_little_memory(tmp_path: Path, late: str) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = {step: json.dumps({"event": "train", "step": step, "text": "x" * 2000}) + "\n" for step in (4, 5)}
    kept, gone = lines[4] * 8_000, lines[5] * 4_000
    path.write_text(kept + gone + late)
    tracemalloc.start()
    cut_back(path, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * jsonl.BLOCK_BYTES < len(kept) / 3
    assert path.stat().st_size == len(kept) + len(late)


def test_a_file_of_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event"')
    write(path)
    assert path.read_bytes() == b""


def test_lines_wait_for_room_on_a_full_disk(tmp_path: Path) -> None:
    observer = JsonlObserver(tmp_path / "metrics.jsonl")
    observer.start(info(tmp_path), 0)
    full = [True]

    class Disk(io.FileIO):
        def write(self, data: bytearray) -> int:  # type: ignore[override]
            if full[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:7])

    assert observer._file is not None
    observer._file.close()
    observer._file = Disk(tmp_path / "metrics.jsonl", "ab")
    for step in (1, 2):
        observer.record({"event": "train", "step": step})
    full[0] = False
    observer.record({"event": "train", "step": 3})
    observer.close("completed", "")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_stays_full_is_not_silent(tmp_path: Path) -> None:
    observer = JsonlObserver(tmp_path / "metrics.jsonl")
    observer.start(info(tmp_path), 0)
    assert observer._file is not None
    observer._file.close()
    observer._file = io.FileIO("/dev/full", "ab")
    observer.record({"event": "train", "step": 1})
    with pytest.raises(TrainingError, match="No space left"):
        observer.close("completed", "")


def test_going_back_removes_what_came_after_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    observer = JsonlObserver(path)
    observer.start(info(tmp_path), 0)
    for step in (1, 2, 3):
        observer.record({"event": "train", "step": step})
    observer.go_back(1)
    observer.record({"event": "train", "step": 2, "again": True})
    observer.close("completed", "")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"event": "train", "step": 1},
        {"event": "train", "step": 2, "again": True},
    ]
