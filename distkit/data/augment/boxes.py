"""Boxes of random area and aspect ratio, as random resized crop and random erasing take them.

A box is four int64 numbers: top row, left column, height, width, in pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from distkit.config.check import require
from distkit.data.stream.draws import Draws

Range = tuple[float, float]

#: Boxes tried for one image before it gets the fallback box.
ATTEMPTS = 10
#: An area is drawn in this part of the image's.
AREA_UNIT = 2**20
#: Ratios are drawn from a table, because logarithm and exponential differ between devices in the last bit.
NUM_RATIOS = 4096


def draw_boxes(
    draws: Draws,
    name: str,
    image: tuple[int, int],
    scale: Range,
    ratio: Range,
    largest: tuple[int, int],
    otherwise: tuple[int, int, int, int],
) -> Tensor:
    """The first of ten random boxes that is not too large, at a random place of the image.

    The area is uniform in `scale` times the image's, the ratio log-uniform in `ratio`, the place uniform: the
    distribution of torchvision's RandomResizedCrop.get_params and RandomErasing.get_params (Szegedy et al. 2015,
    arXiv:1409.4842; Zhong et al. 2020, arXiv:1708.04896). Each float operation is one correctly rounded product or
    square root in float64, which every device does alike.

    Args:
        draws: reads `name area`, `name ratio` and `name corner`.
        name: prefix of the draws.
        image: height and width of the images.
        scale: least and largest part of the image's area, in (0, 1].
        ratio: least and largest width / height, > 0.
        largest: greatest height and width allowed; at most the image's.
        otherwise: the box to use if all ten were too large or had no pixel.

    Returns:
        int64 [B, 4].
    """
    height, width = image
    bounds = (round(value * AREA_UNIT) for value in scale)
    share = draws.integers(f"{name} area", next(bounds), next(bounds) + 1, count=ATTEMPTS)
    area = share.mul_(height * width).to(torch.float64).mul_(1 / AREA_UNIT)
    which = draws.integers(f"{name} ratio", 0, NUM_RATIOS, count=ATTEMPTS)
    ratios, inverses = _ratios(ratio, area.device)
    widths = (area * ratios[which]).sqrt_().round_().to(torch.int64)
    heights = area.mul_(inverses[which]).sqrt_().round_().to(torch.int64)
    fits = (widths >= 1) & (widths <= largest[1]) & (heights >= 1) & (heights <= largest[0])
    # No two products are equal unless none fits, so that no device has a choice.
    first = (fits * torch.arange(ATTEMPTS, 0, -1, device=area.device)).argmax(1, keepdim=True)
    h, w = heights.gather(1, first).squeeze(1), widths.gather(1, first).squeeze(1)
    corner = draws.integers(f"{name} corner", 0, 2**31, count=2)
    top, left = corner[:, 0].mul(height + 1 - h) >> 31, corner[:, 1].mul(width + 1 - w) >> 31
    none = ~fits.any(1)
    parts = zip((top, left, h, w), otherwise, strict=True)
    return torch.stack([part.masked_fill(none, value) for part, value in parts], 1)


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """bool [B, 1, H, W]: which pixels lie in the boxes (int64 [B, 4]); a box may reach over the image's edge."""
    top, left, h, w = boxes[:, :, None].unbind(1)
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    in_rows = (rows >= top) & (rows < top + h)
    in_columns = (columns >= left) & (columns < left + w)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


def require_box_ranges(scale: Range, ratio: Range) -> None:
    """Raise ConfigError unless 0 < least <= largest, and no scale is above 1."""
    require(0 < scale[0] <= scale[1] <= 1, "scale", "0 < least <= largest <= 1", scale, "0.08 1.0")
    require(0 < ratio[0] <= ratio[1] < math.inf, "ratio", "0 < least <= largest", ratio, "0.75 1.333")


@lru_cache(maxsize=32)
def _ratios(ratio: Range, device: torch.device) -> tuple[Tensor, Tensor]:
    """float64 [NUM_RATIOS] each, made on the host: ratios evenly spaced in their logarithm, and 1 / ratio."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    middles = (np.arange(NUM_RATIOS) + 0.5) / NUM_RATIOS
    ratios = np.exp(low + middles * (high - low))
    first, second = (torch.from_numpy(values).to(device, non_blocking=True) for values in (ratios, 1 / ratios))
    return first, second
