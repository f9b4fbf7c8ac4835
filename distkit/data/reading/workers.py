"""Placement `workers`: map-style data sets read in worker processes, which are sent the samples to read.

Each sample is read with python's, numpy's and torch's global generators seeded by a key of (seed, position), so that
augmentations written against them (torchvision v2) are a function of the position: the number of workers, ranks and
restarts does not matter (C1).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import random
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from distkit.data.batch import Batch, map_leaves, map_tensors
from distkit.data.collate import ADVICE, collate_of, why_no_batch
from distkit.data.dataset import Indexable
from distkit.data.reading.fetchers import Batches, BatchMaker
from distkit.data.reading.worker_process import end_workers, iterator_of, start_worker, take_over_signal, waiting_for
from distkit.data.stream.requests import Request
from distkit.errors import DataError, TrainingError, masked, printable

logger = logging.getLogger(__name__)

#: What reading a damaged file raises: PIL (SyntaxError for some broken PNG files), torchvision.io, packed files.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, DataError, Image.DecompressionBombError)
#: Replacements tried for one sample before the data set counts as unreadable.
MAX_TRIES = 20
#: Tensors of a batch up to this size travel inside the message.
SMALL_BYTES = 8_192
#: Longest time that the death of a worker may go unnoticed.
LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Read:
    """What a worker answers: a collated batch and the samples it replaced, or why there is none.

    `failure` is a sample that cannot be read, `unfit` says why samples make no batch, `fault` what else the data set or
    `collate` raised.
    """

    batch: Batch | None
    replaced: tuple[str, ...] = ()
    failure: str | None = None
    fault: str | None = None
    unfit: str | None = None

    def pin_memory(self) -> Read:
        """The same with every tensor in pinned memory; torch's pinning thread calls it."""
        if self.batch is None:
            return self
        return replace(self, batch=map_tensors(lambda tensor: tensor.pin_memory(), unpacked_small(self.batch)))


#: In memory that is shared with the workers: the sample that each of them reads, counted from 1; 0: none.
Places: TypeAlias = "ctypes.Array[ctypes.c_int64]"


@dataclass(frozen=True)
class KeyedSamples(Dataset[object]):
    """A map-style data set that is indexed by (index, key) pairs, a batch at a time."""

    samples: Indexable
    on_corrupt: Literal["error", "skip"]
    places: Places | None = None

    def __getitems__(self, pairs: list[tuple[int, int]]) -> list[Read]:
        """Read a batch; torch's fetcher calls this and hands the result to `collate_fn`."""
        values: list[object] = []
        replaced: list[str] = []
        for index, key in pairs:
            try:
                values.append(self.read(index, key))
            except UNREADABLE as error:
                cause = f"{sample_name(self.samples, index)}: {type(error).__name__}: {error}"
                if self.on_corrupt == "error":
                    return [Read(None, failure=cause)]
                replaced.append(cause)
                try:
                    values.append(self.replacement(key))
                except UNREADABLE as last:
                    return [Read(None, failure=f"{cause}; {MAX_TRIES} replacements failed too, the last with {last}")]
            except Exception as error:
                fault = f"the data set failed at {sample_name(self.samples, index)}: {_in_words(error)}"
                return [Read(None, fault=fault)]
        return [self.collated(values, [index for index, _ in pairs], tuple(replaced))]

    def collated(self, values: list[object], indices: list[int], replaced: tuple[str, ...]) -> Read:
        """The samples `values`, numbered `indices`, as a batch, or why there is none."""
        self.note_place(-1)
        collate = collate_of(self.samples)
        try:
            return Read(packed_small(collate(values)), replaced)
        except Exception as error:
            if "shared memory" in str(error):
                raise  # the batch is made right there; `waiting_for` says what to do
            if collate is not default_collate:
                return Read(None, fault=f"collate of {type(self.samples).__name__} failed: {_in_words(error)}")
            names = [sample_name(self.samples, index) for index in indices]
            reason = why_no_batch(values, names) or str(error).splitlines()[0]
            advice = f"\n  expected: {_advice(values[0])}"
            return Read(None, unfit=f"samples do not make a batch: {reason}{advice}")

    def read(self, index: int, key: int) -> object:
        """Sample `index` with all global generators seeded from `key`, 0 to 2^64 - 1."""
        self.note_place(index)
        seed = key & (2**63 - 1)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        # torch.manual_seed would also queue a call for CUDA with every sample
        torch.default_generator.manual_seed(seed)
        return self.samples[index]

    def note_place(self, index: int) -> None:
        """Leave for the training process what this worker reads; -1: no sample."""
        worker = torch.utils.data.get_worker_info()
        if self.places is not None and worker is not None:
            self.places[worker.id] = index + 1

    def replacement(self, key: int) -> object:
        """Another sample in place of a damaged one: which one depends on the key only."""
        for attempt in range(MAX_TRIES):
            message = f"{key} {attempt}".encode()
            other = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") % len(self.samples)
            try:
                return self.read(other, key)
            except UNREADABLE:
                if attempt == MAX_TRIES - 1:
                    raise
        raise AssertionError("unreachable")


