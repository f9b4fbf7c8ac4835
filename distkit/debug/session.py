"""Debug mode: a few steps, slow and explained."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

import torch
from torch import nn

from distkit.data import Batch
from distkit.data.batch import Microbatches
from distkit.debug.explain import explain, summarize
from distkit.debug.watch import ModuleWatch, count_nonfinite, range_line
from distkit.engine.run import Run
from distkit.engine.train_step import train_step
from distkit.errors import NonFiniteError, TrainingError
from distkit.losses import LossOutput
from distkit.returned import check_output

logger = logging.getLogger(__name__)

#: Steps after which a model that cannot memorize one batch has something wrong with it.
OVERFIT_STEPS = 300
#: Overfitted when the loss is below this share of the first one.
OVERFIT_RATIO = 0.02


def debug(run: Run, expected_loss: float | None) -> None:
    """Run `run` in debug mode and print what a newcomer wants to know; nothing is written to disk.

    Args:
        run: assembled for one process.
        expected_loss: what an untrained model should give, or None when the recipe does not say.

    Raises:
        NonFiniteError: naming the first module or parameter with a NaN, and the step.
        TrainingError: the step failed (with module, shapes and batch), or the overfit test did not succeed.
    """
    config, module = run.config.debug, run.strategy.module
    for name, value in run.facts.items():
        print(f"{name:13s} {value}")
    for note in run.data.notes:
        print(f"{'note':13s} {note}")
    print_parameters(module)
    num_batches = config.overfit_batches
    if num_batches is not None:
        loader = RepeatedLoader(run.loader, num_batches)
        run = replace(run, loader=loader, schedule=constant_lr, num_steps=OVERFIT_STEPS)
    losses: list[float] = []
    problems = 0
    with closing(run.loader), ModuleWatch(module) as watch, deterministic_and_anomalous():
        while run.progress.step < run.num_steps:
            losses.append(debug_step(run, watch))
            step = run.progress.step
            if step == 1:
                print_shapes(watch)
                problems = check_first_loss(losses[0], expected_loss) + name_unused(module)
            if num_batches is None or step % 25 == 0:
                print(f"step {step:4d}  loss {losses[-1]:.5f}")
            if num_batches is not None and max(losses[-num_batches:]) < OVERFIT_RATIO * losses[0]:
                break
    if num_batches is not None:
        conclude_overfit(losses, num_batches)
        print("the model can learn: overfit test passed")
    print(f"debug mode found {problems} thing(s) to look at" if problems else "debug mode found nothing wrong")


@contextmanager
def deterministic_and_anomalous() -> Iterator[None]:
    """Operations without a deterministic kernel raise, and backward names the forward line of a NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def constant_lr(_step: int) -> float:
    """The overfit test wants no warmup and no decay."""
    return 1.0


class RepeatedLoader:
    """The first `num_batches` global batches again and again, with the same augmentation."""

    def __init__(self, loader: Microbatches, num_batches: int) -> None:
        self._loader, self._num_batches = loader, num_batches

    def microbatch(self, step: int, accum_index: int) -> Batch:
        """A microbatch of global batch `step % num_batches`."""
        return self._loader.microbatch(step % self._num_batches, accum_index)

    def first(self) -> Batch:
        """The first microbatch."""
        return self._loader.first()

    def close(self) -> None:
        """Close what is repeated."""
        self._loader.close()


def debug_step(run: Run, watch: ModuleWatch) -> float:
    """One train step with every check; returns its mean loss."""
    watch.step = run.progress.step + 1
    compute_loss = run.compute_loss
    seen: dict[str, tuple[str, tuple[int, int] | None]] = {}

    phase = "reading the batch"

    def watched(model: nn.Module, batch: Batch) -> LossOutput:
        nonlocal phase
        phase = "computing the loss, outside of the model"
        watch.begin()
        seen.update(summarize(batch))
        for name, (line, _) in seen.items():
            if "not finite" in line:
                raise NonFiniteError(f"step {watch.step}: the batch itself is not finite: {name} is {line}")
        output = compute_loss(model, batch)
        check_output(output, run.compute_metrics is not None)
        phase = "running the backward pass or the update"
        if count_nonfinite(output.loss):
            raise NonFiniteError(
                f"step {watch.step}: the model's output is finite, the loss computed from it is {output.loss.item()}"
            )
        return output

    try:
        train_step(replace(run, compute_loss=watched))
    except Exception as error:
        raise explain(error, watch, seen, phase) from error
    for name, parameter in run.strategy.module.named_parameters():
        if parameter.grad is not None and count_nonfinite(parameter.grad):
            raise NonFiniteError(f"step {watch.step}: the gradient of {name} is {range_line(parameter.grad)}")
        if count_nonfinite(parameter):
            raise NonFiniteError(
                f"step {watch.step}: the update made {name} {range_line(parameter)}; is the lr too high?"
            )
    return run.meter.reduce().loss


def print_parameters(module: nn.Module) -> None:
    """A table of every parameter: name, shape, dtype, number, trainable."""
    rows = [
        (
            name,
            str(list(p.shape)),
            str(p.dtype).removeprefix("torch."),
            f"{p.numel():,}",
            "" if p.requires_grad else "frozen",
        )
        for name, p in module.named_parameters()
    ]
    print_table("parameters", ("name", "shape", "dtype", "number", ""), rows)
    print(f"{sum(p.numel() for p in module.parameters()):,} parameters in all")


def print_shapes(watch: ModuleWatch) -> None:
    """A table of what went through every module in the first forward."""
    rows = [
        (call.name or "(model)", type(call.module).__name__, str(call.inputs), str(call.outputs))
        for call in watch.first_calls.values()
    ]
    print_table("shapes of the first forward", ("module", "type", "input", "output"), rows)


def print_table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as they need to be."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def check_first_loss(loss: float, expected: float | None) -> int:
    """Compare the first loss with that of a model that knows nothing; the number of warnings."""
    if expected is None:
        print(f"\nfirst loss {loss:.4f} (the recipe does not say what an untrained model should give)")
    elif 0.5 * expected <= loss <= 2 * expected:
        print(f"\nfirst loss {loss:.4f}, expected about {expected:.4f} from an untrained model: fine")
    else:
        print(f"\nWARNING: first loss {loss:.4f}, expected about {expected:.4f} from an untrained model")
        print("  check: initial weights of the last layer, normalisation of the inputs, reduction of the loss")
        return 1
    return 0


def name_unused(module: nn.Module) -> int:
    """Name the parameters that got no gradient; the number of warnings."""
    unused = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        print(f"WARNING: {len(unused)} unused parameters, which the loss does not depend on: {', '.join(unused)}")
    else:
        print("every parameter got a gradient")
    return int(bool(unused))


def conclude_overfit(losses: list[float], num_batches: int) -> None:
    """Report whether the batches were memorized.

    Raises:
        TrainingError: they were not.
    """
    first, last = losses[0], max(losses[-num_batches:])
    if not (math.isfinite(last) and last < OVERFIT_RATIO * first):
        raise TrainingError(
            f"the model did not memorize {num_batches} batch(es): loss {first:.4f} -> {last:.4f} "
            f"in {len(losses)} steps\n"
            "  check: the learning rate, labels that do not belong to their samples, strong augmentation or dropout, "
            "a loss that is detached from the model"
        )
    print(f"loss {first:.4f} -> {last:.4f} in {len(losses)} steps")
