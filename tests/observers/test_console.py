import io
import os
import sys
from pathlib import Path

import pytest

from distkit.observers import RunInfo
from distkit.observers.console import ConsoleObserver, duration, event_line, train_line

INFO = RunInfo(
    recipe="cifar10", run_dir=Path("runs/a"), num_steps=1955, facts={"device": "cpu (1)", "precision": "fp32"}
)
TRAIN = {
    "event": "train",
    "step": 200,
    "epoch": 1.02,
    "loss": 1.43214,
    "lr": 0.0987,
    "samples": 6400,
    "samples_per_second": 2310.4,
    "data_wait_seconds": 0.1,
}
EVAL = {"event": "eval", "step": 200, "loss": 0.9, "samples": 10_000, "accuracy": 0.9512}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_output_line_by_line() -> None:
    file, clock = io.StringIO(), Clock()
    console = ConsoleObserver(file, clock=clock)
    console.start(INFO, 0)
    clock.now = 20.0
    console.record(TRAIN)
    console.record(EVAL)
    console.record({"event": "note", "step": 200, "message": "skipped [3] updates"})
    console.record({"event": "checkpoint", "step": 200, "seconds": 0.25})
    console.close("failed", "rank 1: loss is NaN")
    assert file.getvalue().splitlines() == [
        "cifar10: 1,955 steps in runs/a",
        "  device     cpu (1)",
        "  precision  fp32",
        "step   200/1955  epoch 1.02  loss 1.4321  lr 0.0987      2,310 samples/s  eta 2:56",
        "eval   200/1955  loss 0.9000  accuracy 0.9512  (10,000 samples)",
        "note   200/1955  skipped [3] updates",
        "checkpoint   200/1955  seconds 0.2500",
        "failed: rank 1: loss is NaN",
    ]


def test_train_lines_align() -> None:
    small = {**TRAIN, "step": 50, "lr": 9.87e-5, "samples_per_second": 98.0}
    large = {**TRAIN, "step": 1950, "lr": 0.1, "samples_per_second": 123456.0}
    one, two = train_line(small, 1955, 3.0), train_line(large, 1955, 3.0)
    assert len(one) == len(two)
    assert one.index("samples/s") == two.index("samples/s")


def test_extra_values_are_shown_by_name() -> None:
    line = train_line({**TRAIN, "grad_norm": 0.5, "accuracy": float("nan"), "tiny": 2e-7}, 1955, None)
    assert "grad_norm 0.5000" in line
    assert "accuracy nan" in line
    assert "tiny 2e-07" in line
    assert "eta" not in line
    assert event_line({"event": "resume", "step": 5, "from": "step-5", "ok": True}, 10).endswith("from step-5  ok True")


def test_time_left_counts_from_the_step_resumed_at() -> None:
    file, clock = io.StringIO(), Clock()
    console = ConsoleObserver(file, clock=clock)
    console.start(INFO, 1755)
    clock.now = 10.0
    console.record({**TRAIN, "step": 1855})
    out = file.getvalue()
    assert "resumed at step 1,755" in out
    assert "eta 0:10" in out


def test_durations() -> None:
    assert [duration(s) for s in (0, 0.2, 72, 3700, 90_000)] == ["0:00", "0:01", "1:12", "1:01:40", "1 d 1:00:00"]


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    file, clock = io.StringIO(), Clock()
    console = ConsoleObserver(file, terminal=True, clock=clock)
    console.start(INFO, 0)
    clock.now = 20.0
    console.record(TRAIN)
    bar = file.getvalue()
    assert "\x1b[" in bar
    assert "200/1955" in bar
    assert "2,310 samples/s  loss 1.4321  lr 0.0987  eta 2:56" in bar
    assert "step   200/1955" not in bar
    console.record(EVAL)
    assert "accuracy 0.9512  (10,000 samples)" in file.getvalue()
    console.close("completed", "done [100 %]")
    assert file.getvalue().endswith("completed: done [100 %]\n")
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals")
def test_terminals_are_recognised_and_a_dumb_one_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for term, has_codes in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", term)
        controller, device = os.openpty()
        try:
            with open(device, "w") as file:
                console = ConsoleObserver(file)
                console.start(INFO, 0)
                console.record(TRAIN)
                console.close("completed", "")
                got = os.read(controller, 65536)
        finally:
            os.close(controller)
        assert (b"\x1b[" in got) is has_codes


def test_stdout_is_restored_after_the_bar() -> None:
    before = sys.stdout, sys.stderr
    console = ConsoleObserver(io.StringIO(), terminal=True)
    console.start(INFO, 0)
    console.close("completed", "")
    assert (sys.stdout, sys.stderr) == before


def test_a_console_that_cannot_be_written_does_not_end_the_run() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    before = sys.stdout, sys.stderr
    for terminal in (False, True):
        console = ConsoleObserver(Full(), terminal=terminal)
        console.start(INFO, 0)
        console.record(TRAIN)
        console.record(EVAL)
        console.close("completed", "")
    assert (sys.stdout, sys.stderr) == before


def test_characters_that_the_stream_has_no_code_for() -> None:
    raw = io.BytesIO()
    console = ConsoleObserver(io.TextIOWrapper(raw, encoding="ascii"))
    console.start(INFO, 0)
    console.record({"event": "note", "step": 1, "message": "Grüße"})
    assert b"Gr??e" in raw.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_no_name_and_no_value_reaches_the_terminal_as_it_is(terminal: bool) -> None:
    file = io.StringIO()
    console = ConsoleObserver(file, terminal=terminal)
    ugly = "\x1b]0;title\x07 \u202eback \ud800"
    console.start(RunInfo(recipe=ugly, run_dir=Path("runs/a"), num_steps=9, facts={"classes": ugly}), 0)
    console.record({**TRAIN, "loss": ugly, "step": 3})
    console.record({"event": "note", "step": 3, "message": ugly})
    console.close("failed", ugly)
    assert not any(each in file.getvalue() for each in ("\x1b]", "\x07", "\u202e", "\ud800"))
    assert r"\x1b]0;title\x07 \u202eback \ud800" in file.getvalue()


def test_close_without_start_says_nothing() -> None:
    file = io.StringIO()
    ConsoleObserver(file).close("failed", "before the start")
    assert file.getvalue() == ""
