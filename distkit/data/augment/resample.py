"""Random resized crop: a box of the image, resampled to one size, in fixed point so that devices agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distkit.config.check import require
from distkit.data.augment.boxes import Range, draw_boxes, require_box_ranges
from distkit.data.stream.draws import Draws
from distkit.errors import DataError

#: Bits of an interpolation weight: a grey level times two weights and a rounding bit stay below 2^31.
WEIGHT_BITS = 11


def resized_crop(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut out one box of each image and resample it: torchvision's resized_crop(bilinear, antialias=False) to a level.

    Args:
        images: uint8 [B, C, H, W].
        boxes: int64 [B, 4], top, left, height, width, inside the image, at least one pixel.
        size: height h and width w of the result.

    Returns:
        uint8 [B, C, h, w].

    Raises:
        DataError: the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise DataError("only grey levels are resampled: crop before normalising", expected="uint8", got=images.dtype)
    top, left, height, width = boxes.unbind(1)
    y, next_y, weight_y = _neighbours(top, height, size[0])
    x, next_x, weight_x = _neighbours(left, width, size[1])
    rows = _rows(images, y).to(torch.int32)
    rows = _blend_(rows, _rows(images, next_y).to(torch.int32), weight_y[:, None, :, None])
    levels = _blend_(_columns(rows, x), _columns(rows, next_x), weight_x[:, None, None, :])
    half = 1 << (2 * WEIGHT_BITS - 1)
    return levels.add_(half).bitwise_right_shift_(2 * WEIGHT_BITS).to(torch.uint8)


def resized_crop_nearest(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The same box by nearest neighbour, for labels: torchvision's resized_crop(nearest_exact).

    The pixel centres are those of `resized_crop`, so that image and mask stay aligned.

    Args:
        masks: [B, C, H, W], any dtype.
        boxes: int64 [B, 4], as for `resized_crop`.
        size: height h and width w of the result.

    Returns:
        [B, C, h, w], of the same dtype.
    """
    top, left, height, width = boxes.unbind(1)
    rows = _rows(masks, _nearest(top, height, size[0]))
    return _columns(rows, _nearest(left, width, size[1]))


def _neighbours(start: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where output pixel i lies along one dim: two places of the image, and the weight of the second in 2^-11.

    Output pixel i has its centre at (i + 1/2) * length / size - 1/2 in the box, as with align_corners=False; here times
    2 * size, which is a whole number.

    Args:
        start: int64 [B], first place of the box.
        length: int64 [B], places in the box.
        size: places in the output.

    Returns:
        int64 [B, size] twice, int32 [B, size].
    """
    odd = torch.arange(1, 2 * size, 2, device=start.device)
    centre = (length[:, None] * odd - size).clamp_(min=0)
    before = centre.div(2 * size, rounding_mode="floor")
    rest = centre - before * (2 * size)
    weight = rest.mul_(1 << WEIGHT_BITS).add_(size).div_(2 * size, rounding_mode="floor")
    after = torch.minimum(before + 1, length[:, None] - 1)
    return before + start[:, None], after + start[:, None], weight.to(torch.int32)


def _nearest(start: Tensor, length: Tensor, size: int) -> Tensor:
    odd = torch.arange(1, 2 * size, 2, device=start.device)
    return (length[:, None] * odd).div_(2 * size, rounding_mode="floor") + start[:, None]


def _rows(images: Tensor, rows: Tensor) -> Tensor:
    """[B, C, H, W] and int64 [B, h] -> [B, C, h, W], copied a row at a time."""
    batch, channels, height, width = images.shape
    planes = torch.arange(0, batch * channels * height, height, device=images.device).view(batch, channels, 1)
    chosen = (planes + rows[:, None, :]).flatten()
    return images.reshape(-1, width).index_select(0, chosen).view(batch, channels, -1, width)


def _columns(images: Tensor, columns: Tensor) -> Tensor:
    """[B, C, h, W] and int64 [B, w] -> [B, C, h, w]."""
    return images.gather(3, columns[:, None, None, :].expand(*images.shape[:3], -1))


def _blend_(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """first * (2^11 - weight) + second * weight in int32; both tensors are overwritten."""
    second.sub_(first).mul_(weight)
    return first.bitwise_left_shift_(WEIGHT_BITS).add_(second)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A box of random size, shape and place, resampled to `size` (Szegedy et al. 2015, arXiv:1409.4842).

    The boxes, with their ten attempts and the centre crop after them, are those of torchvision's RandomResizedCrop.
    """

    size: tuple[int, int]
    """Height and width of the result in pixels, 1 to 65536."""
    scale: Range = (0.08, 1.0)
    """Least and largest part of the image's area."""
    ratio: Range = (3 / 4, 4 / 3)
    """Least and largest width / height of the box."""

    def __post_init__(self) -> None:
        require(1 <= min(self.size) <= max(self.size) <= 2**16, "size", "pixels, 1 to 65536", self.size, "224 224")
        require_box_ranges(self.scale, self.ratio)

    def boxes(self, draws: Draws, height: int, width: int) -> Tensor:
        """int64 [B, 4]: top, left, height, width, inside the image. Reads draws named `resized crop …`."""
        image = height, width
        return draw_boxes(draws, "resized crop", image, self.scale, self.ratio, image, self._centre(height, width))

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 [B, C, H, W] -> uint8 [B, C, *size]."""
        return resized_crop(images, self.boxes(draws, images.shape[2], images.shape[3]), self.size)

    def _centre(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The largest box in the middle whose ratio is allowed."""
        h, w = height, width
        if width / height < self.ratio[0]:
            h = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            w = max(1, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w
