"""The attempts of a run: attempts.jsonl has a line for each that has ended, status.json tells of the last one.

Rank 0 adds the line when its attempt ends. An attempt that could not say how it ended (SIGKILL of every process, a
power cut), or for which another rank spoke, has no line: the next attempt adds it, from what the files tell, and who
reads before that gets the same. Lines are numbered, so none is added twice. No torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from distkit.checkpoint.retention import list_checkpoints
from distkit.errors import ConfigError, say
from distkit.files import read_regular, write_bytes
from distkit.json_files import (
    MAX_BYTES,
    JsonError,
    Kind,
    a_count,
    a_flag,
    a_text,
    an_object,
    is_count,
    known,
    list_of,
    optional,
    parse_lines,
    read_object,
    refuse,
)

FILE = "attempts.jsonl"
TAIL_BYTES = 65536
#: Larger numbers of attempts, and longer names of jobs, are nobody's.
MAX_ATTEMPT = 2**31
LONGEST_REASON = 2000
_JOB = re.compile("[0-9A-Za-z_.+-]{1,64}")


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
        lines = _read_lines(run_dir / FILE)
        if last is None or any(line.get("attempt") == last.attempt for line in lines):
            return
        text = "".join(json.dumps(line) + "\n" for line in (*lines, asdict(last)))
        write_bytes(run_dir / FILE, text.encode())
    except (OSError, ConfigError) as error:
        say(f"distkit: warning: {run_dir / FILE} lacks this attempt for now: {error}")


def read_status(run_dir: Path) -> dict[str, object]:
    """What status.json says, as far as it is what a run writes; {} where there is none, or it cannot be read."""
    return known(object_in(run_dir / "status.json"), KINDS)


def object_in(file: Path) -> dict[str, object]:
    """The JSON object in a file; {} where there is none, or it cannot be read."""
    try:
        return read_object(file)
    except (OSError, JsonError):
        return {}


def read_lines(file: Path) -> list[dict[str, object]]:
    """The JSON objects in a file of lines; other lines are left out, and [] where it cannot be read."""
    try:
        return _read_lines(file)
    except OSError:
        return []


def _read_lines(file: Path) -> list[dict[str, object]]:
    return list(parse_lines(read_regular(file, MAX_BYTES))) if os.path.lexists(file) else []


def last_step(run_dir: Path) -> int:
    """The last step that metrics.jsonl tells of; 0 where it tells of none."""
    steps, metrics = [0], run_dir / "metrics.jsonl"
    if not metrics.is_file():
        return 0
    with suppress(OSError), open(metrics, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in file.read().splitlines():
            steps += [cast(int, step) for value in parse_lines(line) if is_count(step := value.get("step"))]
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
    moment = datetime.now()
    with suppress(ValueError, OverflowError, OSError):  # a file may have been given any time
        moment = moment if seconds is None else datetime.fromtimestamp(seconds)
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
    kept = known(value, KINDS)
    if not {"attempt", "state"} <= kept.keys():
        return None
    names = {field.name for field in fields(Attempt)}
    found: dict[str, Any] = {name: kept[name] for name in names & kept.keys()}
    found["hosts"] = tuple(found.get("hosts", ()))
    found["reason"] = found["reason"][:LONGEST_REASON] if found.get("reason") else None
    return Attempt(**{"to_step": kept.get("step", 0), **found})


def _attempt(value: object) -> None:
    a_count(value)
    if cast(int, value) > MAX_ATTEMPT:
        refuse(value, "the number of an attempt")


def _saved(value: object) -> None:
    if value != -1:
        a_count(value)


def _exit_code(value: object) -> None:
    if type(value) is not int or abs(value) > 255:
        refuse(value, "an exit code")


def a_job(value: object) -> None:
    """A number of a job, as SLURM gives it."""
    if not (isinstance(value, str) and _JOB.fullmatch(value)):
        refuse(value, "a job")


#: What status.json and the lines of attempts.jsonl say.
KINDS: Mapping[str, Kind] = {
    "attempt": _attempt, "state": a_text, "hosts": list_of(a_text), "job": optional(a_job), "ranks": optional(a_count),
    "num_steps": optional(a_count), "from_step": optional(a_count), "to_step": a_count, "step": a_count,
    "saved": _saved, "reason": optional(a_text), "retryable": optional(a_flag), "cause": optional(an_object),
    "failed_on": optional(a_text), "exit_code": optional(_exit_code), "began": optional(a_text),
    "ended": optional(a_text),
}  # fmt: skip
