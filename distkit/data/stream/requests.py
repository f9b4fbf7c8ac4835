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

#: Positions whose samples are computed at once, after those of the first microbatch: 1 MiB with what that takes, 1 ms.
BLOCK = 16_384


class Request(NamedTuple):
    """One batch to be read: samples `indices` (int64 [B]) at the positions `start` to `start + B - 1`.

    Positions key every random draw (C1). The indices are the caller's own.
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
    count, stride = split.microbatch_size, split.world_size * split.microbatch_size
    start, microbatches = microbatch_start(step, split, rank, accum_index), 1
    while True:
        starts = start + stride * np.arange(microbatches)
        positions = starts[:, None] + np.arange(count)
        for indices in stream.indices_at(positions.ravel()).reshape(positions.shape):
            yield Request(start, indices)
            start += stride
        microbatches = max(1, BLOCK // count)


def evaluation_requests(samples: range, size: int) -> Iterator[Request]:
    """Consecutive `samples` in batches of `size`, the last one smaller; their positions are their own numbers."""
    for start in range(samples.start, samples.stop, size):
        yield Request(start, np.arange(start, min(start + size, samples.stop)))
