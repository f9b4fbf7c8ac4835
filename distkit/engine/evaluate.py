"""Evaluation: every sample of the test set exactly once, over any number of ranks."""

from __future__ import annotations

from contextlib import closing, nullcontext

import torch

from distkit.data import batch_size
from distkit.data.loader import EvaluationLoader
from distkit.engine.meter import Means, Meter
from distkit.engine.run import Run
from distkit.errors import TrainingError


def rank_range(num_samples: int, rank: int, world_size: int) -> range:
    """The samples that `rank` evaluates: contiguous, disjoint, together all; sizes differ by at most one."""
    return range(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)


def evaluate(run: Run, loader: EvaluationLoader) -> Means:
    """Mean loss and metrics of the current (or averaged) weights over a test set, the same on every rank.

    Raises:
        TrainingError: not every sample was counted exactly once.
    """
    strategy = run.strategy
    meter = Meter(run.runtime)
    strategy.synchronize_buffers_(run.ema.averaged_buffers if run.ema is not None else ())
    modes = {module: module.training for module in strategy.module.modules()}
    strategy.module.eval()
    try:
        with torch.no_grad(), run.ema.applied() if run.ema is not None else nullcontext():
            count_batches(run, loader, meter)
    finally:
        for module, mode in modes.items():
            module.training = mode
    means = meter.reduce()
    if means.samples != len(loader):
        raise TrainingError(f"evaluation counted {means.samples} samples of {len(loader)}")
    return means


def count_batches(run: Run, loader: EvaluationLoader, meter: Meter) -> None:
    """Add this rank's samples to `meter`, batch by batch."""
    samples = rank_range(len(loader), run.runtime.rank, run.runtime.world_size)
    batches = loader.open(samples, run.config.eval_batch_size or run.split.microbatch_size)
    with closing(batches):
        while (batch := next(batches, None)) is not None:
            with run.strategy.precision():
                output = run.compute_loss(run.strategy.eval_model, batch)
            meter.add(output, batch_size(batch))
