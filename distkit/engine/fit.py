"""The loop, top to bottom in the order of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial

from torch import Tensor

from distkit.checkpoint.digest import state_digest
from distkit.checkpoint.retention import list_checkpoints
from distkit.checkpoint.shard_file import save_weights
from distkit.engine.endings import Cause, first_cause, record
from distkit.engine.evaluate import evaluate
from distkit.engine.meter import Means
from distkit.engine.nonfinite import check_weights, evaluation_note, loss_lost, settle_bad_steps
from distkit.engine.preemption import stopping_together
from distkit.engine.resume import restore, restore_generators, resume_notes
from distkit.engine.rollback import roll_back
from distkit.engine.run import Run
from distkit.engine.save import report_saves, save, save_due
from distkit.engine.stragglers import Own
from distkit.engine.train_step import due, train_step
from distkit.errors import NonFiniteError, RankFailedError, Stopped, TrainingError, say
from distkit.observers import RunInfo
from distkit.runtime import faults
from distkit.runtime.position import Phase

Summary = dict[str, object]


def fit(run: Run) -> Summary:
    """Train from the run's current step to `run.num_steps`; report, evaluate and save when due.

    Returns:
        What summary.json says: last and best evaluation, samples_per_second, state_digest.

    Raises:
        NonFiniteError: the loss of a report or the weights are NaN or infinite, and --on-nan gives no way to go on; on
            all ranks alike.
        Stopped: the run was told to stop, and is saved.
        CheckpointError: more saves in a row failed than `--checkpoint.max-failures` allows.
    """
    checkpoint = run.resume.checkpoint
    if checkpoint is not None:
        restore(run, checkpoint)
    with opened(run), stopping_together(run):
        if checkpoint is not None and not run.takes_weights_only:
            restore_generators(run, checkpoint)
        run.clock.begin()
        if evaluation_is_owed(run):
            evaluate_now(run)
            save(run)
        while True:
            try:
                train(run)
                return finish(run)
            except NonFiniteError as error:
                roll_back(run, error)


def train(run: Run) -> None:
    """All steps that are left; report, evaluate and save when due."""
    config, progress = run.config, run.progress
    while not run.is_done():
        run.runtime.heartbeat.next_unit()
        train_step(run)
        if faults.armed:
            faults.fault("step", run.runtime.rank, progress.step)
        if due(config.report_every, progress.step, run.num_steps):
            report(run)
        if due(run.eval_every, progress.step, run.num_steps):
            if progress.step == run.num_steps and run.test_loader is not None:
                save(run)  # an evaluation that fails must not take the last steps with it
            evaluate_now(run)
            if run.is_done() and not run.meter.is_empty:  # early, between two reports
                report(run)
        if save_due(run):
            save(run)


def evaluate_now(run: Run) -> None:
    """Evaluate, out of training's time."""
    settle_bad_steps(run)
    run.runtime.wait()  # what is queued still belongs to training
    with run.clock.excluded():
        report_evaluation(run)


def evaluation_is_owed(run: Run) -> bool:
    """True when the run was stopped in the evaluation of its present step."""
    step, last = run.progress.step, run.trackers.last
    is_due = step > 0 and run.test_loader is not None and due(run.eval_every, step, run.num_steps)
    return is_due and (last is None or last["step"] != step)


@contextmanager
def opened(run: Run) -> Iterator[None]:
    """Inside, status.json says "running" and the observers watch; afterwards both know how it ended."""
    directory, progress = run.directory, run.progress
    directory.write_status("running", progress.step)
    info = RunInfo(recipe=run.recipe, run_dir=directory.path, num_steps=run.num_steps, facts=run.facts)
    try:
        for observer in run.observers:
            observer.start(info, progress.step)
        for note in [*run.data.notes, *run.resume.warnings, *resume_notes(run)]:
            run.note(note)
        yield
        run.loader.close()
        for observer in run.observers:
            observer.close("completed", "")
        rank_zero_writes(run, partial(directory.write_status, "completed", progress.step))
    except Stopped as stopped:
        close_parts(run, "preempted", str(stopped))
        directory.write_status("preempted", progress.step, str(stopped), retryable=stopped.retryable)
        raise
    except BaseException as failure:
        # the other ranks hear of it before anything is closed here
        cause = first_cause(failure, run.runtime)
        give_up(run, cause)
        if cause.rank not in (None, run.runtime.rank):
            raise RankFailedError(str(cause)) from failure
        raise


