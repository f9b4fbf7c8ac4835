"""Evaluation: every sample of the test set exactly once, over any number of ranks."""

from __future__ import annotations

import math
from contextlib import closing, nullcontext

import torch

from distkit.data import batch_size
from distkit.data.reading.loader import EvaluationLoader
from distkit.engine.meter import Means, Meter
from distkit.engine.run import Run
from distkit.errors import TrainingError
from distkit.runtime.faults import fault
from distkit.runtime.heartbeat import StopRequested
from distkit.runtime.seeding import capture_rng, restore_rng
from distkit.tensors.buffers import rank_buffers, set_rank_buffers_


def rank_range(num_samples: int, rank: int, world_size: int) -> range:
    """The samples that `rank` evaluates: contiguous, disjoint, together all; sizes differ by at most one."""
    return range(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)


def evaluate(run: Run, loader: EvaluationLoader) -> Means:
    """Mean loss and metrics of the current (or averaged) weights over a test set, the same on every rank.

    Raises:
        TrainingError: not every sample was counted exactly once.
        StopRequested: it was broken off; the random generators are as they were before.
    """
    strategy, generators = run.strategy, capture_rng(run.runtime.device)
    meter = Meter(run.runtime, run.compute_metrics, copies=strategy.reuses_outputs)
    run.synchronize_buffers_()
    modes = {module: module.training for module in strategy.module.modules()}
    own = {name: tensor.clone() for name, tensor in rank_buffers(strategy.module).items()}
    strategy.module.eval()
    try:
        with strategy.evaluating(), torch.no_grad(), run.ema.applied() if run.ema is not None else nullcontext():
            count_batches(run, loader, meter)
    except StopRequested:
        restore_rng(generators, run.runtime.device)
        set_rank_buffers_(strategy.module, own, run.runtime.device)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
    means = meter.reduce()
    if means.samples != len(loader):
        raise TrainingError(f"evaluation counted {means.samples} samples of {len(loader)}")
    return means


def count_batches(run: Run, loader: EvaluationLoader, meter: Meter) -> None:
    """Add this rank's samples to `meter`, batch by batch.

    A forward may gather parameters from all ranks, so each rank does as many as the one with most samples: its last
    batch once more, which is not counted, or where it has none the first sample of the set.
    """
    world_size = run.runtime.world_size
    ranges = [rank_range(len(loader), rank, world_size) for rank in range(world_size)]
    size, own = run.config.eval_batch_size or run.split.microbatch_size, ranges[run.runtime.rank]
    left = math.ceil(max(map(len, ranges)) / size)
    batches = loader.open(own or range(min(1, len(loader))), size)
    counts = bool(own)
    with closing(batches):
        fault("evaluation", run.runtime.rank, run.progress.step)
        batch = next(batches, None)
        while batch is not None:
            run.runtime.heartbeat.next_unit()
            with run.strategy.precision():
                output = run.compute_loss(run.strategy.eval_model, batch)
            if counts:
                meter.add(output, batch_size(batch))
            left -= 1
            following = next(batches, None)
            counts = counts and following is not None
            batch = following if following is not None or left <= 0 else batch
