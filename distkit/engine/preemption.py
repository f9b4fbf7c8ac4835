"""How a run stops on purpose (C6): at one step boundary of all ranks, saved, "preempted" in status.json, exit code 75.

It is asked for by a signal to any rank, a file STOP in the run directory, the end of the SLURM job, or a launcher that
is gone. The heartbeats agree on the boundary; see `distkit.runtime.heartbeat`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from distkit.engine.run import Run
from distkit.engine.save import report_saves, save
from distkit.engine.watch import JOB_END, NO_LAUNCHER, STOP_FILE, slurm_job_end
from distkit.errors import Stopped
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
    """Save this step unless it is saved already or there is no time for it, and leave.

    Raises:
        Stopped: always, unless a save fails in a way that ends the run.
    """
    run.runtime.position.enter(Phase.END, run.progress.step)
    report_saves(run, wait=True)
    wishes, step = run.runtime.broadcast(wishes), run.progress.step
    if run.saver is None:
        saved = "nothing is saved (--checkpoint.no-enabled): the same command begins again"
    elif run.saver.committed == step:
        saved = "the same command continues from there"
    elif run.runtime.broadcast(run.watch.time_left() < run.watch.save_seconds):
        saved = f"too late for a save: the same command continues from {continues_from(run)}"
    else:
        save(run)
        report_saves(run, wait=True)
        if run.saver.committed == step:
            saved = "saved: the same command continues from there"
        else:
            saved = f"not saved: the same command continues from {continues_from(run)}"
    run.watch.done_with("STOP")
    stopped = Stopped(f"stopped after step {step} ({why(wishes, run.runtime.world_size)}); {saved}")
    stopped.on_all_ranks, stopped.retryable = True, STOP_FILE not in wishes.values()
    raise stopped


def continues_from(run: Run) -> str:
    """Where a run resumes whose present step is not saved."""
    committed = run.saver.committed if run.saver is not None else None
    return "the beginning" if committed is None else f"step {committed}"
