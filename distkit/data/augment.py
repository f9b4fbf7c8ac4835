"""Image augmentations of whole batches, from draws that were made before. The same pixels on every device.

Nothing here waits for the device and no shape depends on data. Geometry is done on the uint8 images, before they become
four times as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PaddingMode = Literal["zero", "reflect"]


def random_crop(images: Tensor, y: Tensor, x: Tensor, padding: int, mode: PaddingMode = "zero") -> Tensor:
    """Pad every side and cut out a window of the old size, as torchvision's RandomCrop(size, padding) does.

    Args:
        images: [B, C, H, W], any dtype.
        y: int64 [B], top row of each window in the padded image, 0 to 2 * padding.
        x: int64 [B], its leftmost column, 0 to 2 * padding.
        padding: pixels added on each side.
        mode: fill them with zero, or mirror the image without repeating its edge (padding < H, W).

    Returns:
        [B, C, H, W], of the same dtype.
    """
    height, width = images.shape[2:]
    padded = _pad(images, padding, mode)
    if images.device.type == "cpu":
        return _windows_by_row(padded, y, x, height, width)
    return _windows_by_pixel(padded, y, x, height, width)


def _pad(images: Tensor, padding: int, mode: PaddingMode) -> Tensor:
    if mode == "zero":
        return F.pad(images, (padding,) * 4)
    for dim in (3, 2):
        size = images.shape[dim]
        before = images.narrow(dim, 1, padding).flip(dim)
        after = images.narrow(dim, size - 1 - padding, padding).flip(dim)
        images = torch.cat([before, images, after], dim)
    return images


def _windows_by_row(padded: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Windows of CPU images. A row of a window is one element of `width` pixels, so numpy copies rows, not pixels."""
    array = padded.contiguous().numpy()
    batch, channels, padded_height, padded_width = array.shape
    pixel = array.itemsize
    rows = np.ndarray((array.size - width + 1,), dtype=f"V{width * pixel}", buffer=array.data, strides=(pixel,))
    corner = y.numpy() * padded_width + x.numpy()
    plane = np.arange(batch * channels).reshape(batch, channels) * (padded_height * padded_width)
    first = (plane + corner[:, None])[:, :, None] + np.arange(height) * padded_width
    return torch.from_numpy(rows[first].view(array.dtype).reshape(batch, channels, height, width))


def _windows_by_pixel(padded: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Windows of images on any device, in one gather."""
    device = padded.device
    sample = torch.arange(padded.shape[0], device=device)[:, None, None, None]
    channel = torch.arange(padded.shape[1], device=device)[:, None, None]
    rows = y[:, None] + torch.arange(height, device=device)
    columns = x[:, None] + torch.arange(width, device=device)
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror left and right where `mask` (bool [B]) is set: [B, C, H, W] -> the same shape and dtype."""
    both = torch.cat([images, images.flip(3)]).flatten(1)
    chosen = torch.arange(len(images), device=images.device) + mask * len(images)
    return both.index_select(0, chosen).view(images.shape)


def cutout(images: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """Set a square of `size` pixels to zero, cut at the image's edges (DeVries and Taylor 2017).

    Args:
        images: [B, C, H, W], normalised, so that zero is the mean colour. Changed in place and returned.
        y: int64 [B], centre row in 0 .. H - 1; the square covers rows y - size // 2 to y - size // 2 + size - 1.
        x: int64 [B], centre column likewise.
        size: side of the square in pixels.
    """
    rows, columns = (
        _inside(start - size // 2, size, images.shape[dim]).to(images.dtype) for start, dim in ((y, 2), (x, 3))
    )
    # A product of zeros and ones vectorises; boolean masks of this shape take twice the time on a CPU.
    return images.mul_(1 - rows[:, None, :, None] * columns[:, None, None, :])


def _inside(start: Tensor, size: int, length: int) -> Tensor:
    """bool [B, length]: which of `length` places lie in start .. start + size - 1."""
    places = torch.arange(length, device=start.device)
    return (places >= start[:, None]) & (places < start[:, None] + size)


def normalization(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What `normalize` takes, float32 [C, 1, 1] each, from mean and std per channel on the scale of [0, 1]."""
    shift = torch.tensor([255 * value for value in mean], dtype=torch.float32)
    scale = torch.tensor([1 / (255 * value) for value in std], dtype=torch.float32)
    return shift[:, None, None], scale[:, None, None]


def normalize(images: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(images - shift) * scale: uint8 [B, C, H, W] -> float32; ((images / 255) - mean) / std up to rounding.

    A difference before a product leaves no room for a fused multiply-add, so every device rounds alike.
    """
    return images.to(torch.float32).sub_(shift).mul_(scale)