def give_up(run: Run, cause: Cause) -> None:
    """Say that the run failed, and close its parts; nothing that goes wrong here hides what ended it."""
    directory = run.directory
    record(cause, run.runtime, directory, run.progress.step)
    if run.config.run_dir is None and directory.writes and list_checkpoints(directory.checkpoints):
        say(f"distkit: to continue this run, add --run-dir {directory.path} to the same command")
    close_parts(run, "failed", cause.what_happened)


def close_parts(run: Run, status: str, message: str) -> None:
    """End threads and worker processes, and tell the observers how the run ended."""
    run.loader.close()
    if run.saver is not None:
        run.saver.close()
    for observer in run.observers:
        with suppress(TrainingError):
            observer.close(status, message)


def report(run: Run) -> None:
    """One train line: means over all ranks since the last one. The only place where a step waits for the device.

    Raises:
        NonFiniteError: with --on-nan raise, their loss is not finite, naming the rank; see also `settle_bad_steps`.
    """
    settle_bad_steps(run)
    if run.meter.is_empty:  # every step since the last line was passed over
        return
    # a forward's time can be read when the device has been waited for, so that it is the one of the report before
    means = run.meter.reduce(Own(run.meter.data_wait_seconds, run.forward_timer.seconds))
    run.forward_timer.read()
    settle_utilization(run)
    samples_per_second = run.clock.lap(means.samples)
    event: dict[str, str | int | float] = {
        "event": "train",
        "step": run.progress.step,
        "epoch": run.progress.step / run.steps_per_epoch,
        "loss": means.loss,
        **means.metrics,
        "lr": run.strategy.optimizer.param_groups[0]["lr"],
        "samples": means.samples,
        "samples_per_second": samples_per_second,
        "data_wait_seconds": run.meter.data_wait_seconds,
    }
    if run.utilization is not None and (mfu := run.utilization.of(samples_per_second)) is not None:
        event["mfu"] = mfu
    if run.meter.grad_norm is not None:
        event["grad_norm"] = run.meter.grad_norm.item()
    if run.config.precision == "fp16":
        event["loss_scale"] = run.strategy.scaler.get_scale()
        event["skipped_updates"] = int(run.strategy.skipped.item())
    run.meter.data_wait_seconds = 0.0
    run.tell(event)
    report_stragglers(run, means, samples_per_second)
    if run.guard is None and not math.isfinite(means.loss):
        raise loss_lost(run, means)
    report_compiler(run)
    report_saves(run)


def settle_utilization(run: Run) -> None:
    """Count the FLOPs of a sample at the first report, out of the step's time."""
    if run.utilization is not None:
        with run.clock.excluded():
            failure = run.utilization.settle(run.compute_loss)
        if failure:
            run.note(failure)


def report_stragglers(run: Run, means: Means, samples_per_second: float) -> None:
    """A note when a rank begins to be slower than the others, and when that is over."""
    steps, seconds = means.samples / run.split.global_batch_size, means.samples / samples_per_second
    for note in run.stragglers.report(means.own, steps, seconds):
        run.note(note)


def report_compiler(run: Run) -> None:
    """A note for each graph break and recompilation of the training so far."""
    for note in run.strategy.compiler_notes():
        run.note(note)


