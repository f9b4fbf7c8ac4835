"""What the attempts of a run say about the next one: a verdict in a line, with what to do. Pure functions, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distkit.engine.attempts import LONGEST_REASON, Attempt
from distkit.errors import shorten

Kind = Literal[
    "not begun", "running", "finished", "goes on", "stopped", "same step", "one host", "no progress", "failed"
]

#: Attempts in a row that may be told to stop before they have saved anything: it is not the run's fault.
STOPS = 3


@dataclass(frozen=True)
class Verdict:
    """How a run stands, and what to do about it.

    Attributes:
        what: continues a sentence that begins with the run.
        remedy: what to do; "" for nothing.
        host: a node on which it failed each time that it ran there, unlike on others.
        goes_on: the same command may be started again without looking first.
    """

    kind: Kind
    what: str
    remedy: str = ""
    host: str | None = None
    goes_on: bool = False

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


def judge(attempts: Sequence[Attempt]) -> Verdict:
    """The verdict over a run's attempts, the last of which may still be running."""
    if not attempts:
        return Verdict("not begun", "was not begun yet")
    last = attempts[-1]
    if last.state == "running":
        return Verdict("running", f"is running{_where(last)}", "a file STOP in its directory stops and saves it")
    if last.state == "completed":
        return Verdict("finished", f"is finished, step {last.to_step}")
    if last.state == "preempted" and not last.retryable:
        return Verdict("stopped", "was stopped by its owner", continues(last))
    return _after_an_end(attempts)


def _after_an_end(attempts: Sequence[Attempt]) -> Verdict:
    last, stuck = attempts[-1], no_progress(attempts)
    times, (host, failures) = same_place(attempts), bad_host(attempts)
    also = f", {stuck}" if stuck else ""
    if times > 1 and last.failed_in != "start-up":
        what = f"fails each time in {last.failed_in} ({times} times){also}: {last.reason}"
        return Verdict("same step", what, f"look at the recipe and at the batch of {last.failed_in} first", host)
    if host is not None:
        what = f"fails each time on {host} ({failures} times){also}: {last.reason}"
        return Verdict("one host", what, f"leave it out: #SBATCH --exclude={host}", host,
                       goes_on=bool(last.retryable) and not stuck)  # fmt: skip
    if times > 1:
        what = f"fails each time in start-up ({times} times){also}: {last.reason}"
        return Verdict("failed", what, _todo(last))
    if not last.retryable:
        return Verdict("failed", ending(last), _todo(last))
    if stuck:
        return Verdict("no progress", f"makes no progress{also}: it {ending(last)}",
                       "a shorter --checkpoint.save-every, or more time for the job")  # fmt: skip
    return Verdict("goes on", "goes on", continues(last), goes_on=True)


def ending(attempt: Attempt) -> str:
    """How an attempt ended; continues a sentence that begins with the run."""
    if attempt.state == "killed":
        return "was killed"
    if attempt.state == "preempted":
        return f"was preempted at step {attempt.to_step} ({attempt.reason})"
    return f"{attempt.state} at step {attempt.to_step}" + (f": {attempt.reason}" if attempt.reason else "")


def continues(last: Attempt) -> str:
    """What the same command does next."""
    where = f"goes on from the checkpoint of step {last.saved}" if last.saved >= 0 else "begins again"
    return f"the same command {where}"


def no_progress(attempts: Sequence[Attempt]) -> str:
    """Says so when the last attempt, or the last ones that were told to stop, have saved nothing new; else ""."""
    in_vain = 0
    for attempt, before in zip(reversed(attempts), [*(a.saved for a in reversed(attempts[:-1])), -1], strict=True):
        if attempt.attempt == 1 or attempt.saved > before:
            break
        in_vain += 1
    if in_vain < (STOPS if attempts[-1].state == "preempted" else 1):
        return ""
    newest = f"the newest is that of step {attempts[-1].saved}" if attempts[-1].saved >= 0 else "there is none"
    since = "since the attempt before" if in_vain == 1 else f"in {in_vain} attempts"
    return f"without a new checkpoint {since}: {newest}"


def same_place(attempts: Sequence[Attempt]) -> int:
    """How many failures up to the last attempt were in the same step; preemptions in between do not count."""
    failures = [attempt.failed_in for attempt in attempts if attempt.is_bad]
    if not attempts[-1].is_bad or failures[-1] is None:
        return 0
    return next((i for i, where in enumerate(reversed(failures)) if where != failures[-1]), len(failures))


def bad_host(attempts: Sequence[Attempt]) -> tuple[str | None, int]:
    """The node on which the run failed each time that it ran there, and how often; None without another to compare."""
    host = _blamed(attempts[-1])
    here = [attempt for attempt in attempts if host in attempt.hosts]
    times = next((i for i, attempt in enumerate(reversed(here)) if _blamed(attempt) != host), len(here))
    others = {other for attempt in attempts for other in attempt.hosts} - {host}
    return (host, times) if times > 1 and others else (None, times)


def _blamed(attempt: Attempt) -> str | None:
    """The node to blame for a bad end: the first cause's, or the only one of an attempt that ended without a word."""
    if attempt.state == "killed" and len(attempt.hosts) == 1:
        return attempt.hosts[0]
    return attempt.failed_on if attempt.is_bad else None


def _todo(last: Attempt) -> str:
    todo = (last.cause or {}).get("what_to_do")
    return str(todo)[:LONGEST_REASON] if todo else f"after a fix {continues(last)}"


def _where(attempt: Attempt) -> str:
    job = f" in job {attempt.job}" if attempt.job else ""
    return f" on {shorten(attempt.hosts)}{job}" if attempt.hosts else job
