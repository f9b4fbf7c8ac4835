"""Which samples are read next, in order: the questions that every placement answers alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distkit.config import BatchSplit
from distkit.data.stream.permutation import Int64
from distkit.data.stream.stream import SampleStream, microbatch_start


class Request(NamedTuple):
    """One batch to be read: samples `indices` (int64 [B]) at the positions `start` to `start + B - 1`.

    Positions key every random draw (C1).
    """

    start: int
    indices: Int64

    def positions(self, device: torch.device) -> Tensor:
        """int64 [B] on `device`, without a copy from the host."""
        return torch.arange(self.start, self.start + len(self.indices), device=device)


def training_requests(
    stream: SampleStream, split: BatchSplit, rank: int, step: int, accum_index: int
) -> Iterator[Request]:
    """A rank's microbatches from microbatch `accum_index` of `step` on, without end."""
    count = split.microbatch_size
    while True:
        while accum_index < split.accum_steps:
            start = microbatch_start(step, split, rank, accum_index)
            yield Request(start, stream.indices(start, count))
            accum_index += 1
        step, accum_index = step + 1, 0


def evaluation_requests(samples: range, size: int) -> Iterator[Request]:
    """Consecutive `samples` in batches of `size`, the last one smaller; their positions are their own numbers."""
    for start in range(samples.start, samples.stop, size):
        yield Request(start, np.arange(start, min(start + size, samples.stop)))
