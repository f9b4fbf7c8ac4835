"""The arithmetic of a run: autocasting for 16 bits, and what fp32 and tf32 mean."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch

from distkit.errors import ConfigError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which forward passes run; it may be entered again and again.

    Raises:
        ConfigError: the device has no such arithmetic.
    """
    cuda = device.type == "cuda"
    if precision == "tf32" and not (cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise ConfigError("--precision tf32 needs an NVIDIA GPU of compute capability 8.0 or later",
                          got=f"device {device}", fix="--precision fp32")  # fmt: skip
    if precision not in AUTOCAST:
        return nullcontext()
    # torch would emulate it, at a fraction of the speed of fp32
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(False):
        raise ConfigError("--precision bf16 needs an NVIDIA GPU of compute capability 8.0 or later",
                          got=torch.cuda.get_device_name(device), fix="--precision fp16")  # fmt: skip
    # weights change every step, and accumulation re-enters: torch drops the cast copies at each exit
    return torch.autocast(device.type, dtype=AUTOCAST[precision])


def set_fp32_precision(precision: str) -> None:
    """fp32 means IEEE fp32, in cuDNN's convolutions too, where torch's default is tf32 (torch.backends docs)."""
    tf32 = precision == "tf32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there are newer names
        # code that reads the older names (inductor's convolutions, cudnn.flags) gets an error where the two differ
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    choice = "tf32" if tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = choice
    torch.backends.cudnn.conv.fp32_precision = choice  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = choice  # type: ignore[attr-defined]
