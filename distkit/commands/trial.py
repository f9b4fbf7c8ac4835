"""Runs of a user's recipe that a command starts on this machine to prove something: started, waited for, compared."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distkit.config.check import flag
from distkit.engine.attempts import object_in
from distkit.errors import MASK, ConfigError, DistkitError, TrainingError
from distkit.runtime.faults import VARIABLE
from distkit.runtime.local_ranks import die_with_parent, free_port, rank_environment, without_launcher
from distkit.runtime.signals import STOPPING

#: Fields of an event that tell time, and so differ between any two runs.
TIMED = frozenset({"samples_per_second", "data_wait_seconds", "seconds", "mfu"})
POLL_SECONDS = 0.05


def nothing() -> None:
    """Nobody wants to look."""


@dataclass(frozen=True)
class Ended:
    """How the ranks of a run ended: exit codes (negative: killed by that signal) and seconds since their start.

    Attributes:
        hung: ranks that had to be killed, because they did not end in time.
    """

    codes: list[int]
    seconds: float
    hung: list[int]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs of one recipe under one folder, beside each other.

    Args:
        recipe: the recipe's file.
        flags: more flags for it; they win over those of the command.
        nproc: ranks on this machine, >= 1.
        folder: where the runs and their output are written.
    """

    recipe: Path
    flags: Sequence[str]
    nproc: int
    folder: Path

    def __post_init__(self) -> None:
        if not self.recipe.is_file():
            raise ConfigError(f"there is no recipe {self.recipe}", expected="a Python file", got=self.recipe,
                              fix="recipes/cifar10.py")  # fmt: skip
        if self.nproc < 1:
            raise ConfigError("--nproc is the number of ranks", expected="1 or more", got=self.nproc, fix="--nproc 2")

    def run(
        self,
        name: str,
        own_flags: Sequence[str],
        fault: str = "",
        *,
        timeout: float | None = None,
        patience: float | None = None,
        look: Callable[[], object] = nothing,
    ) -> Ended:
        """Start the ranks of run `name` and wait for them. No process is left, whatever happens.

        Args:
            name: the run's directory under the folder.
            own_flags: for the recipe, before those of the user.
            fault: DISTKIT_FAULT of all ranks.
            timeout: seconds after which ranks that still run are killed; None: never.
            patience: the same after the first one that failed.
            look: called while the ranks run, a few times a second.
        """
        with _interrupts.held():
            return self._run(name, own_flags, fault, timeout, patience, look)

    def _run(
        self,
        name: str,
        own_flags: Sequence[str],
        fault: str,
        timeout: float | None,
        patience: float | None,
        look: Callable[[], object],
    ) -> Ended:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(self.recipe), *own_flags, *self.flags, "--run-dir", str(self.folder / name)]
        processes: list[subprocess.Popen[bytes]] = []
        begin, port = time.monotonic(), free_port()
        end = float("inf") if timeout is None else begin + timeout
        try:
            for rank in range(self.nproc):
                env = {**without_launcher(os.environ), **rank_environment(rank, self.nproc, port), VARIABLE: fault}
                with open(self.log(name, rank), "ab") as log:
                    # a session of its own: it can be ended with all that it started
                    processes.append(subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log,
                                                      stderr=log, start_new_session=True,
                                                      preexec_fn=partial(die_with_parent, os.getpid())))  # fmt: skip
            while any(process.poll() is None for process in processes) and time.monotonic() < end:
                if _interrupts.came:
                    break
                look()
                if patience is not None and any(process.poll() not in (None, 0) for process in processes):
                    end, patience = min(end, time.monotonic() + patience), None
                time.sleep(POLL_SECONDS)
            hung = [rank for rank, process in enumerate(processes) if process.poll() is None]
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return Ended([process.returncode for process in processes], time.monotonic() - begin, hung)

    def log(self, name: str, rank: int) -> Path:
        """What a rank of run `name` has printed."""
        return self.folder / f"{name}-rank{rank}.log"

    def last_words(self, name: str, rank: int, limit: int = 6) -> list[str]:
        """The last lines of that."""
        return self.log(name, rank).read_text(errors="replace").splitlines()[-limit:]

    def failure(self, name: str, ended: Ended) -> DistkitError:
        """The error for a run that should not have failed: ConfigError where a rank refused its command line."""
        rank = next(rank for rank, code in enumerate(ended.codes) if code != 0)
        kind = ConfigError if ended.codes[rank] == ConfigError.exit_code else TrainingError
        words = self.last_words(name, rank)
        return kind("\n".join([f"rank {rank} of the {name} run ended with {ended.codes[rank]}:", *words]))


def compare_metrics(straight: Path, resumed: Path) -> list[str]:
    """The first train or eval line that differs, times aside."""
    first, second = list(metric_lines(straight)), list(metric_lines(resumed))
    for one, other in zip(first, second, strict=False):
        if one != other:
            names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
            shown = ", ".join(f"{name} {one.get(name)!r} and {other.get(name)!r}" for name in names[:3])
            return [f"step {one['step']}: the first metric line that differs ({one['event']}): {shown}"]
    if len(first) != len(second):
        return [f"{len(first)} metric lines in the uninterrupted run, {len(second)} in the resumed one"]
    return []


def metric_lines(run_dir: Path) -> Iterator[dict[str, object]]:
    """Train and eval events without what tells time."""
    for event in events(run_dir):
        if event["event"] in ("train", "eval"):
            yield {name: value for name, value in event.items() if name not in TIMED}


def events(run_dir: Path) -> Iterator[dict[str, object]]:
    """What a run has written into metrics.jsonl; a last line that is not complete does not count."""
    file = run_dir / "metrics.jsonl"
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else ():
        if line.endswith(b"\n"):
            yield json.loads(line)


def without_secrets(flags: Sequence[str], run_dir: Path) -> list[str]:
    """`flags` to be shown: `<secret>` in place of the values that config.json of a run does not hold either.

    Where it cannot be read, no value is shown.
    """

    def secret(section: Mapping[str, object], prefix: str) -> Iterator[str]:
        for name, value in section.items():
            if isinstance(value, dict):
                yield from secret(value, f"{prefix}{name}.")
            elif value == MASK or (isinstance(value, list) and MASK in value):
                yield flag(prefix + name)

    config = object_in(run_dir / "config.json")
    hidden, shown, hides = set(secret(config, "")), list[str](), not config
    for word in flags:
        name, equals, _ = word.partition("=")
        if name.startswith("--"):
            hides = not config or name.replace("_", "-") in hidden
            shown.append(f"{name}={MASK}" if hides and equals else word)
        else:
            shown.append(MASK if hides else word)
    return shown


class Interrupts:
    """Signals that end a command: at once, or while ranks are started and ended, when they have been.

    An exception in the middle of that would leave some of them behind.
    """

    def __init__(self) -> None:
        self.came = False
        self._holds = False

    def handle(self, _number: int, _frame: object) -> None:
        """The handler."""
        if not self._holds:
            raise KeyboardInterrupt
        self.came = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a signal sets `came` and nothing else; the block raises KeyboardInterrupt for it when it ends."""
        self._holds, self.came = True, False
        try:
            yield
        finally:
            self._holds = False
        if self.came:
            raise KeyboardInterrupt


_interrupts = Interrupts()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a signal that asks for a stop raises KeyboardInterrupt, and no rank is left.

    One that was ignored (SIGHUP under nohup) still is, but not by what is started here.
    """
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        signal.signal(number, _do_nothing if handler == signal.SIG_IGN else _interrupts.handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _do_nothing(_number: int, _frame: object) -> None:
    """Unlike SIG_IGN, this is not inherited."""
