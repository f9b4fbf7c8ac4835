"""Initialisers that walk a whole model. Each mutates its argument and draws from torch's global generator.

Norm layers are left alone: torch makes them the identity (weight 1, bias 0), which is what these papers assume.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn

from distkit.errors import ConfigError

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


@runtime_checkable
class ResidualBlock(Protocol):
    """A module that computes shortcut(x) + branch(x)."""

    def branch_end(self) -> nn.Module:
        """The last module with a weight in the branch: the branch is zero when that weight (and its bias) is."""
        ...


def weighted_layers(model: nn.Module) -> Iterator[Conv | nn.Linear]:
    """Every convolution and linear layer of `model`, itself included, in definition order."""
    for module in model.modules():
        if isinstance(module, Conv | nn.Linear):
            yield module


def kaiming_init_(model: nn.Module, mode: Literal["fan_in", "fan_out"] = "fan_in") -> None:
    """Normal weights of variance 2 / fan and zero biases, for convolutions and linear layers followed by a ReLU.

    fan_in keeps the variance of activations from layer to layer, fan_out the variance of gradients.
    Source: He et al. 2015, arXiv:1502.01852, equations 10 and 14; torch.nn.init.kaiming_normal_.
    """
    for layer in weighted_layers(model):
        nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def xavier_init_(model: nn.Module) -> None:
    """Uniform weights of variance 2 / (fan_in + fan_out) and zero biases, for convolutions and linear layers.

    Source: Glorot and Bengio 2010, equation 16; torch.nn.init.xavier_uniform_.
    """
    for layer in weighted_layers(model):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def trunc_normal_init_(model: nn.Module, std: float = 0.02) -> None:
    """Normal weights cut off at two standard deviations and zero biases, for convolutions, linear layers, embeddings.

    Source: Devlin et al. 2018 (BERT), std 0.02; torch.nn.init.trunc_normal_, whose bounds are absolute.

    Raises:
        ConfigError: std is not > 0.
    """
    if not std > 0:
        raise ConfigError("trunc_normal_init_: std has an invalid value", expected="> 0", got=std, fix="std=0.02")
    for module in model.modules():
        if isinstance(module, Conv | nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, Conv | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def zero_init_residual_(model: nn.Module) -> None:
    """Start every residual block as its shortcut: the last weight of each branch, and its bias, become zero.

    Source: Goyal et al. 2017, arXiv:1706.02677, section 5.1. A block is a module with `branch_end()`.

    Raises:
        ConfigError: the model has no such block.
    """
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    if not blocks:
        raise ConfigError(
            f"zero_init_residual_: {type(model).__name__} has no residual block",
            expected="at least one module with a method branch_end() -> nn.Module",
            fix="a model of distkit.models.resnet, or give the blocks of this one a branch_end",
        )
    for block in blocks:
        for parameter in block.branch_end().parameters(recurse=False):
            nn.init.zeros_(parameter)


def dirac_init_(model: nn.Module) -> None:
    """Make the first filters of every ungrouped convolution pass their input on; further filters keep their values.

    Filter i becomes the identity of channel i for i < min(in_channels, out_channels).
    Source: Zagoruyko and Komodakis 2017, arXiv:1706.00388; torch.nn.init.dirac_; partial use as in arXiv:2404.00498.
    """
    for module in model.modules():
        if isinstance(module, Conv) and module.groups == 1:
            with torch.no_grad():
                nn.init.dirac_(module.weight[: module.in_channels])
