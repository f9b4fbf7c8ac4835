"""Colours: jitter on grey levels in fixed point, and normalisation to float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distkit.config.check import require
from distkit.data.stream.draws import Draws
from distkit.errors import DataError

#: Factors and parts of a sextant of the hue circle are whole numbers of 2^-16.
ONE = 2**16
#: A level times a factor stays below 2^31.
MAX_FACTOR = 64


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


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Every level times `factor` (int64 [B], in 2^-16), as torchvision's adjust_brightness but rounded, not cut off.

    uint8 [B, C, H, W] -> uint8 of the same shape, as all the functions here. Factors lie in 0 to 64 * 2^16.
    """
    return _levels_(_wide(images).mul_(_per_image(factor)))


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Every level's distance to the image's mean grey times `factor`, as torchvision's adjust_contrast on floats.

    Rounded, as the grey is: within a level of it for factors up to 2.
    """
    wide = _wide(images)
    mean = _gray(wide).sum((1, 2, 3), dtype=torch.int64)
    pixels = images.shape[2] * images.shape[3]
    mean = mean.mul_(256).div_(pixels, rounding_mode="floor")
    offset = (ONE - factor).mul_(mean).bitwise_right_shift_(8)
    return _levels_(wide.mul_(_per_image(factor)).add_(_per_image(offset)))


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Every level's distance to its pixel's grey times `factor`, as torchvision's adjust_saturation on floats.

    Rounded, as the grey is: within a level of it for factors up to 2. Images of one channel stay as they are.
    """
    if images.shape[1] == 1:
        return images
    wide = _wide(images)
    gray = _gray(wide).mul_(_per_image(ONE - factor))
    return _levels_(wide.mul_(_per_image(factor)).add_(gray))


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue circle by `shift` (int64 [B], in 2^-16 of a sixth of the circle, -3 to 3 sixths).

    Value and chroma of each pixel stay, as in torchvision's adjust_hue(shift / (6 * 2^16)), to two levels.
    With k = (n + hue) mod 6 and n = 5, 3, 1 a channel is value - chroma * clamp(min(k, 4 - k), 0, 1), hue in sixths.
    Images of one channel stay as they are.
    """
    if images.shape[1] == 1:
        return images
    wide = _wide(images)
    value, chroma = wide.amax(1), wide.amax(1)
    chroma -= wide.amin(1)
    turned = _hue(wide, value, chroma).add_(shift.to(torch.int32)[:, None, None])
    shifts = torch.arange(5 * ONE, 0, -2 * ONE, dtype=torch.int32, device=images.device)
    k = (turned[:, None] + shifts[:, None, None]).remainder_(6 * ONE)
    part = torch.minimum(k, 4 * ONE - k).clamp_(0, ONE)
    part.mul_(chroma[:, None]).add_(ONE // 2).bitwise_right_shift_(16)
    return (value[:, None] - part).to(torch.uint8)


def _hue(wide: Tensor, value: Tensor, chroma: Tensor) -> Tensor:
    """int32 [B, H, W], the hue in 2^-16 of a sixth of the circle; anything where the chroma is zero."""
    red, green, blue = wide.unbind(1)
    is_red, is_green = red == value, green == value
    difference = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    sixth = (~is_red).to(torch.int32).mul_(4).sub_((is_green & ~is_red).to(torch.int32).mul_(2))
    part = difference.mul_(ONE).div_(chroma.clamp(min=1), rounding_mode="floor")
    return sixth.mul_(ONE).add_(part)


def _wide(images: Tensor) -> Tensor:
    """int32 copy of uint8 images with one or three channels."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            "colour jitter got images of the wrong form",
            expected="uint8 [B, 1 or 3, H, W], before normalising",
            got=f"{images.dtype} {list(images.shape)}",
        )
    return images.to(torch.int32)


def _gray(wide: Tensor) -> Tensor:
    """Luma of ITU-R BT.601, int32 [B, 1, H, W], a new tensor."""
    if wide.shape[1] == 1:
        return wide.clone()
    red, green, blue = wide.unbind(1)
    gray = (red * 19595).add_(green * 38470).add_(blue * 7471)
    return gray.add_(ONE // 2).bitwise_right_shift_(16).unsqueeze(1)


def _per_image(numbers: Tensor) -> Tensor:
    return numbers.to(torch.int32)[:, None, None, None]


def _levels_(wide: Tensor) -> Tensor:
    """int32 in 2^-16 of a level -> uint8, rounded and cut off at 0 and 255."""
    return wide.add_(ONE // 2).bitwise_right_shift_(16).clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Random brightness, contrast, saturation and hue, in this order for every image.

    Factors are uniform in [max(0, 1 - strength), 1 + strength], the turn of the hue in [-hue, hue], as in torchvision's
    ColorJitter; that one also draws the order, which would need sixteen passes over a batch instead of four.
    """

    brightness: float = 0.0
    """Strength, 0 to 63; 0 changes nothing, as for the others."""
    contrast: float = 0.0
    """Strength, 0 to 63."""
    saturation: float = 0.0
    """Strength, 0 to 63."""
    hue: float = 0.0
    """Largest turn as a part of the whole circle, 0 to 0.5."""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            strength = getattr(self, name)
            require(0 <= strength <= MAX_FACTOR - 1, name, f"a strength, 0 to {MAX_FACTOR - 1}", strength, "0.4")
        require(0 <= self.hue <= 0.5, "hue", "a part of the circle, 0 to 0.5", self.hue, "0.1")

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 [B, 1 or 3, H, W] -> the same shape. Reads the draws `brightness`, `contrast`, `saturation`, `hue`."""
        if self.brightness:
            images = adjust_brightness(images, _factor(draws, "brightness", self.brightness))
        if self.contrast:
            images = adjust_contrast(images, _factor(draws, "contrast", self.contrast))
        if self.saturation:
            images = adjust_saturation(images, _factor(draws, "saturation", self.saturation))
        if self.hue:
            most = round(self.hue * 6 * ONE)
            images = adjust_hue(images, draws.integers("hue", -most, most + 1))
        return images


def _factor(draws: Draws, name: str, strength: float) -> Tensor:
    low, high = round(max(0.0, 1 - strength) * ONE), round((1 + strength) * ONE)
    return draws.integers(name, low, high + 1)
