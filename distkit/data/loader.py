"""From the sample stream to a microbatch on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from distkit.config import BatchSplit
from distkit.data.batch import Batch, to_device
from distkit.data.dataset import Augments, Dataset
from distkit.data.draws import Draws
from distkit.data.stream import SampleStream, microbatch_start


@dataclass(kw_only=True)
class ResidentLoader:
    """Fetches in the training process: for data that lies in memory, on the device at best.

    Args:
        dataset: what to read.
        seed: of the sample stream and of every per-sample draw (C1).
        split: how a global batch is cut.
        rank: this process.
        device: where batches are wanted.
        channels_last: lay out 4-dim tensors as NHWC.
    """

    dataset: Dataset
    seed: int
    split: BatchSplit
    rank: int
    device: torch.device
    channels_last: bool
    stream: SampleStream = field(init=False)

    def __post_init__(self) -> None:
        self.stream = SampleStream(self.seed, len(self.dataset), self.split.global_batch_size)
        self._augment = self.dataset.augment if isinstance(self.dataset, Augments) else None

    def microbatch(self, step: int, accum_index: int) -> Batch:
        """This rank's microbatch `accum_index` of global batch `step`, on the device; never waits for it."""
        start, count = microbatch_start(step, self.split, self.rank, accum_index), self.split.microbatch_size
        indices = torch.from_numpy(self.stream.indices(start, count))
        batch = self.dataset.fetch(indices)
        if self._augment is None:
            return to_device(batch, self.device, self.channels_last)
        positions = torch.arange(start, start + count, device=self.device)
        batch = self._augment(to_device(batch, self.device), Draws(self.seed, positions))
        return to_device(batch, self.device, self.channels_last)
