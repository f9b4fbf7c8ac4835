"""What the tests of the batch augmentations share."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch

from distkit.data import Draws

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def images_of(batch=7, channels=3, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def smooth_images(batch=4, channels=3, height=32, width=32, seed=0):
    """Images without noise, as photographs are: every colour occurs."""
    coarse = images_of(batch, channels, 5, 6, seed).float()
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return fine.clamp(0, 255).round().to(torch.uint8)


def draws_of(batch, seed=3, start=1000, device="cpu"):
    return Draws(seed, torch.arange(start, start + batch, device=device))


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def assert_split_changes_nothing(function, *tensors):
    """`function(*tensors, draws)` on a whole batch and on parts of it gives the same."""
    batch = len(tensors[0])
    whole = outputs(function(*tensors, draws_of(batch)))
    for size in (1, 5):
        parts = []
        for start in range(0, batch, size):
            part = [tensor[start : start + size] for tensor in tensors]
            parts.append(outputs(function(*part, draws_of(len(part[0]), start=1000 + start))))
        for expected, found in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.cat(found).equal(expected)


@contextmanager
def no_waiting():
    """Inside, whatever waits for the CUDA device raises."""
    with warnings.catch_warnings():
        # torch says once in a process that this mode does not see everything
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same_bits(one, other):
    """Whether two CPU tensors are alike in dtype, shape and every bit, also of zeros and NaNs."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return first.equal(second)


def assert_cuda_agrees(function, *tensors, start=1000):
    """The same bits on CUDA, without a moment's waiting for it."""
    batch = len(tensors[0])
    expected = outputs(function(*tensors, draws_of(batch, start=start)))
    on_device = [tensor.cuda() for tensor in tensors]
    draws = draws_of(batch, start=start, device="cuda")
    with no_waiting():
        found = outputs(function(*on_device, draws))
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cuda"
        assert same_bits(one.cpu(), other)
