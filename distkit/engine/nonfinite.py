"""NaN and infinity are found: who had them, in which step, and what that means for the run (C6)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from distkit.engine.evaluate import rank_range
from distkit.engine.guard import LOSS, OWN, Table
from distkit.engine.ledger import BadStepsError, Skip
from distkit.engine.meter import Means, NotFinite
from distkit.engine.run import Run
from distkit.engine.state import judged_tensors, saved_tensors
from distkit.errors import NonFiniteError, shorten
from distkit.tensors.finite import is_finite
from distkit.tensors.shards import local_part


def settle_bad_steps(run: Run) -> None:
    """Enter the steps that moved nothing since the last call into the ledger, and report them; all ranks together.

    Before reports, evaluations and saves. Without --on-nan skip or rollback there is nothing to do.

    Raises:
        BadStepsError: --on-nan rollback, naming the steps to go back before; or the weights are not finite themselves.
        NonFiniteError: more steps were skipped than --max-skips allows.
    """
    bad = run.guard.read() if run.guard is not None else []
    if not bad:
        return
    if lost := lost_tensor(run):
        raise weights_lost(run, bad[0][0] - 1, lost)
    skips = [describe(run, step, table) for step, table in bad]
    if run.config.on_nan == "rollback":
        raise BadStepsError(skips[0].why, skips)
    refuse_too_many(run, skips)
    enter(run, skips)


def refuse_too_many(run: Run, skips: Sequence[Skip]) -> None:
    """End the run where `skips` are more than it may still leave out.

    Raises:
        NonFiniteError: naming the first one that is too many.
    """
    most = run.config.max_skips
    excess = [*run.ledger.skips, *skips][most:]
    if excess:
        already = f"after {most} that {'was' if most == 1 else 'were'} left out (--max-skips {most})"
        error = NonFiniteError(f"{excess[0].why}, {already}")
        error.on_all_ranks = True
        raise error


def enter(run: Run, skips: Sequence[Skip], **more: int) -> None:
    """Enter `skips` into the ledger and report them, with `more` fields."""
    run.ledger.add(skips)
    for skip in skips:
        rank = {"rank": skip.ranks[0]} if skip.ranks else {}
        run.tell({"event": "skip", "step": skip.step, **rank, **more, "message": skip.why})


def describe(run: Run, step: int, table: Table) -> Skip:
    """The ledger's entry for a step with this table of the guard."""
    column, what = LOSS, "the loss"
    ranks = [rank for rank, row in enumerate(table) if not math.isfinite(row[LOSS])]
    if not ranks:
        column, what = OWN, "the gradients"
        ranks = [rank for rank, row in enumerate(table) if not math.isfinite(row[OWN])]
    if ranks or run.runtime.world_size == 1:
        values = [value for row in table for value in row if not math.isfinite(value)]
        value = table[ranks[0]][column] if ranks else values[0]
        who = of_ranks(ranks, run.runtime.world_size)
        return entry(run, step, ranks, f"{what}{who} became {value}")
    return entry(run, step, (), "the gradients became infinite when they were added up over the ranks")


def entry(run: Run, step: int, ranks: Iterable[int], what: str) -> Skip:
    """An entry of the ledger; `what` is the first part of its sentence."""
    size = run.split.global_batch_size
    why = f"{what} in step {step} ({samples_of(run, step)})"
    return Skip(step=step, ranks=tuple(ranks), first=(step - 1) * size, last=step * size - 1, why=why,
                rolled_back=run.config.on_nan == "rollback")  # fmt: skip


def samples_of(run: Run, step: int) -> str:
    """`samples 912 to 927 of epoch 3`: what a step reads, by place in the epochs' own orders."""
    size, num_samples = run.split.global_batch_size, run.num_samples
    (epoch, first), (last_epoch, last) = divmod((step - 1) * size, num_samples), divmod(step * size - 1, num_samples)
    begin = f"samples {first} " + (f"of epoch {epoch} " if epoch != last_epoch else "")
    return f"{begin}to {last} of epoch {last_epoch}"


