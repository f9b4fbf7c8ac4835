"""How a run stops on purpose (C6): at one step boundary of all ranks, saved, "preempted" in status.json, exit code 75.

It is asked for by a signal to any rank, a file STOP in the run directory, the end of the SLURM job, or a launcher that
is gone. The heartbeats agree on the boundary; see `distkit.runtime.heartbeat`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from distkit.engine.ledger import BadStepsError
from distkit.engine.rollback import with_advice
from distkit.engine.run import Run
from distkit.engine.save import report_saves, save
from distkit.engine.watch import JOB_END, NO_LAUNCHER, STOP_FILE, slurm_job_end
from distkit.errors import NonFiniteError, Stopped
from distkit.runtime.heartbeat import StopRequested
from distkit.runtime.position import Phase


def why(wishes: dict[int, int], world_size: int) -> str:
    """`SIGTERM to rank 1`: the first rank's reason in words."""
    rank, wish = next(iter(wishes.items()))
    words = {STOP_FILE: "a file STOP in the run directory", JOB_END: "the end of the SLURM job is near",
             NO_LAUNCHER: "the launcher is gone"}  # fmt: skip
    if wish in words:
        return words[wish]
    name = signal.Signals(wish).name
    return name if world_size == 1 else f"{name} to rank {rank}" if len(wishes) < world_size else f"{name} to all ranks"


@contextmanager
def stopping_together(run: Run) -> Iterator[None]:
    """Inside, a wish to stop ends the run at the next boundary.

    Raises:
        Stopped: on all ranks alike, after the save.
    """
    heartbeat = run.runtime.heartbeat
    if run.directory.writes:
        run.watch.directory, run.watch.job_end = run.directory.path, slurm_job_end()
    run.watch.launcher = run.runtime.launcher
    heartbeat.watch = run.watch.look
    try:
        yield
    except StopRequested as request:
        stop(run, request.wishes)
    finally:
        heartbeat.watch = None


def stop(run: Run, wishes: dict[int, int]) -> NoReturn:
    """Save this step where that is possible, and leave.

    Raises:
        Stopped: always, unless a save fails in a way that ends the run.
    """
    run.runtime.position.enter(Phase.END, run.progress.step)
    wishes, step = run.runtime.broadcast(wishes), run.progress.step
    try:
        saved = save_before_leaving(run)
    except NonFiniteError as error:
        if run.config.on_nan != "rollback" or not isinstance(error, BadStepsError):
            raise with_advice(error, run)  # noqa: B904  # it is the same error
        # the same command finds the same in the same steps, and has the time to go back
        saved = f"not saved, {str(error).splitlines()[0]}: the same command continues from {continues_from(run)}"
    run.watch.done_with("STOP")
    stopped = Stopped(f"stopped after step {step} ({why(wishes, run.runtime.world_size)}); {saved}")
    stopped.on_all_ranks, stopped.retryable = True, STOP_FILE not in wishes.values()
    raise stopped


def save_before_leaving(run: Run) -> str:
    """Save this step unless it is saved already or there is no time for it; what came of that.

    Raises:
        NonFiniteError: it is not finite.
    """
    report_saves(run, wait=True)
    if run.saver is None:
        return "nothing is saved (--checkpoint.no-enabled): the same command begins again"
    if run.saver.committed == run.progress.step:
        return "the same command continues from there"
    if run.runtime.broadcast(run.watch.time_left() < run.watch.save_seconds):
        return f"too late for a save: the same command continues from {continues_from(run)}"
    save(run)
    report_saves(run, wait=True)
    if run.saver.committed == run.progress.step:
        return "saved: the same command continues from there"
    return f"not saved: the same command continues from {continues_from(run)}"


def continues_from(run: Run) -> str:
    """Where a run resumes whose present step is not saved."""
    committed = run.saver.committed if run.saver is not None else None
    return "the beginning" if committed is None else f"step {committed}"
