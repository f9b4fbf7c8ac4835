"""One step: one global batch, one optimizer update. Nothing here waits for the device (C5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from time import perf_counter

import torch
from torch import Tensor

from distkit.data import Batch
from distkit.engine.run import Run
from distkit.errors import TrainingError
from distkit.losses import LossOutput
from distkit.optim import set_lr
from distkit.runtime import faults
from distkit.runtime.position import MICROBATCH, PHASE, STEP, Phase

DATA, COMPUTE = int(Phase.DATA), int(Phase.STEP)


def due(every: float | None, step: int, num_steps: int) -> bool:
    """True after every `every`-th finished step and after the last one; None means only after the last.

    Where `every` is no whole number it is true after the first step that is not before a multiple of it.
    """
    return step == num_steps or (every is not None and step % every < 1)


def train_step(run: Run) -> None:
    """Do step `run.progress.step`: set the learning rate, compute gradients, clip, update, average.

    With a guard (--on-nan skip or rollback) a step that is not finite on some rank moves nothing. Steps that were the
    reason for going back to a checkpoint are passed over: their samples are read, and nothing else is done.
    """
    strategy, progress, guard = run.strategy, run.progress, run.guard
    run.runtime.position.cells[STEP] = progress.step + 1
    run.forward_timer.begin_step(progress.step)
    set_lr(strategy.optimizer, run.lr_multiplier())
    if run.ledger.passed_over and progress.step + 1 in run.ledger.passed_over:
        pass_over(run)
        return
    bad = None
    if strategy.needs_closure:
        # the loss is evaluated several times on one global batch, which is read and reported once
        evaluations, batches = count(), list(microbatches(run))
        strategy.update_with_closure(lambda: global_loss(run, batches, report=next(evaluations) == 0))
    else:
        if guard is not None:
            guard.begin()
        outputs = compute_gradients(run, microbatches(run))
        bad = None if guard is None else guard.judge(progress.step + 1, outputs)
        run.meter.grad_norm = strategy.clip_gradients_(due(run.config.report_every, progress.step + 1, run.num_steps))
        strategy.update(bad)
    if run.ema is not None:
        run.ema.update_(progress.step, bad)
    if guard is not None and bad is not None:
        guard.end(bad)
    progress.step += 1


def pass_over(run: Run) -> None:
    """Leave the step out: nothing moves, and no random generator is used."""
    for accum_index in range(run.split.accum_steps):
        next_microbatch(run, accum_index)
    run.meter.grad_norm = None
    run.progress.step += 1


def compute_gradients(run: Run, batches: Iterable[Batch], report: bool = True) -> list[LossOutput]:
    """Gradients of the mean loss of the whole global batch: `accum_steps` microbatches, one exchange (C2)."""
    strategy, split = run.strategy, run.split
    strategy.zero_gradients()
    outputs = []
    for accum_index, batch in enumerate(batches):
        strategy.exchange_gradients(accum_index == split.accum_steps - 1)
        with run.forward_timer, strategy.precision():
            output = run.compute_loss(strategy.model, batch)
        strategy.backward(share_of_step(output, run))
        if report:
            run.meter.add(output, split.microbatch_size)
        outputs.append(output)
    normalize_by_weight_(run, outputs)
    return outputs


def microbatches(run: Run) -> Iterator[Batch]:
    """The microbatches of this step, each read when it is asked for."""
    for accum_index in range(run.split.accum_steps):
        yield next_microbatch(run, accum_index)


def next_microbatch(run: Run, accum_index: int) -> Batch:
    """The next microbatch; the time it made the step wait is added up."""
    position = run.runtime.position.cells
    position[PHASE] = DATA
    position[MICROBATCH] += 1
    start = perf_counter()
    if faults.armed:
        faults.fault("data", run.runtime.rank, run.progress.step + 1)
    batch = run.loader.microbatch(run.progress.step, accum_index)
    run.meter.data_wait_seconds += perf_counter() - start
    position[PHASE] = COMPUTE
    return batch


def share_of_step(output: LossOutput, run: Run) -> Tensor:
    """What this microbatch adds to the step's loss; strategies average over ranks.

    Without weights every microbatch has the same number of samples, so the mean of the means is the mean. With
    weights the sum of weight x mean is divided by the weight of the whole global batch afterwards, when it is known.
    """
    split = run.split
    if output.weight is not None:
        # a constant keeps fp16 in range: the weight is of the order of tokens a sample
        return output.loss * (output.weight / (split.accum_steps * split.microbatch_size))
    return output.loss if split.accum_steps == 1 else output.loss / split.accum_steps


def normalize_by_weight_(run: Run, outputs: list[LossOutput]) -> None:
    """Turn gradients of the weighted sum into those of the weighted mean over the global batch."""
    weights = [output.weight for output in outputs if output.weight is not None]
    if not weights:
        return
    if len(weights) != len(outputs):
        raise TrainingError("compute_loss returned a weight for some microbatches of a step and none for others")
    total = torch.stack(weights).sum(dtype=torch.float32)
    run.runtime.all_reduce_(total)
    # a step of padding alone weighs nothing and moves nothing
    factor = torch.where(total > 0, run.split.global_batch_size / total, 0.0)
    run.strategy.scale_gradients_(factor)


def global_loss(run: Run, batches: Sequence[Batch], report: bool) -> Tensor:
    """The closure of LBFGS: gradients, and the loss of the global batch, which must be the same on every rank."""
    with torch.enable_grad():
        outputs = compute_gradients(run, batches, report)
    weight = torch.stack([torch.ones_like(o.loss) if o.weight is None else o.weight for o in outputs])
    loss = torch.stack([output.loss.detach() for output in outputs])
    pair = torch.stack([(loss * weight).sum(), weight.sum()])
    run.runtime.all_reduce_(pair)
    return pair[0] / pair[1]
