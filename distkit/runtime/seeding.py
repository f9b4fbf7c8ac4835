"""One seed for everything random: every generator gets a key derived from (seed, what it is for)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit key from the run's seed and a purpose, such as ("rank", 3); the same on every machine (BLAKE2b)."""
    text = "\x00".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's global generators, on the CPU and on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators start from `seed`; outside they are as they were."""
    python, numpy_state = random.getstate(), np.random.get_state()
    # of the GPUs this process's own: left to itself torch asks all of them, and warns of that
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