def _in_words(error: Exception) -> str:
    """The error, and the line that raised it."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}: {where.line}"
    return f"{type(error).__name__}: {error}\n  at:       {place}"


def _advice(sample: object) -> str:
    """What to do where torch makes no batch of samples like this one."""
    values = sample if isinstance(sample, tuple | list) else (sample,)
    if any(isinstance(value, Image.Image) for value in values):
        return "tensors: distkit.data.TensorSamples makes them of PIL images"
    return f"tensors of one shape, numbers, tuples and dicts of them; for others {ADVICE}"


def sample_name(samples: object, index: int) -> str:
    """The path of a sample where the data set knows it (ImageFolder's `samples`), else its number."""
    for attribute in ("samples", "imgs", "paths"):
        known = getattr(samples, attribute, None)
        if isinstance(known, list | tuple) and index < len(known):
            entry = known[index]
            path = entry[0] if isinstance(entry, list | tuple) else entry
            if isinstance(path, str | Path):
                return str(path)
    inner = getattr(samples, "dataset", None)  # torch's Subset
    positions = getattr(samples, "indices", None)
    if inner is not None and positions is not None:
        return sample_name(inner, int(positions[index]))
    wrapped = getattr(samples, "samples", None)  # TensorSamples
    return sample_name(wrapped, index) if hasattr(wrapped, "__getitem__") else f"sample {index}"


def sample_keys(seed: int, request: Request) -> list[int]:
    """A 64-bit key for each position: splitmix64 (Steele et al. 2014) from the run's seed.

    In numpy, because a handful of torch calls a batch would cost as much as reading a sample.
    """
    start = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8, person=b"distkit.workers").digest()
    x = np.arange(request.start, request.start + len(request.indices), dtype=np.uint64)
    x *= 0x9E3779B97F4A7C15
    x += np.uint64(int.from_bytes(start, "little"))
    x ^= x >> 30
    x *= 0xBF58476D1CE4E5B9
    x ^= x >> 27
    x *= 0x94D049BB133111EB
    x ^= x >> 31
    return x.tolist()


@dataclass(frozen=True)
class Small:
    """A small tensor on its way from a worker, inside the message instead of in shared memory of its own."""

    values: NDArray[np.generic]


def packed_small(batch: Batch) -> Batch:
    """The batch with small tensors as `Small`: a segment of shared memory costs about 0.2 ms to hand over."""

    def pack(tensor: torch.Tensor) -> object:
        try:
            return Small(tensor.numpy()) if tensor.nbytes <= SMALL_BYTES else tensor
        except TypeError:  # numpy has no bfloat16
            return tensor

    return cast(Batch, map_leaves(torch.Tensor, pack, batch)) if torch.utils.data.get_worker_info() else batch


def unpacked_small(batch: Batch) -> Batch:
    """The batch with every tensor as a tensor again."""
    return cast(Batch, map_leaves(Small, lambda small: torch.from_numpy(small.values), batch))


def first_of(reads: list[Read]) -> Read:
    """The batch is collated already: a collate function that only unpacks it."""
    return reads[0]


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Global generators are as before afterwards: for reading in the training process itself."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@dataclass(frozen=True, kw_only=True)
class WorkerFetcher:
    """Reads in `num_workers` processes of one rank (0: in this process, for debugging).

    Args:
        samples: the map-style data set; picklable where the platform does not fork.
        make: finishes batches on the training device.
        num_workers: processes.
        depth: batches that each worker makes ahead, >= 1.
        on_corrupt: what to do with a sample that cannot be read.
        max_corrupt: replaced samples after which the run ends.
        timeout_seconds: a batch that takes longer ends the run, > 0.
    """

    samples: Indexable
    make: BatchMaker
    num_workers: int
    depth: int
    on_corrupt: Literal["error", "skip"]
    max_corrupt: int
    timeout_seconds: float = 1800.0

    def open(self, requests: Iterator[Request]) -> Batches:
        """Start the processes."""
        return _WorkerBatches(self, requests)


