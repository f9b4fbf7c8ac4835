"""The attempts of a run: attempts.jsonl has a line for each that has ended, status.json tells of the last one.

Rank 0 adds the line when its attempt ends. An attempt that could not say how it ended (SIGKILL of every process, a
power cut), or for which another rank spoke, has no line: the next attempt adds it, from what the files tell, and who
reads before that gets the same. Lines are numbered, so none is added twice. No torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from distkit.checkpoint.retention import list_checkpoints
from distkit.errors import ConfigError
from distkit.files import write_bytes

FILE = "attempts.jsonl"
TAIL_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run's processes until they ended.

    Attributes:
        attempt: its number, from 1.
        state: running, completed, preempted, failed, or killed: it ended without a word.
        hosts: the nodes of its ranks, as SLURM calls them, in the order of ranks; () where that is not known.
        job: SLURM's number of the job; None outside of one.
        ranks: how many.
        from_step: where it began; None when it failed in start-up.
        to_step: the last step that is known to be done.
        saved: step of the newest checkpoint when it ended; -1 without one.
        reason: how it ended, in a line.
        retryable: another attempt may do better; see `distkit.engine.endings.Cause`.
        cause: why it failed: rank, host, phase, step, what_happened, what_to_do.
        failed_on: the node of the cause's rank.
        exit_code: of the rank that was first; None for killed.
        began, ended: ISO 8601; for killed, `ended` is the last sign of life.
    """

    attempt: int
    state: str
    hosts: tuple[str, ...] = ()
    job: str | None = None
    ranks: int | None = None
    from_step: int | None = None
    to_step: int = 0
    saved: int = -1
    reason: str | None = None
    retryable: bool | None = None
    cause: Mapping[str, object] | None = None
    failed_on: str | None = None
    exit_code: int | None = None
    began: str | None = None
    ended: str | None = None

    @property
    def is_bad(self) -> bool:
        """True when it ended in a way that nobody wanted."""
        return self.state in ("failed", "killed")

    @property
    def failed_in(self) -> str | None:
        """`step 7`, `start-up`: where it failed; None where that is not known, or it has not failed."""
        if self.state != "failed" or self.cause is None:
            return None
        return "start-up" if self.cause.get("phase") == "start-up" else f"step {self.cause.get('step')}"


def read_attempts(run_dir: Path, *, running: bool = False) -> list[Attempt]:
    """The attempts of a run, in order; [] where there is none. What is no attempt in its files is left out.

    Args:
        run_dir: the run's directory.
        running: a process trains there. Without one an attempt that says so was killed.

    Raises:
        ConfigError: its checkpoints cannot be listed.
    """
    attempts = {attempt.attempt: attempt for attempt in map(_from_json, read_lines(run_dir / FILE)) if attempt}
    last = _last(run_dir, running=running)
    if last is not None:
        attempts.setdefault(last.attempt, last)
    return [attempts[number] for number in sorted(attempts)]


def last_number(run_dir: Path) -> int:
    """The number of the last attempt; 0 before the first one."""
    found = [_from_json(value) for value in (*read_lines(run_dir / FILE), read_status(run_dir))]
    return max((attempt.attempt for attempt in found if attempt is not None), default=0)


def append_ended(run_dir: Path) -> None:
    """Add the line of the attempt that status.json tells of, unless it is there; by the process that holds the lease.

    A reader sees the file without it or with it, never a half. That it cannot be written ends no run: the next attempt
    adds it.
    """
    try:
        last = _last(run_dir, running=False)
        lines = read_lines(run_dir / FILE)
        if last is None or any(line.get("attempt") == last.attempt for line in lines):
            return
        text = "".join(json.dumps(line) + "\n" for line in (*lines, asdict(last)))
        write_bytes(run_dir / FILE, text.encode())
    except (OSError, ConfigError) as error:
        print(f"distkit: warning: {run_dir / FILE} lacks this attempt for now: {error}", file=sys.stderr, flush=True)


def read_status(run_dir: Path) -> Mapping[str, object]:
    """What status.json says; {} where there is none, or it cannot be read."""
    return read_object(run_dir / "status.json")


def read_object(file: Path) -> Mapping[str, object]:
    """The JSON object in a file; {} where there is none, or it cannot be read."""
    try:
        # a FIFO would wait for its writer
        value = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(file: Path) -> list[dict[str, object]]:
    """The JSON objects in a file of lines; other lines are left out, and [] where it cannot be read."""
    values: list[dict[str, object]] = []
    with suppress(OSError):
        for line in file.read_bytes().splitlines() if file.is_file() else ():
            with suppress(ValueError, RecursionError):
                value = json.loads(line)
                if isinstance(value, dict):
                    values.append(value)
    return values


def last_step(run_dir: Path) -> int:
    """The last step that metrics.jsonl tells of; 0 where it tells of none."""
    steps, metrics = [0], run_dir / "metrics.jsonl"
    if not metrics.is_file():
        return 0
    with suppress(OSError), open(metrics, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in file.read().splitlines():
            with suppress(ValueError, RecursionError):
                value = json.loads(line)
                step = value.get("step") if isinstance(value, dict) else None
                steps += [step] if isinstance(step, int) else []
    return max(steps)


def last_seen(run_dir: Path) -> float | None:
    """When the run wrote something last, seconds since 1970."""
    times = []
    for name in ("status.json", "metrics.jsonl", "checkpoints"):
        with suppress(OSError):
            times.append((run_dir / name).stat().st_mtime)
    return max(times, default=None)


def clock_time(seconds: float | None = None) -> str:
    """ISO 8601, in local time; None stands for now."""
    moment = datetime.now() if seconds is None else datetime.fromtimestamp(seconds)
    return moment.astimezone().isoformat(timespec="seconds")


def _last(run_dir: Path, *, running: bool) -> Attempt | None:
    """The attempt that status.json tells of."""
    attempt = _from_json(read_status(run_dir))
    if attempt is None:
        return None
    steps = list_checkpoints(run_dir / "checkpoints")
    attempt = replace(attempt, saved=steps[-1] if steps else -1)
    if attempt.state != "running":
        return attempt
    attempt = replace(attempt, to_step=max(attempt.to_step, attempt.saved, last_step(run_dir)))
    if running:
        return attempt
    reason, seen = f"ended without a word after step {attempt.to_step}", last_seen(run_dir)
    ended = None if seen is None else clock_time(seen)
    return replace(attempt, state="killed", reason=reason, retryable=True, ended=ended)


def _from_json(value: Mapping[str, object]) -> Attempt | None:
    """An attempt, as a line or status.json has it; None for what is none. A value of another type counts as missing."""

    def get(name: str, kind: type) -> object:
        found = value.get(name)
        return found if isinstance(found, kind) and not (kind is int and isinstance(found, bool)) else None

    number, state = get("attempt", int), get("state", str)
    if number is None or state is None:
        return None
    kinds: dict[str, type] = {"job": str, "ranks": int, "from_step": int, "reason": str, "retryable": bool,
                              "cause": dict, "failed_on": str, "exit_code": int, "began": str,
                              "ended": str}  # fmt: skip
    saved, hosts = get("saved", int), get("hosts", list)
    return Attempt(
        attempt=number,  # type: ignore[arg-type]
        state=state,  # type: ignore[arg-type]
        hosts=tuple(map(str, hosts)) if isinstance(hosts, Sequence) else (),
        to_step=get("to_step", int) or get("step", int) or 0,  # type: ignore[arg-type]
        saved=-1 if saved is None else saved,  # type: ignore[arg-type]
        **{name: get(name, kind) for name, kind in kinds.items()},  # type: ignore[arg-type]
    )
