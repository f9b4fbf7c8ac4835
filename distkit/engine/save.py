"""When a run is saved, and what is reported about it."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

from distkit.checkpoint import retention
from distkit.checkpoint.commit import Outcome
from distkit.checkpoint.format import step_name
from distkit.checkpoint.retention import Retention, choose_removed, list_checkpoints, score_of
from distkit.checkpoint.saver import Saver
from distkit.checkpoint.verify import read_state
from distkit.config import CheckpointConfig
from distkit.engine.nonfinite import settle_bad_steps, weights_lost
from distkit.engine.run import Best, Run
from distkit.engine.state import snapshot
from distkit.engine.train_step import due
from distkit.errors import CheckpointError
from distkit.runtime.faults import fault
from distkit.runtime.position import Phase
from distkit.runtime.process import Runtime
from distkit.tensors.buffers import check_buffer_specs


def build_saver(
    folder: Path,
    runtime: Runtime,
    config: CheckpointConfig,
    *,
    recipe: str,
    strategy: str,
    best: Best,
    source: int | None,
) -> Saver:
    """What saves a run under `folder`; `source` is the step of its own checkpoint that it was restored from."""
    clean = partial(remove_old, folder, config, best, source)
    return Saver(folder, runtime, config, recipe=recipe, strategy=strategy, clean=clean, committed=source)


def remove_old(folder: Path, config: CheckpointConfig, best: Best, source: int | None, step: int) -> None:
    """Remove what the configuration does not keep; never the one just made, nor the one the run came from."""
    # newer ones are not of this run, and must not take the places of its own
    steps = [other for other in list_checkpoints(folder) if other <= step]
    scores = {}
    for other in steps if config.keep_best is not None else ():
        with suppress(CheckpointError):  # one that cannot be read is not the best
            score = score_of(read_state(folder / step_name(other)), best.metric, best.mode)
            if score is not None:
                scores[other] = score
    keep = Retention(config.keep_last, config.keep_best, config.keep_every)
    for old in choose_removed(steps, scores, keep, {step} | ({source} if source is not None else set())):
        fault("in_retention", 0, step)
        retention.remove(folder, old)


def save_due(run: Run) -> bool:
    """True at every `save_every`-th step, at the last one, after the best evaluation so far, and when a file SAVE asks.

    The file is looked at with the reports, where all ranks wait for each other anyway.
    """
    if run.saver is None:
        return False
    config, step, best = run.config.checkpoint, run.progress.step, run.trackers.best
    is_best = config.keep_best is not None and best is not None and best["step"] == step
    if is_best or run.is_done() or due(run.save_every, step, run.num_steps):
        return True
    return due(run.config.report_every, step, run.num_steps) and run.runtime.any_rank(run.watch.wants_save)()


def save(run: Run) -> None:
    """Save the state at this step boundary, synchronously or in the background while training continues.

    Raises:
        CheckpointError: too many saves in a row have failed, or none could be resumed from; on all ranks alike.
        NonFiniteError: the weights are not finite, as `settle_bad_steps` and `tell` find; on all ranks alike.
    """
    settle_bad_steps(run)
    if run.saver is not None:
        run.runtime.position.enter(Phase.SAVE, run.progress.step)
        fault("save", run.runtime.rank, run.progress.step)
        if run.watch.wants_save:
            run.watch.done_with("SAVE")
        check_buffer_specs(run.strategy.module, run.buffer_specs, run.progress.step)
        with run.clock.excluded():
            tell(run, run.saver.save(run.progress.step, snapshot(run)))


def report_saves(run: Run, *, wait: bool = False) -> None:
    """Report how a background save ended, if it has; with `wait`, wait for it first."""
    if run.saver is not None:
        tell(run, run.saver.finish() if wait else run.saver.poll())


def tell(run: Run, outcomes: list[Outcome]) -> None:
    """Report a checkpoint event for each outcome; end the run after too many failures.

    Raises:
        BadStepsError: what was to be saved was not finite: such a checkpoint would push out the good ones.
        CheckpointError: too many saves in a row have failed.
    """
    for outcome in outcomes:
        report_outcome(run, outcome)
    for outcome in outcomes:
        if outcome.lost is not None:
            raise weights_lost(run, outcome.step, outcome.lost)
    if outcomes and run.saver is not None:
        run.saver.check()


def report_outcome(run: Run, outcome: Outcome) -> None:
    """A checkpoint event for `outcome`, and a note of what went wrong after it."""
    if outcome.error is None:
        line = {"bytes": outcome.nbytes, "seconds": outcome.seconds}
        run.watch.save_seconds = max(run.watch.save_seconds, outcome.seconds)
        run.tell({"event": "checkpoint", "step": outcome.step, **line})
        for note in run.stragglers.save(outcome.written):
            run.note(note)
    else:
        run.tell({"event": "checkpoint", "step": outcome.step,
                  "error": f"not saved; the previous one is kept: {outcome.error}"})  # fmt: skip
    if outcome.warning is not None:
        run.tell({"event": "note", "step": outcome.step, "message": f"saved, but then: {outcome.warning}"})