def of_ranks(ranks: Sequence[int], world_size: int) -> str:
    """` of rank 1`, ` of ranks 1 and 3`, ` of all 4 ranks`; nothing for a run of one rank."""
    if world_size == 1 or not ranks:
        return ""
    if len(ranks) == world_size:
        return f" of all {world_size} ranks"
    *others, last = map(str, ranks)
    return f" of ranks {', '.join(others)} and {last}" if others else f" of rank {last}"


def loss_lost(run: Run, means: Means) -> NonFiniteError:
    """The error of --on-nan raise: the loss of a report is not finite."""
    step, world_size = run.progress.step, run.runtime.world_size
    what = f"the loss became {means.loss} in the {run.config.report_every} steps before step {step}"
    steps = {source: steps_of(run, source) for source in means.not_finite if source.name == "loss"}
    if steps:
        begin, end = min(steps.values())
        first = [source for source, found in steps.items() if found == (begin, end)]
        when = f"step {begin} ({samples_of(run, begin)})" if begin == end else f"one of the steps {begin} to {end}"
        what = f"the loss{of_ranks([source.rank for source in first], world_size)} became {first[0].value} in {when}"
        if 1 < len(first) == world_size:
            what += ", perhaps through the gradients of the step before"
    error = NonFiniteError(what)
    error.on_all_ranks = True
    return error


def steps_of(run: Run, source: NotFinite) -> tuple[int, int]:
    """The first and the last step in which `source` may have had its value; mostly one."""
    samples_per_step = run.split.microbatch_size * run.split.accum_steps
    first, last = (
        run.progress.step - (source.seen - 1 - sample) // samples_per_step for sample in (source.begin, source.end - 1)
    )
    return max(first, 1), last


def lost_tensor(run: Run) -> str | None:
    """The first weight, averaged weight or optimizer state that is not finite, and its ranks; all ranks together."""
    tensors = saved_tensors(run)
    judged = judged_tensors(run, tensors).items()
    here = next((n for n, infinity in judged if not is_finite(local_part(tensors[n]), infinity=infinity)), None)
    answers = run.runtime.gather(here)
    ranks = [rank for rank, name in enumerate(answers) if name is not None]
    return f"{answers[ranks[0]]}{of_ranks(ranks, run.runtime.world_size)}" if ranks else None


def check_weights(run: Run) -> None:
    """Refuse to call this step's weights a result; all ranks together.

    Raises:
        BadStepsError: naming the first tensor.
    """
    if lost := lost_tensor(run):
        raise weights_lost(run, run.progress.step, lost)


def weights_lost(run: Run, step: int, lost: str) -> NonFiniteError:
    """The error for a tensor that is not finite after `step`: the last step that moved the weights has done it.

    With --on-nan raise a loss that was not finite before says more; all ranks together.
    """
    if run.guard is None and not run.meter.is_empty:
        means = run.meter.reduce()
        if not math.isfinite(means.loss):
            return loss_lost(run, means)
    while step in run.ledger:
        step -= 1
    skips = [entry(run, step, (), f"the update made {lost} NaN or infinite")] if step > 0 else []
    return BadStepsError(f"{lost} is not finite after step {step}, and such weights are not saved", skips)


def evaluation_note(run: Run, means: Means, num_samples: int) -> str:
    """What to say of an evaluation with values that are not finite: which, and whose samples gave them."""
    world_size = run.runtime.world_size
    sources: dict[tuple[str, str], list[NotFinite]] = {}
    for source in means.not_finite:
        sources.setdefault((source.name, str(source.value)), []).append(source)
    words = []
    for (name, value), found in sources.items():
        first, start = found[0], rank_range(num_samples, found[0].rank, world_size).start
        samples = f" (samples {start + first.begin} to {start + first.end - 1} of the test set)"
        ranks = of_ranks([source.rank for source in found], world_size)
        words.append(f"{name}{ranks} is {value}" + (samples if len(found) == 1 else ""))
    return f"not finite in this evaluation: {shorten(words)}"
