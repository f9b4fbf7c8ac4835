"""Residual networks for 32x32 images.

Source: He et al. 2016, arXiv:1512.03385: ResNet-18 of table 1 with the stem of section 4.2, and the family of 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distkit.errors import ConfigError, nearest
from distkit.models.init import kaiming_init_

Norm = Literal["batch", "group", "none"]
Shortcut = Literal["pad", "project"]
NORMS: tuple[str, ...] = get_args(Norm)
CHANNELS_PER_GROUP = 16


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of blocks at one resolution."""

    num_blocks: int
    channels: int
    stride: int
    """Of the first block; the others have 1."""


def build_norm(norm: Norm, channels: int) -> nn.Module:
    """The layer after a convolution. Groups hold 16 channels (Wu and He 2018, arXiv:1803.08494, table 3).

    Raises:
        ConfigError: `norm` is none of NORMS, or the channels do not fill whole groups.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "none":
        return nn.Identity()
    if norm != "group":
        raise ConfigError(
            "norm has an invalid value",
            expected="one of " + ", ".join(NORMS),
            got=norm,
            fix=f'norm="{nearest(norm, NORMS) or "batch"}"',
        )
    if channels > CHANNELS_PER_GROUP and channels % CHANNELS_PER_GROUP:
        raise ConfigError(
            f'norm="group" cannot split {channels} channels',
            expected=f"at most {CHANNELS_PER_GROUP}, or a multiple of {CHANNELS_PER_GROUP}",
            got=channels,
            fix=f"width={math.ceil(channels / CHANNELS_PER_GROUP) * CHANNELS_PER_GROUP}",
        )
    return nn.GroupNorm(max(1, channels // CHANNELS_PER_GROUP), channels)


class PadShortcut(nn.Module):
    """Option A of He et al.: every stride-th pixel, and zeros for the channels that are new. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm, shortcut: Shortcut) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)
        self.norm1 = build_norm(norm, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = build_norm(norm, out_channels)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = PadShortcut(in_channels, out_channels, stride)
        else:
            project = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=bias)
            self.shortcut = nn.Sequential(project, build_norm(norm, out_channels))

    def branch_end(self) -> nn.Module:
        """The module whose weight scales the branch; see distkit.models.init.ResidualBlock."""
        return self.conv2 if isinstance(self.norm2, nn.Identity) else self.norm2

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]."""
        branch = F.relu(self.norm1(self.conv1(x)), inplace=True)
        branch = self.norm2(self.conv2(branch))
        return F.relu(branch + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """A 3x3 stem without pooling, the stages, the mean over pixels, a linear head.

    Convolutions start as Kaiming normal over fan_out, the head as torch's Linear does. Without norm layers the last
    convolution of each of the L blocks is divided by sqrt(L), which bounds the variance of the output whatever the
    depth (Hayou et al. 2021, arXiv:2010.12859), and convolutions have biases.

    Args:
        stages: from the stem on; the stem has the channels of the first.
        num_classes: C of the logits.
        in_channels: of the images.
        norm: "batch", "group" (16 channels a group) or "none".
        shortcut: where a block changes shape, "project" (option B: 1x1 convolution and norm) or "pad" (option A).

    Raises:
        ConfigError: `norm` is not known or does not fit the channels, or "pad" would have to drop channels.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        norm: Norm = "batch",
        shortcut: Shortcut = "project",
    ) -> None:
        super().__init__()
        channels = stages[0].channels
        stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=norm == "none")
        self.stem = nn.Sequential(stem, build_norm(norm, channels), nn.ReLU(inplace=True))
        self.stages = nn.Sequential()
        for stage in stages:
            if shortcut == "pad" and stage.channels < channels:
                raise ConfigError(
                    'shortcut="pad" cannot drop channels',
                    expected="stages that never get narrower",
                    got=f"{channels} then {stage.channels} channels",
                    fix='shortcut="project"',
                )
            blocks = nn.Sequential()
            for index in range(stage.num_blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(BasicBlock(channels, stage.channels, stride, norm, shortcut))
                channels = stage.channels
            self.stages.append(blocks)
        self.head = nn.Linear(channels, num_classes)
        kaiming_init_(self.stem, mode="fan_out")
        kaiming_init_(self.stages, mode="fan_out")
        if norm == "none":
            self._scale_branches_()

    def _scale_branches_(self) -> None:
        blocks = [module for module in self.modules() if isinstance(module, BasicBlock)]
        with torch.no_grad():
            for block in blocks:
                block.conv2.weight.div_(math.sqrt(len(blocks)))

    def forward(self, images: Tensor) -> Tensor:
        """images [B, in_channels, H, W] float -> logits [B, num_classes]."""
        features: Tensor = self.stages(self.stem(images))
        # A plain mean: the backward of adaptive_avg_pool2d is not deterministic on CUDA.
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def resnet18(num_classes: int = 10, width: int = 64, norm: Norm = "batch", in_channels: int = 3) -> ResNet:
    """ResNet-18 for 32x32 images: four stages of two blocks, `width` to 8 * `width` channels, projections.

    11,173,962 parameters at width 64 with 10 classes. Raises ConfigError as `ResNet` does.
    """
    stages = [Stage(num_blocks=2, channels=width << i, stride=1 if i == 0 else 2) for i in range(4)]
    return ResNet(stages, num_classes=num_classes, in_channels=in_channels, norm=norm, shortcut="project")


def resnet_cifar(
    depth: int, width: int = 16, num_classes: int = 10, norm: Norm = "batch", in_channels: int = 3
) -> ResNet:
    """The family of He et al. section 4.2: three stages of (depth - 2) / 6 blocks, `width` to 4 * `width` channels.

    Shortcuts are option A, as in the paper: subsampled and zero-padded, without parameters.
    Depth 20 at width 16 has 269,722 parameters (0.27 M in table 6).

    Args:
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110...

    Raises:
        ConfigError: depth is not 6n + 2; otherwise as `ResNet` does.
    """
    if depth < 8 or depth % 6 != 2:
        near = max(8, round((depth - 2) / 6) * 6 + 2)
        raise ConfigError(
            "depth has an invalid value", expected="6n + 2: 8, 14, 20, 32, 44, 56, 110", got=depth, fix=str(near)
        )
    num_blocks = (depth - 2) // 6
    stages = [Stage(num_blocks=num_blocks, channels=width << i, stride=1 if i == 0 else 2) for i in range(3)]
    return ResNet(stages, num_classes=num_classes, in_channels=in_channels, norm=norm, shortcut="pad")
