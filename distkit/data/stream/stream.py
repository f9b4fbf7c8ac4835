"""The endless sample stream (contract C1): which sample is at which position, and which positions a rank reads.

Position p is in epoch p // n at place p % n, and holds sample `permute(seed, p // n, n, p % n)`. Nothing here knows
about worlds, workers or restarts beyond the positions that are asked for.
"""

from __future__ import annotations

import numpy as np

from distkit.config import BatchSplit
from distkit.config.check import require, require_number
from distkit.data.stream.permutation import MAX_LENGTH, Int64, permute
from distkit.errors import DataError


def microbatch_start(step: int, split: BatchSplit, rank: int, accum_index: int) -> int:
    """First position of a microbatch, which is that position and the `split.microbatch_size - 1` after it.

    A step's positions are dealt in microbatches, round by round over the ranks: the starts of one rank's microbatches
    are `world_size * microbatch_size` apart, across steps too.

    Args:
        step: which global batch, >= 0.
        split: how a global batch is cut.
        rank: 0 to split.world_size - 1.
        accum_index: which of the rank's microbatches of this step, 0 to split.accum_steps - 1.
    """
    offset = (accum_index * split.world_size + rank) * split.microbatch_size
    return step * split.global_batch_size + offset


class SampleStream:
    """Sample indices by position. It keeps nothing: the same question always has the same answer.

    Args:
        seed: seed of the run, 0 to 2^63 - 1.
        num_samples: length n of the data set, 1 to 2^48.
        global_batch_size: samples of one step, >= 1.

    Raises:
        ConfigError: the seed or the batch size is out of range.
        DataError: the length is.
    """

    def __init__(self, seed: int, num_samples: int, global_batch_size: int) -> None:
        require(0 <= seed < 2**63, "seed", "an integer in [0, 2^63)", seed, "0")
        require_number("global_batch_size", global_batch_size, least=1, example="128")
        if not 1 <= num_samples <= MAX_LENGTH:
            raise DataError("the data set has a length that cannot be streamed", expected="1 to 2^48", got=num_samples)
        self.seed = seed
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size

    def indices(self, start_position: int, count: int) -> Int64:
        """Sample indices at the positions start_position .. start_position + count - 1, int64 [count].

        The positions may span several epochs. `start_position` >= 0, start_position + count < 2^63.
        """
        return self.indices_at(start_position + np.arange(count))

    def indices_at(self, positions: Int64) -> Int64:
        """Sample indices at any positions, int64 [N], ascending; int64 [N]."""
        if positions.size == 0:
            return positions
        epochs, places = np.divmod(positions, self.num_samples)
        first = int(epochs[0])
        return permute(self.seed, first if epochs[-1] == first else epochs, self.num_samples, places)

    def global_batch(self, step: int) -> Int64:
        """Sample indices of one whole step, int64 [global_batch_size], over all ranks; tests compare with it."""
        return self.indices(step * self.global_batch_size, self.global_batch_size)
