"""Mixup and CutMix, whose partner is a function of the position, so that no split of a batch changes it.

The usual partner, another sample of the same microbatch, depends on how the global batch was cut (against C1). Here it
is any sample of the data set, chosen by a draw, and fetched for this purpose. In a data set whose samples are on the
training device:

    def augment(self, batch, draws):
        images, labels = batch
        other = partners(draws, len(self))
        images = self.change(images, draws)
        other_images = self.change(self.images.index_select(0, other), partner_draws(draws))
        images, share = MixUp(alpha=0.2).apply(images, other_images, draws)
        return images, labels, self.labels.index_select(0, other), share

and in the recipe `mixup_cross_entropy(model(images), labels, other_labels, share)` from distkit.losses. Where samples
are on the host, `partners(Draws(seed, positions), n)` with positions on the CPU gives the indices to fetch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from distkit.config.check import require_number
from distkit.data.augment.boxes import inside
from distkit.data.stream.draws import Draws
from distkit.errors import DataError

#: Entries of the inverse distribution function a share is drawn from.
NUM_SHARES = 2**16
#: Nodes of the integral behind it.
NUM_NODES = 2**18
#: Keeps a partner's own draws apart from the sample's; any number below 2^63 will do.
PARTNER_KEY = 0x5061_7274_6E65_7200


def partners(draws: Draws, num_samples: int) -> Tensor:
    """Index of the sample that is mixed into each: int64 [B], uniform in 0 .. num_samples - 1, on the draws' device.

    Favours no sample by more than num_samples / 2^63. Reads the draw `partner`.
    """
    return draws.bits("partner").bitwise_and_(2**63 - 1).remainder_(num_samples)


def partner_draws(draws: Draws) -> Draws:
    """Draws for the partners' own augmentation, independent of those for the samples themselves."""
    return Draws(draws.seed ^ PARTNER_KEY, draws.positions)


def mixup(images: Tensor, other_images: Tensor, share: Tensor) -> Tensor:
    """share * images + (1 - share) * other_images (Zhang et al. 2018, arXiv:1710.09412).

    Args:
        images: float [B, C, H, W], normalised.
        other_images: likewise, the partners.
        share: float32 [B] in [0, 1], the part of `images`.

    Raises:
        DataError: the images are not floats.
    """
    if not images.is_floating_point():
        raise DataError("mixup takes normalised images", expected="float32 [B, C, H, W]", got=images.dtype)
    own = share[:, None, None, None].to(images.dtype)
    # Three operations that round once each: torch.lerp is fused on some devices and not on others.
    return images.mul(own).add_(other_images.mul(1 - own))


def cutmix(images: Tensor, other_images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The partner's pixels in a box (Yun et al. 2019, arXiv:1905.04899).

    Args:
        images: [B, C, H, W], any dtype.
        other_images: likewise, the partners.
        boxes: int64 [B, 4], top, left, height, width, inside the image.

    Returns:
        the mixed images, and share float32 [B], the part of the pixels that are the image's own.
    """
    height, width = images.shape[2:]
    mixed = torch.where(inside(boxes, height, width), other_images, images)
    own = height * width - boxes[:, 2] * boxes[:, 3]
    # CUDA divides by a number as it multiplies by the reciprocal; up to 2^24 pixels the float32 is that of a division.
    return mixed, own.to(torch.float64).mul_(1 / (height * width)).to(torch.float32)


@lru_cache(maxsize=8)
def beta_table(alpha: float) -> Tensor:
    """Quantiles of Beta(alpha, alpha): float64 [65536] on the CPU, entry k at probability (k + 1/2) / 65536.

    The lower half is integrated over u = x^min(alpha, 1), where the density is finite; the upper half mirrors it.
    """
    power = min(alpha, 1.0)
    u = np.linspace(0.0, 0.5**power, NUM_NODES + 1)
    x = u ** (1 / power)
    # Scaled to 1 at x = 1/2, so that a large alpha does not underflow.
    density = (2 * x) ** (alpha - power) * (2 * (1 - x)) ** (alpha - 1)
    cumulated = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    probability = (np.arange(NUM_SHARES // 2) + 0.5) / NUM_SHARES
    lower = np.interp(probability, cumulated / (2 * cumulated[-1]), u) ** (1 / power)
    return torch.from_numpy(np.concatenate([lower, 1 - lower[::-1]]))


@lru_cache(maxsize=32)
def _shares(alpha: float, device: torch.device) -> Tensor:
    return beta_table(alpha).to(torch.float32).to(device, non_blocking=True)


@lru_cache(maxsize=32)
def _sides(alpha: float, device: torch.device) -> Tensor:
    """Side of a CutMix box in 2^-16 of the image's, sqrt(1 - share), as int64 [65536]."""
    sides = (1 - beta_table(alpha)).clamp_(0, 1).sqrt_().mul_(2**16).round_()
    return sides.to(torch.int64).to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class MixUp:
    """A weighted mean of two images, the weight from Beta(alpha, alpha) (Zhang et al. 2018, arXiv:1710.09412)."""

    alpha: float = 0.2
    """Of the Beta distribution, 0.01 to 1000: small leaves most images nearly alone, 1 is uniform."""

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, least=0.01, most=1000, example="0.2")

    def share(self, draws: Draws) -> Tensor:
        """float32 [B] in [0, 1], the part of the image itself. Reads the draw `mixup`."""
        which = draws.integers("mixup", 0, NUM_SHARES)
        return _shares(self.alpha, which.device).index_select(0, which)

    def apply(self, images: Tensor, other_images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """float [B, C, H, W] twice -> mixed images, and share float32 [B] for losses.mixup_cross_entropy."""
        share = self.share(draws)
        return mixup(images, other_images, share), share


@dataclass(frozen=True, kw_only=True)
class CutMix:
    """A box of another image, its area from Beta(alpha, alpha), its centre anywhere, cut at the edges.

    Source: Yun et al. 2019, arXiv:1905.04899, algorithm 1; sides in even pixels as there.
    """

    alpha: float = 1.0
    """Of the Beta distribution, 0.01 to 1000."""

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, least=0.01, most=1000, example="1.0")

    def boxes(self, draws: Draws, height: int, width: int) -> Tensor:
        """int64 [B, 4], inside the image. Reads the draws `cutmix`, `cutmix y` and `cutmix x`."""
        which = draws.integers("cutmix", 0, NUM_SHARES)
        side = _sides(self.alpha, which.device).index_select(0, which)
        y, h = _cut(draws.integers("cutmix y", 0, height), side, height)
        x, w = _cut(draws.integers("cutmix x", 0, width), side, width)
        return torch.stack([y, x, h, w], 1)

    def apply(self, images: Tensor, other_images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] twice -> mixed images, and share float32 [B] for losses.mixup_cross_entropy."""
        return cutmix(images, other_images, self.boxes(draws, images.shape[2], images.shape[3]))


def _cut(centre: Tensor, side: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First place and number of places of a box around `centre`, as far as it lies in 0 .. length - 1."""
    half = side.mul(length) >> 17
    start, end = (centre - half).clamp_(min=0), (centre + half).clamp_(max=length)
    return start, end - start
