"""--on-nan rollback: back to the last checkpoint, leaving out the global batches that made something NaN."""

from __future__ import annotations

from distkit.checkpoint.format import step_name
from distkit.checkpoint.restore import newest_verified
from distkit.checkpoint.verify import VerifiedCheckpoint
from distkit.engine.ledger import BadStepsError
from distkit.engine.nonfinite import enter, refuse_too_many
from distkit.engine.resume import restore_all, restore_generators
from distkit.engine.run import Run
from distkit.engine.save import report_outcome
from distkit.errors import NonFiniteError

#: --on-nan -> what others could do.
ADVICE = {"raise": "; --on-nan skip or rollback leaves such steps out", "skip": "; so may --on-nan rollback",
          "rollback": ""}  # fmt: skip


def roll_back(run: Run, error: NonFiniteError) -> None:
    """Continue from the last checkpoint as a run does that is killed and resumed, and pass over the steps in `error`.

    Nothing of the steps in between is left: their lines in metrics.jsonl are removed, as a resume removes them.

    Raises:
        NonFiniteError: `error`, where --on-nan is another, nothing was saved, or the steps lie before what was saved;
            or more steps would be left out than --max-skips allows.
    """
    if not error.on_all_ranks:
        raise error
    for outcome in run.saver.finish() if run.saver is not None else ():
        report_outcome(run, outcome)
    if run.config.on_nan != "rollback" or not isinstance(error, BadStepsError) or not error.skips:
        raise with_advice(error, run)
    checkpoint = last_checkpoint(run)
    if checkpoint is None or min(skip.step for skip in error.skips) <= checkpoint.manifest.step:
        raise with_advice(error, run)
    try:
        refuse_too_many(run, error.skips)
    except NonFiniteError as refusal:
        raise with_advice(refusal, run) from None
    ledger, step = run.ledger.skips, checkpoint.manifest.step
    run.loader.close()
    restore_all(run, checkpoint)
    run.ledger.skips = ledger
    for observer in run.observers:
        observer.go_back(step)
    enter(run, error.skips, back_to=step)
    restore_generators(run, checkpoint)
    run.clock.begin()


def with_advice(error: NonFiniteError, run: Run) -> NonFiniteError:
    """`error`, which ends the run, with where it can be taken up and what may help."""
    committed = run.saver.committed if run.saver is not None else None
    last = "there is no checkpoint from before"
    if committed is not None:
        last = f"the last good checkpoint is {run.directory.checkpoints / step_name(committed)}"
    help_ = "--debug names the module; a lower learning rate or --max-grad-norm 1 may help"
    error.args = (f"{error}\n{last}; {help_}{ADVICE[run.config.on_nan]}",)
    return error


def last_checkpoint(run: Run) -> VerifiedCheckpoint | None:
    """The newest checkpoint of this run that verifies, or the one of another run that it continues."""
    newest = newest_verified(run.directory.checkpoints, run.runtime, run.note)
    return run.resume.checkpoint if newest is None and not run.takes_weights_only else newest