class _WorkerBatches:
    def __init__(self, fetcher: WorkerFetcher, requests: Iterator[Request]) -> None:
        self._fetcher = fetcher
        self._asked: list[Request] = []
        self._num_replaced = 0
        workers = fetcher.num_workers
        self._places: Places | None = RawArray(ctypes.c_int64, workers) if workers else None
        if workers:
            take_over_signal()
        with warnings.catch_warnings():
            # more processes than cores are a choice: waiting for a slow disk needs no core
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                KeyedSamples(fetcher.samples, fetcher.on_corrupt, self._places),
                batch_sampler=self._pairs(requests),
                num_workers=workers,
                prefetch_factor=fetcher.depth if workers else None,
                timeout=min(fetcher.timeout_seconds, LOOK_SECONDS) if workers else 0,
                collate_fn=first_of,
                worker_init_fn=partial(start_worker, os.getpid()),
                pin_memory=fetcher.make.device.type == "cuda",
                # its own: the global generator must not be consumed here
                generator=torch.Generator(),
            )
            self._reads: Iterator[Read] | None = iterator_of(loader)

    def _pairs(self, requests: Iterator[Request]) -> Iterator[list[tuple[int, int]]]:
        for request in requests:
            self._asked.append(request)
            keys = sample_keys(self._fetcher.make.seed, request)
            yield list(zip(request.indices.tolist(), keys, strict=True))

    def __next__(self) -> Batch:
        if self._reads is None:
            raise StopIteration
        in_process = self._fetcher.num_workers == 0
        guard = untouched_generators() if in_process else waiting_for(self._reads, self._reading)
        with guard:
            read = self._next_read(self._reads)
        if read.fault is not None:
            raise TrainingError(read.fault)
        if read.unfit is not None:
            name = type(self._fetcher.samples).__name__
            raise DataError(f"{read.unfit}\n  from:     {name}.__getitem__, of what build_dataset returned")
        if read.failure is not None:
            raise DataError(
                "a sample cannot be read",
                expected="a file that its data set can decode",
                got=read.failure,
                fix="repair or delete the file, or --data.on-corrupt skip",
            )
        self._count(read.replaced)
        return self._fetcher.make.finish(unpacked_small(cast(Batch, read.batch)), self._asked.pop(0))

    def _next_read(self, reads: Iterator[Read]) -> Read:
        """The next answer. A SIGCHLD that comes just before the wait, or to another thread, is seen only after it."""
        seconds = self._fetcher.timeout_seconds
        end = time.monotonic() + seconds
        while True:
            try:
                return next(reads)
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
                if time.monotonic() >= end:
                    raise RuntimeError(
                        f"DataLoader timed out after {self._fetcher.timeout_seconds:g} seconds"
                    ) from error

    def _reading(self, worker: int) -> str:
        """What a worker that died was reading."""
        index = self._places[worker] - 1 if self._places is not None else -1
        if index < 0:
            return ""
        name, number = sample_name(self._fetcher.samples, index), f"sample {index}"
        return f" while it read {number}" + (f" ({name})" if name != number else "")

    def _count(self, replaced: tuple[str, ...]) -> None:
        for cause in replaced:
            logger.warning("replaced an unreadable sample: %s", printable(masked(str(cause))))
        self._num_replaced += len(replaced)
        if self._num_replaced > self._fetcher.max_corrupt:
            raise DataError(
                "too many samples are unreadable",
                expected=f"at most --data.max-corrupt {self._fetcher.max_corrupt} on a rank",
                got=f"{self._num_replaced}, the last {replaced[-1]}",
                fix="repair the data, or set a higher --data.max-corrupt",
            )

    def close(self) -> None:
        """End the worker processes and wait for them."""
        reads, self._reads = self._reads, None
        end_workers(reads)
