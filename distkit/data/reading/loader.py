"""From the sample stream to microbatches on the device, through any placement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice

from distkit.config import BatchSplit
from distkit.data.batch import Batch
from distkit.data.reading.fetchers import Batches, Fetcher
from distkit.data.reading.workers import WorkerFetcher
from distkit.data.stream.requests import Request, evaluation_requests, training_requests
from distkit.data.stream.stream import SampleStream


class Loader:
    """A rank's microbatches in the order of steps; a jump to any other step is possible and restarts reading.

    Args:
        fetcher: how samples are read.
        stream: which samples; C1.
        split: how a global batch is cut.
        rank: this process.
    """

    def __init__(self, fetcher: Fetcher, stream: SampleStream, split: BatchSplit, rank: int) -> None:
        self.fetcher, self.stream, self.split, self.rank = fetcher, stream, split, rank
        self._batches: Batches | None = None
        self._next = (0, 0)

    def microbatch(self, step: int, accum_index: int) -> Batch:
        """This rank's microbatch `accum_index` of global batch `step`, on the device.

        Raises:
            DataError, TrainingError: what reading it raised.
        """
        if self._batches is None or self._next != (step, accum_index):
            self.close()
            requests = training_requests(self.stream, self.split, self.rank, step, accum_index)
            self._batches = self.fetcher.open(requests)
        last = accum_index + 1 == self.split.accum_steps
        self._next = (step + 1, 0) if last else (step, accum_index + 1)
        return self._batches.__next__()

    def first(self) -> Batch:
        """This rank's first microbatch of a run, read in this process and apart from the others.

        Raises:
            DataError, TrainingError: what reading it raised.
        """
        return read_one(self.fetcher, training_requests(self.stream, self.split, self.rank, 0, 0))

    def close(self) -> None:
        """Leave no thread and no process behind. The loader can be used again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


class EvaluationLoader:
    """A finite range of samples in their own order, each exactly once."""

    def __init__(self, fetcher: Fetcher, num_samples: int) -> None:
        self.fetcher, self.num_samples = fetcher, num_samples

    def __len__(self) -> int:
        """Number of samples in the whole set."""
        return self.num_samples

    def open(self, samples: range, size: int) -> Batches:
        """Batches of at most `size` of these samples, in order; close it afterwards."""
        return self.fetcher.open(evaluation_requests(samples, size))

    def first(self, size: int) -> Batch:
        """The first samples, at most `size`, read in this process."""
        return read_one(self.fetcher, evaluation_requests(range(min(size, self.num_samples)), size))


def read_one(fetcher: Fetcher, requests: Iterator[Request]) -> Batch:
    """The batch of the first request; nothing is read ahead, and no process is started."""
    if isinstance(fetcher, WorkerFetcher):
        fetcher = replace(fetcher, num_workers=0)
    with closing(fetcher.open(islice(requests, 1))) as batches:
        return batches.__next__()
