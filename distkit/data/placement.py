"""Where samples lie while training, and who reads them: chosen from kind, size and free memory, and said why."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil
import torch

from distkit.config import DataConfig, Placement
from distkit.data.dataset import Dataset, MapDataset
from distkit.data.fetchers import BatchMaker, Fetcher, HostFetcher, InlineFetcher
from distkit.data.workers import WorkerFetcher
from distkit.errors import ConfigError

#: Share of the free memory that a resident data set may take: activations and optimizer state need the rest.
RESIDENT_SHARE = 0.3


@dataclass(frozen=True)
class Placed:
    """A data set with a way to read it, and why this way, for people."""

    dataset: Dataset
    fetcher: Fetcher
    placement: Placement
    reason: str


def place(
    dataset: Dataset,
    data: DataConfig,
    *,
    seed: int,
    device: torch.device,
    channels_last: bool,
    local_world_size: int,
    in_process: bool = False,
) -> Placed:
    """Decide how `dataset` is read for training on `device`.

    Args:
        dataset: map-style sets go to workers; vectorised ones lie on the device or on the host.
        data: the wish (`placement`) and its numbers.
        seed: of every per-sample draw.
        device: where batches are wanted.
        channels_last: lay out 4-dim tensors as NHWC.
        local_world_size: ranks that share this machine's cores and memory.
        in_process: start no thread and no process (debug mode).

    Raises:
        ConfigError: the wished placement does not fit the data set.
    """
    placement, reason = choose(dataset, data.placement, device, local_world_size)
    if placement == "device":
        move = getattr(dataset, "to", None)
        dataset = dataset if move is None else move(device)
    cpu_first = placement == "host" and not in_process
    make = BatchMaker(dataset, seed, torch.device("cpu") if cpu_first else device, channels_last)
    fetcher: Fetcher = InlineFetcher(make)
    if cpu_first:
        fetcher = HostFetcher(make, device, data.prefetch_depth)
    if isinstance(dataset, MapDataset):
        workers = 0 if in_process else data.num_workers or default_num_workers(local_world_size)
        fetcher = WorkerFetcher(samples=dataset.samples, make=make, num_workers=workers, depth=data.prefetch_depth,
                                on_corrupt=data.on_corrupt, max_corrupt=data.max_corrupt)  # fmt: skip
        reason = f"{reason}, {workers} processes" if workers else "in this process, because of --debug"
    elif data.num_workers is not None:
        raise ConfigError("--data.num-workers is for map-style data sets", expected="a data set with __getitem__",
                          got=type(dataset).__name__, fix="--data.num-workers None")  # fmt: skip
    return Placed(dataset, fetcher, placement, reason)


def choose(dataset: Dataset, wish: Placement, device: torch.device, local_world_size: int) -> tuple[Placement, str]:
    """The placement of `dataset` and the reason.

    Raises:
        ConfigError: a map-style set is wanted anywhere but in workers, or a vectorised one in workers.
    """
    if isinstance(dataset, MapDataset):
        if wish not in ("auto", "workers"):
            raise ConfigError(f"--data.placement {wish} needs a data set that fetches whole batches",
                              expected="workers, for a data set that gives one sample at a time",
                              got=type(dataset.samples).__name__, fix="--data.placement workers")  # fmt: skip
        return "workers", "map-style data set"
    if wish == "workers":
        raise ConfigError("--data.placement workers is for data sets that give one sample at a time",
                          expected="device or host", got=type(dataset).__name__,
                          fix="--data.placement auto")  # fmt: skip
    if wish != "auto":
        return wish, "by flag"
    if getattr(dataset, "memory_mapped", False):
        return "host", "memory-mapped file"
    if device.type == "cpu":
        return "device", "in this process's memory already"
    if not hasattr(dataset, "to"):
        return "host", "it cannot be moved to the device"
    size, free = int(getattr(dataset, "nbytes", 0)), free_bytes(device, local_world_size)
    words = f"{size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB free on {device.type}"
    return ("device", words) if size <= RESIDENT_SHARE * free else ("host", f"too large: {words}")


def free_bytes(device: torch.device, local_world_size: int) -> int:
    """Free memory of the device, or this rank's share of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // local_world_size


def default_num_workers(local_world_size: int) -> int:
    """Cores of this machine over its ranks, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size)
