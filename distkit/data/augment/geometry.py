"""Crop, flip and rotate: pixels are moved, never computed, so any dtype works and masks move like images.

Done on uint8 images, before they become four times as large.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distkit.data.stream.draws import Draws
from distkit.errors import DataError

PaddingMode = Literal["zero", "reflect"]

#: Largest table of `_kept` in bytes; above it rows are long enough to be copied one by one.
TABLE_BYTES = 4 * 2**20


def random_crop(
    images: Tensor, y: Tensor, x: Tensor, padding: int, mode: PaddingMode = "zero", fill: float = 0
) -> Tensor:
    """Pad every side and cut out a window of the old size, as torchvision's RandomCrop(size, padding) does.

    Args:
        images: [B, C, H, W], any dtype.
        y: int64 [B], top row of each window in the padded image, 0 to 2 * padding.
        x: int64 [B], its leftmost column, 0 to 2 * padding.
        padding: pixels added on each side.
        mode: fill them with `fill`, or mirror the image without repeating its edge (padding < H, W).
        fill: what is added in mode zero; for masks the label to ignore.

    Returns:
        [B, C, H, W], of the same dtype.
    """
    height, width = images.shape[2:]
    if images.device.type != "cpu":
        return _windows_by_pixel(_pad(images, padding, mode, fill), y, x, height, width)
    if mode == "zero" and fill == 0 and _table_bytes(images, padding) <= TABLE_BYTES:
        return _shifted(images, y.numpy(), x.numpy(), padding)
    return _windows_by_row(_pad(images, padding, mode, fill), y, x, height, width)


def random_window(images: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Cut a window out of every image.

    Args:
        images: [B, C, H, W], any dtype.
        y: int64 [B], top row of each window, 0 to H - height.
        x: int64 [B], its leftmost column, 0 to W - width.
        height: rows of a window, 1 to H.
        width: its columns, 1 to W.

    Returns:
        [B, C, height, width], of the same dtype.
    """
    cut = _windows_by_row if images.device.type == "cpu" else _windows_by_pixel
    return cut(images, y, x, height, width)


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror left and right where `mask` (bool [B]) is set: [B, C, H, W] -> the same shape and dtype."""
    if images.device.type != "cpu":
        return torch.where(mask[:, None, None, None], images.flip(3), images)
    flipped = images.clone(memory_format=torch.contiguous_format)
    _flip_(flipped, np.flatnonzero(mask.numpy()))
    return flipped


def crop_flip(
    images: Tensor, y: Tensor, x: Tensor, mask: Tensor, padding: int, mode: PaddingMode = "zero", fill: float = 0
) -> Tensor:
    """`flip(random_crop(images, y, x, padding, mode, fill), mask)`, with fewer passes over the pixels."""
    height, width = images.shape[2:]
    if images.device.type != "cpu":
        return _windows_by_pixel(_pad(images, padding, mode, fill), y, x, height, width, mask)
    # Mirroring first is the same as mirroring last when the window is taken from the other side.
    other_x = torch.where(mask, 2 * padding - x, x)
    if mode == "zero" and fill == 0 and _table_bytes(images, padding) <= TABLE_BYTES:
        return _shifted(images, y.numpy(), other_x.numpy(), padding, np.flatnonzero(mask.numpy()))
    return random_crop(flip(images, mask), y, other_x, padding, mode, fill)


def alternating_flip(samples: Draws, epochs: Tensor) -> Tensor:
    """Which samples to mirror: a sample is seen mirrored in every other epoch, half of them in the even ones.

    Two epochs in a row show both forms of every image. Source: Jordan 2024, arXiv:2404.00498.

    Args:
        samples: keyed by the sample and not by its position: `Draws(seed, indices)`.
        epochs: int64 [B], `positions // len(dataset)`, on the same device.

    Returns:
        bool [B], for `flip` or `crop_flip`.
    """
    return samples.bernoulli("alternating flip", 0.5) ^ epochs.bitwise_and(1).to(torch.bool)


def rotate90(images: Tensor, turns: Tensor) -> Tensor:
    """Turn every image counter-clockwise by `turns` (int64 [B], 0 to 3) quarters, as torch.rot90 does.

    Args:
        images: [B, C, S, S], any dtype.
        turns: int64 [B], quarter turns, 0 to 3.

    Raises:
        DataError: the images are not square.
    """
    if images.shape[2] != images.shape[3]:
        raise DataError(
            "only square images can be turned by 90 degrees", expected="height = width", got=list(images.shape)
        )
    turned = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)]).flatten(1)
    chosen = torch.arange(len(images), device=images.device) + turns * len(images)
    return turned.index_select(0, chosen).view(images.shape)


def _pad(images: Tensor, padding: int, mode: PaddingMode, fill: float) -> Tensor:
    if mode == "zero":
        return F.pad(images, (padding,) * 4, value=fill)
    for dim in (3, 2):
        size = images.shape[dim]
        before = images.narrow(dim, 1, padding).flip(dim)
        after = images.narrow(dim, size - 1 - padding, padding).flip(dim)
        images = torch.cat([before, images, after], dim)
    return images


def _flip_(images: Tensor, which: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    """Mirror the CPU images numbered `which` in place; `images` is contiguous."""
    if len(which):
        mirrored = images.index_select(0, torch.from_numpy(which)).flip(3)
        images.flatten(1).view(torch.uint8).numpy()[which] = mirrored.flatten(1).view(torch.uint8).numpy()


def _shifted(
    images: Tensor,
    y: np.ndarray[tuple[int], np.dtype[np.int64]],
    x: np.ndarray[tuple[int], np.dtype[np.int64]],
    padding: int,
    flipped: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None,
) -> Tensor:
    """Crop of CPU images padded with zeros, of which those numbered `flipped` are mirrored first.

    Window and image have rows of one length, so a window is the image's memory from some place on, in one piece, with
    neighbours where padding should be. Those are cleared by one `and` with the bits of pixels that are kept.
    """
    batch, channels, height, width = images.shape
    size, margin = channels * height * width, padding * width + padding
    buffer = torch.empty(batch * size + 2 * margin, dtype=images.dtype)
    inner = buffer.narrow(0, margin, batch * size).view(images.shape).copy_(images)
    if flipped is not None:
        _flip_(inner, flipped)
    starts = torch.from_numpy(np.arange(batch) * size + (y * width + x))
    places = max(0, buffer.numel() - size + 1)
    windows = buffer.as_strided((places, size), (1, 1)).index_select(0, starts)
    kept = _kept(padding, height, width, images.element_size())
    kept = kept.index_select(0, torch.from_numpy(y * (2 * padding + 1) + x))
    word = torch.int64 if kept.shape[1] % 8 == 0 else torch.uint8
    windows.view(batch, channels, height * width).view(word).bitwise_and_(kept.view(word).unsqueeze(1))
    return windows.view(images.shape)


def _table_bytes(images: Tensor, padding: int) -> int:
    return int((2 * padding + 1) ** 2 * images.shape[2] * images.shape[3] * images.element_size())


@lru_cache(maxsize=8)
def _kept(padding: int, height: int, width: int, pixel: int) -> Tensor:
    """uint8 [(2 * padding + 1)^2, H * W * pixel]: for every y and x, 255 in the bytes of pixels inside the image."""
    offsets = torch.arange(-padding, padding + 1)[:, None]
    rows, columns = (offsets + torch.arange(size) for size in (height, width))
    rows, columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    kept = rows[:, None, :, None] & columns[None, :, None, :]
    return kept.to(torch.uint8).mul_(255).flatten(0, 1).flatten(1).repeat_interleave(pixel, 1)


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


def _windows_by_pixel(
    padded: Tensor, y: Tensor, x: Tensor, height: int, width: int, mask: Tensor | None = None
) -> Tensor:
    """Windows of images on any device, mirrored where `mask` is set, in one gather."""
    device = padded.device
    sample = torch.arange(padded.shape[0], device=device)[:, None, None, None]
    channel = torch.arange(padded.shape[1], device=device)[:, None, None]
    rows = y[:, None] + torch.arange(height, device=device)
    places = torch.arange(width, device=device).expand(len(padded), width)
    if mask is not None:
        places = torch.where(mask[:, None], width - 1 - places, places)
    columns = x[:, None] + places
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
