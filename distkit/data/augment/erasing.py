"""Parts of an image made unseen: cutout and random erasing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distkit.config.check import require
from distkit.data.augment.boxes import Range, draw_boxes, inside, require_box_ranges
from distkit.data.stream.draws import Draws
from distkit.errors import DataError


def cutout(images: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """Set a square of `size` pixels to zero, cut at the image's edges (DeVries and Taylor 2017).

    Args:
        images: [B, C, H, W], normalised, so that zero is the mean colour. Changed in place and returned.
        y: int64 [B], centre row in 0 .. H - 1; the square covers rows y - size // 2 to y - size // 2 + size - 1.
        x: int64 [B], centre column likewise.
        size: side of the square in pixels.
    """
    rows, columns = (
        _between(start - size // 2, size, images.shape[dim]).to(images.dtype) for start, dim in ((y, 2), (x, 3))
    )
    # A product of zeros and ones vectorises; boolean masks of this shape take twice the time on a CPU.
    return images.mul_(1 - rows[:, None, :, None] * columns[:, None, None, :])


def _between(start: Tensor, size: int, length: int) -> Tensor:
    """bool [B, length]: which of `length` places are in start .. start + size - 1."""
    places = torch.arange(length, device=start.device)
    return (places >= start[:, None]) & (places < start[:, None] + size)


def erase(images: Tensor, boxes: Tensor, fill: Tensor | float = 0.0) -> Tensor:
    """Replace the pixels in a box: [B, C, H, W] of any dtype -> a new tensor of the same.

    Args:
        images: [B, C, H, W].
        boxes: int64 [B, 4], top, left, height, width; a box of height 0 erases nothing.
        fill: a number, or a tensor of the images' dtype and device that broadcasts to them: [C, 1, 1] for a mean
            colour, [B, C, H, W] for `noise`.
    """
    hidden = inside(boxes, images.shape[2], images.shape[3])
    return torch.where(hidden, fill, images) if isinstance(fill, Tensor) else images.masked_fill(hidden, fill)


def noise(draws: Draws, name: str, shape: tuple[int, int, int]) -> Tensor:
    """Random grey levels for every pixel: uint8 [B, C, H, W] for shape (C, H, W), uniform in 0 .. 255."""
    channels, height, width = shape
    count = channels * height * width
    levels = draws.bits(name, -(-count // 8)).view(torch.uint8)
    return levels[:, :count].reshape(-1, *shape)


@dataclass(frozen=True, kw_only=True)
class RandomErasing:
    """A random box of some images is erased (Zhong et al. 2020, arXiv:1708.04896).

    Boxes are those of torchvision's RandomErasing, which also gives the defaults, with ratio = height / width.
    """

    p: float = 0.5
    """Probability that an image is changed, in [0, 1]."""
    scale: Range = (0.02, 0.33)
    """Least and largest part of the image's area."""
    ratio: Range = (0.3, 3.3)
    """Least and largest height / width."""
    fill: Literal["zero", "noise"] = "zero"
    """Zero (black, or on normalised images the mean colour), or a random grey level for every pixel (uint8 only)."""

    def __post_init__(self) -> None:
        require(0 <= self.p <= 1, "p", "a probability, 0 to 1", self.p, "0.5")
        require_box_ranges(self.scale, self.ratio)
        require(self.fill in ("zero", "noise"), "fill", "zero or noise", self.fill, "zero")

    def boxes(self, draws: Draws, height: int, width: int) -> Tensor:
        """int64 [B, 4], of height and width 0 where the image is left alone. Reads draws named `erase …`."""
        ratio = 1 / self.ratio[1], 1 / self.ratio[0]
        largest = height - 1, width - 1
        boxes = draw_boxes(draws, "erase", (height, width), self.scale, ratio, largest, (0, 0, 0, 0))
        return boxes * draws.bernoulli("erase", self.p)[:, None]

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """[B, C, H, W] -> a new tensor of the same shape and dtype.

        Raises:
            DataError: noise for images that are not uint8.
        """
        channels, height, width = images.shape[1:]
        boxes = self.boxes(draws, height, width)
        if self.fill == "zero":
            return erase(images, boxes)
        if images.dtype != torch.uint8:
            raise DataError("noise is grey levels: erase before normalising", expected="uint8", got=images.dtype)
        return erase(images, boxes, noise(draws, "erase noise", (channels, height, width)))
