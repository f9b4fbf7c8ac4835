"""What a run changes in its process, and putting it back: for runs that are started from Python, one after another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distkit.runtime.seeding import capture_rng, restore_rng


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Outside, threads, kernels, precision, global generators and environment variables are as they were before."""
    device = torch.device("cuda") if torch.cuda.is_initialized() else torch.device("cpu")  # type: ignore[no-untyped-call]
    generators, environment = capture_rng(device), dict(os.environ)
    threads = torch.get_num_threads()
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    flags = [(owner, name, getattr(owner, name)) for owner, name in _FLAGS]
    try:
        yield
    finally:
        restore_rng(generators, device)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        for owner, name, value in flags:
            setattr(owner, name, value)


#: Of torch, what `runtime.process.start` and `strategies.set_fp32_precision` set.
_FLAGS: tuple[tuple[object, str], ...] = (
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cuda.matmul, "fp32_precision"),
    (torch.backends.cudnn.conv, "fp32_precision"),  # type: ignore[attr-defined]
    (torch.backends.cudnn.rnn, "fp32_precision"),
)
