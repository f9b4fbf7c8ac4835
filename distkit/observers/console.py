"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere.

rich is imported only when a run starts on a terminal.
"""

# ruff: noqa: ARG002 (an observer ignores what it has no use for)
from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TextIO

from distkit.errors import printable
from distkit.observers.base import Event, Observer, RunInfo, Scalar

HIDDEN = frozenset({"event", "step", "samples", "data_wait_seconds"})
"""In every metrics.jsonl line, and too much for a screen."""


def build(_run_dir: Path) -> ConsoleObserver:
    """Progress on sys.stdout."""
    return ConsoleObserver()


class ConsoleObserver(Observer):
    """Shows a header of facts, train lines (or a bar), evaluations, notes, and at the very end how the run ended.

    A line that cannot be written (the reader is gone, the disk is full) is lost: metrics.jsonl has it, and a console
    never ends a run.
    Nothing is drawn between two events, and there is no thread.

    Args:
        file: where to write; None: the sys.stdout of the moment `start` is called.
        terminal: draw a bar; None: when `file` is a terminal that is not dumb.
        clock: seconds that only grow, for the time left.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._terminal = terminal
        self._clock = clock
        self._screen: Screen | None = None
        self._num_steps = 0
        self._started = (0, 0.0)

    def start(self, info: RunInfo, step: int) -> None:
        """Print the header."""
        file = sys.stdout if self._file is None else self._file
        terminal = self._terminal
        if terminal is None:
            terminal = file.isatty() and os.environ.get("TERM") != "dumb"
        self._screen = BarScreen(file, info.num_steps, step) if terminal else PlainScreen(file)
        self._num_steps = info.num_steps
        self._started = (step, self._clock())
        for line in header_lines(info, step):
            self._screen.print(line)

    def record(self, event: Event) -> None:
        """Show one event."""
        if self._screen is None:
            return
        step = event["step"]
        if event["event"] == "train" and isinstance(step, int):
            left = self._seconds_left(step)
            self._screen.train(step, train_line(event, self._num_steps, left), bar_text(event, left))
        else:
            self._screen.print(event_line(event, self._num_steps))

    def close(self, status: str, message: str) -> None:
        """Take the bar away and print how the run ended, as the last line."""
        if self._screen is None:
            return
        self._screen.finish()
        self._screen.print(f"{status}: {message}" if message else status)
        self._screen = None

    def _seconds_left(self, step: int) -> float | None:
        first_step, first_time = self._started
        if step <= first_step:
            return None
        return (self._clock() - first_time) / (step - first_step) * (self._num_steps - step)


class Screen(Protocol):
    """Where lines go."""

    def print(self, line: str) -> None:
        """Write a line that stays."""
        ...

    def train(self, step: int, line: str, bar: str) -> None:
        """Show a train event, given in both forms."""
        ...

    def finish(self) -> None:
        """No train event follows."""
        ...


class PlainScreen:
    """Writes each line to a file as it comes."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def print(self, line: str) -> None:
        """Write and flush a line."""
        with suppress(OSError, ValueError):
            self._file.write(encodable(line, self._file) + "\n")
            self._file.flush()

    def train(self, step: int, line: str, bar: str) -> None:
        """Write the line."""
        self.print(line)

    def finish(self) -> None:
        """Nothing to take away."""


class BarScreen:
    """A bar at the bottom of a terminal, lines above it."""

    def __init__(self, file: TextIO, num_steps: int, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._file = file
        self._console = Console(file=file, force_terminal=True, markup=False, highlight=False, emoji=False)
        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            auto_refresh=False,
            transient=True,
            expand=True,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=step)
        with suppress(OSError, ValueError):
            self._progress.start()

    def print(self, line: str) -> None:
        """Write a line above the bar."""
        with suppress(OSError, ValueError):
            self._console.print(encodable(line, self._file), soft_wrap=True)

    def train(self, step: int, line: str, bar: str) -> None:
        """Move the bar."""
        with suppress(OSError, ValueError):
            self._progress.update(self._task, completed=step, description=encodable(bar, self._file))
            self._progress.refresh()

    def finish(self) -> None:
        """Take the bar away and give the terminal its cursor back."""
        with suppress(OSError, ValueError):
            self._progress.stop()


def encodable(line: str, file: TextIO) -> str:
    """`line` made printable, with a question mark for each character that `file` has no code for."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return printable(line, keep="\n\t").encode(encoding, "replace").decode(encoding)


def header_lines(info: RunInfo, step: int) -> list[str]:
    """The lines before the first step."""
    width = max((len(name) for name in info.facts), default=0)
    lines = [f"{info.recipe}: {info.num_steps:,} steps in {info.run_dir}"]
    lines += [f"  {name:<{width}}  {value}" for name, value in info.facts.items()]
    if step:
        lines.append(f"resumed at step {step:,}")
    return lines


def train_line(event: Event, num_steps: int, seconds_left: float | None) -> str:
    """`step   200/1955  epoch 1.02  loss 1.4321  lr 0.0987  2,310 samples/s  eta 1:12`."""
    ahead = ("epoch", "loss", "lr")
    parts = [_place("step", event, num_steps)]
    parts += [_named(name, event[name]) for name in ahead if name in event]
    hidden = HIDDEN.union(ahead, ("samples_per_second",))
    parts += [_named(name, value) for name, value in event.items() if name not in hidden]
    if (speed := _speed(event)) is not None:
        parts.append(f"{speed:>17}")
    if seconds_left is not None:
        parts.append(f"eta {duration(seconds_left)}")
    return "  ".join(parts)


def bar_text(event: Event, seconds_left: float | None) -> str:
    """The text beside the bar: samples/s, loss, lr and the time left."""
    speed = _speed(event)
    parts = [] if speed is None else [speed]
    parts += [_named(name, event[name]).rstrip() for name in ("loss", "lr") if name in event]
    if seconds_left is not None:
        parts.append(f"eta {duration(seconds_left)}")
    return "  ".join(parts)


def event_line(event: Event, num_steps: int) -> str:
    """Any event but train: its kind, its place, its message, its values by name."""
    parts = [_place(str(event["event"]), event, num_steps)]
    if event.get("message") is not None:
        parts.append(str(event["message"]))
    parts += [_named(name, value) for name, value in event.items() if name not in HIDDEN and name != "message"]
    if event["event"] == "eval" and isinstance(samples := event.get("samples"), int | float):
        parts.append(f"({samples:,.0f} samples)")
    return "  ".join(parts).rstrip()


def duration(seconds: float) -> str:
    """72 -> "1:12", 3700 -> "1:01:40", 90000 -> "1 d 1:00:00"; seconds rounded up."""
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if not hours:
        return f"{minute}:{second:02}"
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def _place(kind: str, event: Event, num_steps: int) -> str:
    return f"{kind:<4} {event['step']!s:>{len(str(num_steps)) + 1}}/{num_steps}"


def _speed(event: Event) -> str | None:
    speed = event.get("samples_per_second")
    return f"{speed:,.0f} samples/s" if isinstance(speed, int | float) else None


def _named(name: str, value: Scalar) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{name} {value}"
    if name == "epoch":
        return f"epoch {value:.2f}"
    if name == "lr":
        # As wide as 9.87e-05, so that what follows stays in its column.
        return f"lr {value:<8.3g}"
    small = math.isfinite(value) and value != 0 and abs(value) < 1e-3
    return f"{name} {value:.3g}" if small or abs(value) >= 1e5 else f"{name} {value:.4f}"
