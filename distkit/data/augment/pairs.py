"""Segmentation: image and mask are moved by one draw, so that every label stays on its pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distkit.config.check import require
from distkit.data.augment.geometry import PaddingMode, flip, random_crop, random_window, rotate90
from distkit.data.augment.resample import RandomResizedCrop, resized_crop, resized_crop_nearest
from distkit.data.stream.draws import Draws
from distkit.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PairGeometry:
    """Random geometry of images and masks, in the order of the fields. The default changes nothing."""

    resized_crop: RandomResizedCrop | None = None
    """A box resampled to one size: bilinear for images, nearest for masks."""
    crop_padding: int = 0
    """Pixels added on each side before a random window of the old size is cut out, >= 0."""
    padding_mode: PaddingMode = "zero"
    """What is added: black and `ignore_label`, or the mirrored image and mask."""
    ignore_label: int = 255
    """Label of pixels that padding added."""
    crop_size: int | None = None
    """Side in pixels of a square window cut out at a random position, >= 1; None: the whole image."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    flip_vertical: bool = False
    """Mirror top and bottom with probability 1/2."""
    rotate: bool = False
    """Turn by 0, 90, 180 or 270 degrees, each with probability 1/4; images or windows must be square."""

    def __post_init__(self) -> None:
        size = self.crop_size
        require(size is None or size >= 1, "crop_size", "pixels, >= 1, or None", size, "256")
        require(self.crop_padding >= 0, "crop_padding", "pixels, >= 0", self.crop_padding, "4")
        require(self.padding_mode in ("zero", "reflect"), "padding_mode", "zero or reflect", self.padding_mode, "zero")

    def apply(self, images: Tensor, masks: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Both by the same draws: `resized crop …`, `crop`, `crop y`, `crop x`, `flip`, `flip vertical`, `rotate`.

        Args:
            images: [B, C, H, W], uint8 where there is a resized crop.
            masks: [B, H, W] or [B, M, H, W], labels or any other numbers.
            draws: one for every image.

        Returns:
            new images and masks with as many dims, or those given where there is nothing to do.

        Raises:
            DataError: shapes do not fit together, or the masks' dtype cannot hold `ignore_label`.
        """
        self._check(images, masks)
        planes = masks.unsqueeze(1) if masks.ndim == 3 else masks
        if self.resized_crop is not None:
            boxes = self.resized_crop.boxes(draws, images.shape[2], images.shape[3])
            images = resized_crop(images, boxes, self.resized_crop.size)
            planes = resized_crop_nearest(planes, boxes, self.resized_crop.size)
        if self.crop_padding:
            y, x = draws.integers("crop", 0, 2 * self.crop_padding + 1, count=2).unbind(1)
            images = random_crop(images, y, x, self.crop_padding, self.padding_mode)
            planes = random_crop(planes, y, x, self.crop_padding, self.padding_mode, self.ignore_label)
        if self.crop_size is not None:
            height, width = images.shape[2:]
            y = draws.integers("crop y", 0, height - self.crop_size + 1)
            x = draws.integers("crop x", 0, width - self.crop_size + 1)
            images = random_window(images, y, x, self.crop_size, self.crop_size)
            planes = random_window(planes, y, x, self.crop_size, self.crop_size)
        if self.flip:
            mirrored = draws.bernoulli("flip", 0.5)
            images, planes = flip(images, mirrored), flip(planes, mirrored)
        if self.flip_vertical:
            mirrored = draws.bernoulli("flip vertical", 0.5)
            images, planes = (flip(each.transpose(2, 3), mirrored).transpose(2, 3) for each in (images, planes))
        if self.rotate:
            turns = draws.integers("rotate", 0, 4)
            images, planes = rotate90(images, turns), rotate90(planes, turns)
        return images, planes.squeeze(1) if masks.ndim == 3 else planes

    def _check(self, images: Tensor, masks: Tensor) -> None:
        if masks.ndim not in (3, 4) or masks.shape[0] != images.shape[0] or masks.shape[-2:] != images.shape[-2:]:
            raise DataError(
                "images and masks do not fit together",
                expected="images [B, C, H, W] and masks [B, H, W] or [B, M, H, W]",
                got=f"{list(images.shape)} and {list(masks.shape)}",
            )
        pads_with_label = self.crop_padding and self.padding_mode == "zero"
        if pads_with_label and not masks.is_floating_point():
            limits = torch.iinfo(masks.dtype)
            if not limits.min <= self.ignore_label <= limits.max:
                raise DataError(
                    f"masks of {masks.dtype} cannot hold the ignore_label",
                    expected=f"{limits.min} to {limits.max}",
                    got=self.ignore_label,
                    fix="PairGeometry(..., ignore_label=255), or masks.long() in the data set",
                )
