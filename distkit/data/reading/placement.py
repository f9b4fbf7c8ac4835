"""Where samples are kept during training and who reads them: chosen by kind, size and free memory, with a reason."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from distkit.config import BatchSplit, DataConfig, Placement
from distkit.data.dataset import Dataset, MapDataset
from distkit.data.reading.fetchers import BatchMaker, Fetcher, HostFetcher, InlineFetcher
from distkit.data.reading.iterable import IterableData, IterableSource
from distkit.data.reading.loader import Loader
from distkit.data.reading.workers import WorkerFetcher
from distkit.data.sets.torchvision_sets import loader_notes
from distkit.data.stream.stream import SampleStream
from distkit.errors import ConfigError
from distkit.runtime.process import available_cores

#: Share of the free memory that a resident data set may take: activations and optimizer state need the rest.
RESIDENT_SHARE = 0.3


@dataclass(frozen=True)
class Placed:
    """A data set with a way to read it, and why this way, for people."""

    dataset: Dataset
    fetcher: Fetcher
    placement: Placement
    reason: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What every data set of a run is read with.

    Args:
        data: the requested placement and its settings.
        seed: of every per-sample draw.
        device: where batches are wanted.
        channels_last: lay out 4-dim tensors as NHWC.
        local_world_size: ranks that share this machine's cores and memory.
        in_process: start no thread and no process (debug mode).
        timeout_seconds: a batch that takes longer ends the run, > 0.
    """

    data: DataConfig
    seed: int
    device: torch.device
    channels_last: bool = False
    local_world_size: int = 1
    in_process: bool = False
    timeout_seconds: float = 1800.0

    def num_workers(self) -> int:
        """Worker processes of this rank."""
        return 0 if self.in_process else self.data.num_workers or available_cores(self.local_world_size)


@dataclass(frozen=True, kw_only=True)
class TrainSource:
    """Where a run's microbatches come from, and how that is described."""

    loader: Loader | IterableSource
    num_samples: int
    summary: str
    placement: str


def open_training(dataset: Dataset | IterableData, reading: Reading, split: BatchSplit, rank: int) -> TrainSource:
    """The training data of one rank: the sample stream over a placed set, or an iterable set in its own order.

    Raises:
        ConfigError: the requested placement does not fit the data set.
    """
    size, line = len(dataset), summary_of(dataset)
    if not isinstance(dataset, IterableData):
        placed = place(dataset, reading)
        stream = SampleStream(reading.seed, size, split.global_batch_size)
        how = f"{placed.placement} ({placed.reason})"
        loader = Loader(placed.fetcher, stream, split, rank)
        return TrainSource(loader=loader, num_samples=size, summary=line, placement=how)
    if reading.data.placement not in ("auto", "workers"):
        raise ConfigError(f"--data.placement {reading.data.placement} needs an indexable data set", expected="workers",
                          got="an iterable data set", fix="--data.placement workers")  # fmt: skip
    source = IterableSource(
        build=dataset.build,
        seed=reading.seed,
        split=split,
        rank=rank,
        device=reading.device,
        channels_last=reading.channels_last,
        augment=dataset.augment,
        num_workers=reading.num_workers(),
        prefetch_depth=reading.data.prefetch_depth,
        collate=dataset.collate,
    )
    how = f"workers (iterable data set, {reading.num_workers()} processes)"
    return TrainSource(loader=source, num_samples=size, summary=line, placement=how)


def summary_of(dataset: object) -> str:
    """One line for people: what the data set says of itself, or its size and kind."""
    describe = getattr(dataset, "describe", None)
    samples = dataset.samples if isinstance(dataset, MapDataset) else dataset
    return str(describe()) if describe is not None else f"{len(dataset):,} samples of {type(samples).__name__}"  # type: ignore[arg-type]


def notes_of(dataset: object) -> tuple[str, ...]:
    """What a person should know of the data set before training on it: its `notes`, and what its loader ignores."""
    if not isinstance(dataset, MapDataset):
        return tuple(getattr(dataset, "notes", ()))
    return *getattr(dataset.samples, "notes", ()), *loader_notes(dataset.samples)


def place(dataset: Dataset, reading: Reading) -> Placed:
    """Decide how `dataset` is read: map-style sets by workers; vectorised ones are on the device or on the host.

    Raises:
        ConfigError: the requested placement does not fit the data set.
    """
    data, device = reading.data, reading.device
    placement, reason = choose(dataset, data.placement, device, reading.local_world_size)
    if placement == "device":
        move = getattr(dataset, "to", None)
        dataset = dataset if move is None else move(device)
    cpu_first = placement == "host" and not reading.in_process
    make = BatchMaker(dataset, reading.seed, torch.device("cpu") if cpu_first else device, reading.channels_last)
    fetcher: Fetcher = InlineFetcher(make)
    if cpu_first:
        fetcher = HostFetcher(make, device, data.prefetch_depth, reading.timeout_seconds)
    if isinstance(dataset, MapDataset):
        workers = reading.num_workers()
        fetcher = WorkerFetcher(samples=dataset.samples, make=make, num_workers=workers, depth=data.prefetch_depth,
                                on_corrupt=data.on_corrupt, max_corrupt=data.max_corrupt,
                                timeout_seconds=reading.timeout_seconds)  # fmt: skip
        reason = f"{reason}, {workers} processes" if workers else "in this process, because of --debug"
    elif data.on_corrupt == "skip":
        raise ConfigError("--data.on-corrupt skip is for data sets that are read a sample at a time",
                          expected="a data set with __getitem__", got=type(dataset).__name__,
                          fix="--data.on-corrupt error")  # fmt: skip
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
    mapped = getattr(dataset, "memory_mapped", False)
    if device.type == "cpu":
        return ("host", "memory-mapped file") if mapped else ("device", "in this process's memory already")
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
