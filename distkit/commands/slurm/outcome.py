"""Whether a job goes on with its run, read from the run's directory: exit codes do not survive launchers."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

from distkit.checkpoint.retention import list_checkpoints
from distkit.engine.attempts import Attempt, last_number, object_in, read_attempts
from distkit.engine.verdict import ending, judge
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
    steps = list_checkpoints(run_dir / "checkpoints")
    return Before(last_number(run_dir), steps[-1] if steps else -1)


def decide(
    run_dir: Path,
    before: Before,
    *,
    job: str | None,
    num_requeues: int,
    max_requeues: int,
    told: str = "",
    killed: bool = False,
) -> Decision:
    """Whether a job, or a launcher on one machine, whose ranks have ended, goes on with its run.

    Args:
        run_dir: the run's directory.
        before: what `read_before` said when the job began.
        job: SLURM_JOB_ID; None outside of one.
        num_requeues: how often the job was requeued, or the ranks were started again, so far.
        max_requeues: at most.
        told: the signal that told the batch script to stop, if any.
        killed: the first rank that ended was killed.

    Raises:
        ConfigError: the run's files cannot be read.
    """
    attempts, now = read_attempts(run_dir), read_before(run_dir)
    last = attempts[-1] if attempts else None
    if last is not None and last.state == "completed":
        return Decision(DONE, f"{run_dir} is completed, step {last.to_step}")
    if last is None or last.attempt <= before.attempt:
        if told:
            return _go_on(run_dir, f"was not begun yet when {told} came", now, num_requeues, max_requeues)
        if killed:
            return _go_on(run_dir, "was not begun yet when a rank was killed", now, num_requeues, max_requeues)
        return Decision(FAILED, f"{run_dir} was not begun by this job: its output says why")
    if job is not None and last.job is not None and last.job != job:
        return Decision(FAILED, f"{run_dir} is the business of job {last.job} by now")
    holder = object_in(run_dir / "lease.json").get("job", job)
    if last.state == "killed" and holder != job:
        return Decision(FAILED, f"{run_dir} is running in job {holder}")
    if before.attempt and len(attempts) == 1:  # its line was lost; what the batch script noted was not
        attempts.insert(0, Attempt(attempt=before.attempt, state="unknown", saved=before.step))
    verdict = judge(attempts)
    if verdict.kind == "stopped":
        return Decision(DONE, f"{run_dir} {ending(last)}")
    if not verdict.goes_on:
        return Decision(FAILED, f"{run_dir} {verdict}")
    decision = _go_on(run_dir, ending(last), now, num_requeues, max_requeues)
    if verdict.host is None:
        return decision
    return replace(decision, why=f"{decision.why}; it fails each time on {verdict.host}: {verdict.remedy}")


def _go_on(run_dir: Path, what: str, now: Before, num_requeues: int, max_requeues: int) -> Decision:
    """Once more, unless the limit is reached."""
    if num_requeues >= max_requeues:
        return Decision(FAILED, f"{run_dir} {what}, and it was started again {num_requeues} times: not again")
    where = f"it goes on from the checkpoint of step {now.step}" if now.step >= 0 else "it begins again"
    return Decision(GO_ON, f"{run_dir} {what}: {where}")
