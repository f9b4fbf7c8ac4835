"""A small, fast network for 32x32 images, after airbench94 of Keller Jordan, who reports 94 % on CIFAR-10.

Source: Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498.

Expected use:
    model = FastNet()
    whitening_init_(model, train_images[:5000])  # normalised as in training, the same images on every rank

and then 9.9 epochs of SGD with Nesterov momentum 0.85, global batch 1024, label smoothing 0.2, random flip (alternating
over epochs in the paper) and translation by 2 pixels, in bf16 or fp16 with channels_last on a GPU. Peak lr 1.5 for the
mean loss (the paper's 11.5 over its own unit), linear from 0.2 of it at the start over the peak at 23 % of the run to
0.07 of it at the end; weight decay 1.3e-3. Biases of the batch norms take 64 times that lr and 1/64 of that decay.
The paper also averages weights (lookahead), freezes the whitening bias after 3 epochs and evaluates six views.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distkit.errors import ConfigError, DataError
from distkit.models.init import dirac_init_

PATCH = 2
CHUNK = 512


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """A norm that follows the last few batches (0.4 of the newest), with a trained bias and a weight fixed at 1."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class ConvGroup(nn.Sequential):
    """[B, in, H, W] -> [B, out, H // 2, W // 2]: two 3x3 convolutions, pooled after the first."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            batch_norm(out_channels),
            nn.GELU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            batch_norm(out_channels),
            nn.GELU(),
        )


class FastNet(nn.Module):
    """Frozen 2x2 whitening, GELU, three conv groups, a 3x3 max-pool, a linear head with scaled logits.

    32x32 images shrink 32, 31, 15, 7, 3, 1. The convolutions of the groups start as the identity on their first
    filters (`dirac_init_`). Parameters with requires_grad False: the whitening weight and the norm weights.

    Args:
        num_classes: C of the logits.
        widths: output channels of the three conv groups.
        logit_scale: factor on the logits, which sets how sharp they are at the start.
        in_channels: of the images.

    Raises:
        ConfigError: widths are not three numbers >= 1.
    """

    def __init__(
        self,
        num_classes: int = 10,
        widths: Sequence[int] = (64, 256, 256),
        logit_scale: float = 1 / 9,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(widths) != 3 or min(widths) < 1:
            raise ConfigError(
                "FastNet: widths has an invalid value",
                expected="three numbers >= 1",
                got=tuple(widths),
                fix="widths=(64, 256, 256)",
            )
        self.logit_scale = logit_scale
        num_filters = 2 * in_channels * PATCH * PATCH
        self.whiten = nn.Conv2d(in_channels, num_filters, PATCH)
        self.whiten.weight.requires_grad_(False)
        channels = (num_filters, *widths)
        self.groups = nn.Sequential(*(ConvGroup(a, b) for a, b in zip(channels, widths, strict=False)))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        dirac_init_(self.groups)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, in_channels, 32, 32] float -> logits [B, num_classes]."""
        features = self.groups(F.gelu(self.whiten(images)))
        pooled = F.max_pool2d(features, 3).flatten(1)
        logits: Tensor = self.head(pooled) * self.logit_scale
        return logits


def patch_second_moment(images: Tensor) -> Tensor:
    """images [N, C, H, W] float -> mean of p pᵀ over all 2x2 patches p, [4 C, 4 C] float64 on the CPU."""
    num_values = images.shape[1] * PATCH * PATCH
    total = torch.zeros(num_values, num_values, dtype=torch.float64)
    count = 0
    for chunk in torch.split(images, CHUNK):
        patches = F.unfold(chunk.detach().cpu().double(), PATCH).transpose(1, 2).reshape(-1, num_values)
        total += patches.T @ patches
        count += len(patches)
    return total / count


def whitening_init_(model: FastNet, images: Tensor, eps: float = 5e-4) -> None:
    """Set the first layer so that its outputs over 2x2 patches are uncorrelated with variance near 1.

    Filters are v / sqrt(λ + eps) for the eigenpairs (λ, v) of the patches' second moment, largest λ first, then
    their negatives, since the GELU behind keeps one sign. Computed on the CPU in float64 with the largest entry of
    every v positive, so equal images give equal filters on every rank. Waits for the device: call it before training.

    Args:
        model: changed in place; the whitening weight keeps its device and dtype, the bias becomes zero.
        images: [N, C, H, W] float, normalised as in training; the paper takes 5,000.
        eps: added to each eigenvalue, in squared units of the images.

    Raises:
        DataError: the images have another shape or dtype, are none, or hold NaN or infinity.
    """
    channels = model.whiten.in_channels
    if images.ndim != 4 or images.shape[1] != channels or len(images) == 0 or not images.is_floating_point():
        raise DataError(
            "whitening_init_: the images do not fit",
            expected=f"float [N, {channels}, H, W], normalised as in training, N >= 1",
            got=f"{images.dtype} {list(images.shape)}",
            fix="images = (uint8_images.float() / 255 - mean) / std",
        )
    moment = patch_second_moment(images)
    if not torch.isfinite(moment).all():
        raise DataError("whitening_init_: the images hold NaN or infinity", expected="finite images")
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)
    vectors = eigenvectors.flip(1).T
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    filters = vectors * largest.sign() / (eigenvalues.flip(0).clamp_min(0) + eps).sqrt()[:, None]
    with torch.no_grad():
        model.whiten.weight.copy_(torch.cat((filters, -filters)).view_as(model.whiten.weight))
        if model.whiten.bias is not None:
            model.whiten.bias.zero_()
