"""Models that recipes combine, and ways to initialise them. They know no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distkit.models.fastnet import FastNet, whitening_init_
from distkit.models.init import dirac_init_, kaiming_init_, trunc_normal_init_, xavier_init_, zero_init_residual_
from distkit.models.resnet import NORMS, Norm, ResNet, Shortcut, Stage, resnet18, resnet_cifar

if TYPE_CHECKING:
    from distkit.models.gpt import GPT, Block, GPTConfig
    from distkit.models.sampling import generate

__all__ = [
    "GPT",
    "NORMS",
    "Block",
    "FastNet",
    "GPTConfig",
    "Norm",
    "ResNet",
    "Shortcut",
    "Stage",
    "dirac_init_",
    "generate",
    "kaiming_init_",
    "resnet18",
    "resnet_cifar",
    "trunc_normal_init_",
    "whitening_init_",
    "xavier_init_",
    "zero_init_residual_",
]


def __getattr__(name: str) -> object:
    """The transformer, imported on first use: its module imports torch._dynamo, which takes over a second."""
    if name not in ("GPT", "Block", "GPTConfig", "generate"):
        raise AttributeError(f"distkit.models has no {name}")
    from distkit.models import gpt, sampling

    return getattr(sampling if name == "generate" else gpt, name)
