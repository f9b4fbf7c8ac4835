"""Whether a job goes on with its run, read from the run's directory: exit codes do not survive launchers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distkit.checkpoint.retention import list_checkpoints
from distkit.commands.show import read_json
from distkit.errors import Stopped

DONE, FAILED, GO_ON = 0, 1, Stopped.exit_code


@dataclass(frozen=True)
class Before:
    """How a run stood when its job began: its last attempt and newest checkpoint; 0 and -1 where there were none."""

    attempt: int = 0
    step: int = -1

    @classmethod
    def parse(cls, text: str) -> Before:
        """3:1500, as `str` gives it."""
        found = re.fullmatch(r"(\d+):(-1|\d+)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text} is not ATTEMPT:STEP")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.attempt}:{self.step}"


@dataclass(frozen=True)
class Decision:
    """0 when nothing is left to do, 75 to go on, 1 not to; and why, in a line."""

    exit_code: int
    why: str


def read_before(run_dir: Path) -> Before:
    """How the run in `run_dir` stands; there may be none.

    Raises:
        ConfigError: its files cannot be read.
    """
    attempt = (read_json(run_dir / "status.json") or {}).get("attempt")
    steps = list_checkpoints(run_dir / "checkpoints")
    return Before(attempt if isinstance(attempt, int) else 0, steps[-1] if steps else -1)


def decide(
    run_dir: Path, before: Before, *, job: str | None, num_requeues: int, max_requeues: int, told: str = ""
) -> Decision:
    """Whether a job, or a launcher on one machine, whose ranks have ended, goes on with its run.

    Args:
        run_dir: the run's directory.
        before: what `read_before` said when the job began.
        job: SLURM_JOB_ID; None outside of one.
        num_requeues: how often the job was requeued, or the ranks were started again, so far.
        max_requeues: at most.
        told: the signal that told the batch script to stop, if any.

    Raises:
        ConfigError: the run's files cannot be read.
    """
    status = read_json(run_dir / "status.json") or {}
    state, step, now = status.get("state"), status.get("step"), read_before(run_dir)
    if state == "completed":
        return Decision(DONE, f"{run_dir} is completed, step {step}")
    begun = now.attempt > before.attempt
    what, code = _ending(status, begun, job, run_dir, told)
    if code != GO_ON:
        return Decision(code, f"{run_dir} {what}")
    if num_requeues >= max_requeues:
        return Decision(FAILED, f"{run_dir} {what}, and it was started again {num_requeues} times: not again")
    if begun and before.attempt and now.step <= before.step:
        where = f"the newest is that of step {now.step}" if now.step >= 0 else "there is none"
        return Decision(FAILED, f"{run_dir} {what}, without a new checkpoint since the attempt before: {where}")
    where = f"it goes on from the checkpoint of step {now.step}" if now.step >= 0 else "it begins again"
    return Decision(GO_ON, f"{run_dir} {what}: {where}")


def _ending(status: Mapping[str, object], begun: bool, job: str | None, run_dir: Path, told: str) -> tuple[str, int]:
    """How the attempt ended, and whether another one can do better."""
    state, step, reason = status.get("state"), status.get("step"), str(status.get("reason"))
    if not begun:
        unbegun = (f"was not begun yet when {told} came", GO_ON)
        return unbegun if told else ("was not begun by this job: its output says why", FAILED)
    retryable = status.get("retryable") is True
    if state == "preempted":
        return f"was preempted at step {step} ({reason})", GO_ON if retryable else DONE
    if state == "running":
        holder = (read_json(run_dir / "lease.json") or {}).get("job", job)
        return ("was killed", GO_ON) if holder == job else (f"is running in job {holder}", FAILED)
    return f"failed at step {step}: {reason}", GO_ON if retryable else FAILED