def report_evaluation(run: Run) -> None:
    """One eval line; remembers the best one, and lets the plateau schedule and early stopping see it."""
    if run.test_loader is None:
        return
    report_compiler(run)
    run.runtime.position.enter(Phase.EVALUATION, run.progress.step)
    means = evaluate(run, run.test_loader)
    # compiled once more without gradients, and for a last batch of another size
    run.strategy.skip_compiler_notes()
    values = {"step": float(run.progress.step), "loss": means.loss, **means.metrics}
    is_best = run.trackers.update(values)
    if run.plateau is not None:
        run.plateau.update(reported(values, run.plateau.metric, "--schedule.metric"))
    stop = run.early_stop
    if stop is not None:
        stop.update(reported(values, stop.config.metric, "--stop.metric"))
    line: dict[str, float | str] = {name: value for name, value in values.items() if name != "step"}
    if means.not_finite:
        run.note(evaluation_note(run, means, len(run.test_loader)))
        line["nonfinite_ranks"] = ", ".join(sorted({str(source.rank) for source in means.not_finite}))
    run.tell({"event": "eval", "step": run.progress.step, **line, "samples": means.samples, "best": is_best})
    if stop is not None and stop.reason is not None and run.progress.step < run.num_steps:
        run.note(f"stopped early: {stop.reason}")


def reported(values: Mapping[str, float], metric: str, option: str) -> float:
    """The value of `metric` in an evaluation, which `option` asks for.

    Raises:
        TrainingError: it is not reported.
    """
    if metric not in values:
        raise TrainingError(f"{option} {metric} is not reported; there are {', '.join(sorted(values))}")
    return values[metric]


def finish(run: Run) -> Summary:
    """Write the final weights and summary.json; every rank returns the same summary.

    Raises:
        CheckpointError: the last checkpoint could not be saved.
        BadStepsError: the weights are not finite.
    """
    run.runtime.position.enter(Phase.END, run.progress.step)
    report_saves(run, wait=True)
    run.synchronize_buffers_()
    check_weights(run)
    if run.frozen is not None:
        run.frozen.check()
    summary: Summary = {
        "recipe": run.recipe,
        "step": run.progress.step,
        "last": run.trackers.last,
        "best": run.trackers.best,
        "samples_per_second": run.clock.average(),
        "train_seconds": run.clock.seconds,
        "state_digest": run.runtime.broadcast(state_digest(run.learned_tensors())),
        **run.facts,
    }
    if run.early_stop is not None and run.early_stop.reason is not None:
        summary["stopped_early"] = run.early_stop.reason
    if run.ledger.skips:
        summary["skipped_steps"] = ", ".join(str(skip.step) for skip in run.ledger.skips)
    if run.utilization is not None:
        summary |= run.utilization.summary(run.clock.average())
    save_final_weights(run)
    rank_zero_writes(run, partial(run.directory.write_summary, summary))
    if run.saver is not None:
        run.saver.close()
        run.saver.check(last=True)
    return summary


def save_final_weights(run: Run) -> None:
    """Write weights.safetensors and ema.safetensors; gathered by all ranks, written by rank 0.

    Raises:
        TrainingError: the disk is full or failing.
    """
    files: dict[str, Callable[[], dict[str, Tensor]]] = {"weights.safetensors": run.strategy.whole_weights}
    if run.ema is not None:
        files["ema.safetensors"] = partial(run.strategy.gather, run.ema.state_dict())
    for name, gathered in files.items():
        rank_zero_writes(run, partial(write_weights, run, name, gathered()))


def write_weights(run: Run, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` to the file `name` of the run directory, where this rank writes that."""
    if run.directory.writes:
        save_weights(run.directory.path / name, tensors, {"recipe": run.recipe, "step": str(run.progress.step)})


def rank_zero_writes(run: Run, write: Callable[[], None]) -> None:
    """Call `write`, which does something on rank 0 alone; all ranks together.

    Raises:
        TrainingError: rank 0 cannot write; on all ranks alike.
    """
    failure = None
    try:
        write()
    except OSError as error:
        # where the rename fails, the second name is the file's
        failure = f"cannot write {error.filename2 or error.filename}: {error.strerror or error}"
    except TrainingError as error:
        failure = str(error)
    failure = run.runtime.broadcast(failure)
    if failure is not None:
        told = TrainingError(failure)
        told.on_all_ranks = True
        raise told
