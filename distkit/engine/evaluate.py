"""Evaluation: every sample of the test set exactly once, over any number of ranks."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from distkit.data import Augments, Dataset, Draws, batch_size, to_device
from distkit.engine.meter import Means, Meter
from distkit.engine.run import Run
from distkit.errors import TrainingError


def rank_range(num_samples: int, rank: int, world_size: int) -> range:
    """The samples that `rank` evaluates: contiguous, disjoint, together all; sizes differ by at most one."""
    return range(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)


def evaluate(run: Run, dataset: Dataset) -> Means:
    """Mean loss and metrics of the current (or averaged) weights over `dataset`, the same on every rank.

    Raises:
        TrainingError: not every sample was counted exactly once.
    """
    strategy = run.strategy
    meter = Meter(run.runtime)
    strategy.synchronize_buffers_()
    modes = {module: module.training for module in strategy.module.modules()}
    strategy.module.eval()
    try:
        with torch.no_grad(), run.ema.applied() if run.ema is not None else nullcontext():
            count_batches(run, dataset, meter)
    finally:
        for module, mode in modes.items():
            module.training = mode
    means = meter.reduce()
    if means.samples != len(dataset):
        raise TrainingError(f"evaluation counted {means.samples} samples of {len(dataset)}")
    return means


def count_batches(run: Run, dataset: Dataset, meter: Meter) -> None:
    """Add this rank's samples to `meter`, batch by batch."""
    runtime, config = run.runtime, run.config
    samples = rank_range(len(dataset), runtime.rank, runtime.world_size)
    size = config.eval_batch_size or run.split.microbatch_size
    augment = dataset.augment if isinstance(dataset, Augments) else None
    for start in range(samples.start, samples.stop, size):
        indices = torch.arange(start, min(start + size, samples.stop))
        batch = to_device(dataset.fetch(indices), runtime.device)
        if augment is not None:
            # test-time draws are keyed by the sample itself: there is no stream
            batch = augment(batch, Draws(config.seed, indices.to(runtime.device)))
        batch = to_device(batch, runtime.device, config.channels_last)
        with run.strategy.precision():
            output = run.compute_loss(run.strategy.eval_model, batch)
        meter.add(output, batch_size(batch))
