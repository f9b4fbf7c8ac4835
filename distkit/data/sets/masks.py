"""Images with a mask each, for segmentation: held as uint8 in memory, changed at random alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from distkit.config import Split
from distkit.config.check import require
from distkit.data import augment
from distkit.data.sets.fingerprint import fingerprint
from distkit.data.sets.mask_folder import IGNORE, Values, load_masks
from distkit.data.stream.draws import Draws
from distkit.errors import ConfigError, DataError

MaskBatch: TypeAlias = tuple[Tensor, Tensor]
"""images [B, C, H, W] and masks of class ids [B, H, W]."""


@dataclass(frozen=True, kw_only=True)
class MaskAugmentation:
    """Random changes of an image and its mask, in this order. The default changes nothing."""

    crop_size: int | None = None
    """Side in pixels of a window at a random place that is kept, >= 1; None: the whole image."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    flip_vertical: bool = False
    """Mirror top and bottom with probability 1/2."""
    rotate: bool = False
    """Turn by 0, 90, 180 or 270 degrees, each with probability 1/4; images or windows must be square."""

    def __post_init__(self) -> None:
        size = self.crop_size
        require(size is None or size >= 1, "crop_size", "pixels, >= 1, or None", size, "256")


class MaskDataset:
    """Resident images and masks. `fetch` gathers, `augment` changes both alike and normalises the images to float32.

    For evaluation give no augmentation: `augment` then only normalises.

    Args:
        images: uint8 [N, C, H, W].
        masks: class ids uint8 [N, H, W], each below len(class_names), or 255 for pixels that count for nothing.
        class_names: one name a class.
        source: where they come from, for people.
        mean: mean per channel on the scale of [0, 1]; None: 0.5 each.
        std: standard deviation per channel likewise, > 0; None: 0.5 each.
        augmentation: random changes.

    Raises:
        DataError: shapes, dtypes or class ids do not fit together.
        ConfigError: the augmentation does not fit the images.
    """

    def __init__(
        self,
        images: Tensor,
        masks: Tensor,
        *,
        class_names: tuple[str, ...],
        source: str,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        augmentation: MaskAugmentation | None = None,
    ) -> None:
        self.images = images
        self.masks = masks
        self.class_names = class_names
        self.source = source
        self.mean = mean or (0.5,) * images.shape[1]
        self.std = std or (0.5,) * images.shape[1]
        self.augmentation = augmentation or MaskAugmentation()
        self._check()
        self._check_augmentation()
        self._normalization = {torch.device("cpu"): augment.normalization(self.mean, self.std)}

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of classes, also of those that no pixel has."""
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        """Where the images lie, and where `fetch` gathers them."""
        return self.images.device

    @property
    def nbytes(self) -> int:
        """Bytes of images and masks."""
        return self.images.nbytes + self.masks.nbytes

    @property
    def fingerprint(self) -> str:
        """Tells these images and masks from others, wherever they come from; see `distkit.data.sets.fingerprint`."""
        return fingerprint(self.images, self.masks)

    def describe(self) -> str:
        """One line for people: "24 images 1x512x512 uint8 with masks, 2 classes, from folder data/em"."""
        shape = "x".join(str(size) for size in self.images.shape[1:])
        return f"{len(self):,} images {shape} uint8 with masks, {self.num_classes} classes, from {self.source}"

    def to(self, device: torch.device | str) -> MaskDataset:
        """The same data set with its tensors on `device`."""
        return self._replace(self.images.to(device), self.masks.to(device), self.augmentation)

    def augmented(self, augmentation: MaskAugmentation) -> MaskDataset:
        """The same images with another augmentation; nothing is copied."""
        return self._replace(self.images, self.masks, augmentation)

    def fetch(self, indices: Tensor) -> MaskBatch:
        """int64 [B] -> images uint8 [B, C, H, W] and masks uint8 [B, H, W], on the device that holds the images."""
        indices = indices.to(self.images.device, non_blocking=True)
        return self.images.index_select(0, indices), self.masks.index_select(0, indices)

    def augment(self, batch: MaskBatch, draws: Draws) -> MaskBatch:
        """A batch from `fetch`, on any device -> images float32 [B, C, h, w], normalised, and masks int64 [B, h, w].

        Reads the draws `crop y`, `crop x`, `flip`, `flip vertical` and `rotate`. What is given is not changed.
        """
        images, masks = batch
        how = self.augmentation
        if how != MaskAugmentation():
            places = self._places(how, images.shape[2], images.shape[3], draws)
            images = _gather(images, places)
            masks = _gather(masks.unsqueeze(1), places).squeeze(1)
        return augment.normalize(images, *self._constants(images.device)), masks.to(torch.int64)

    def _places(self, how: MaskAugmentation, height: int, width: int, draws: Draws) -> Tensor:
        """Where every pixel of the result lies in its image: row * width + column, int64 [B, h, w]."""
        device = draws.positions.device
        h, w = (how.crop_size, how.crop_size) if how.crop_size else (height, width)
        none = torch.zeros_like(draws.positions, dtype=torch.bool)
        mirror_rows = draws.bernoulli("flip vertical", 0.5) if how.flip_vertical else none
        mirror_columns = draws.bernoulli("flip", 0.5) if how.flip else none
        rows, columns = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)[None, :]
        if how.rotate:
            # Turning k times by 90 degrees is a transpose where k is odd, and a mirror of the rows and of the columns.
            turns = draws.integers("rotate", 0, 4)
            mirror_rows = mirror_rows ^ (turns >= 2)
            mirror_columns = mirror_columns ^ ((turns == 1) | (turns == 2))
            odd = (turns % 2 == 1)[:, None, None]
            rows, columns = torch.where(odd, columns, rows), torch.where(odd, rows, columns)
        rows = torch.where(mirror_rows[:, None, None], h - 1 - rows, rows)
        columns = torch.where(mirror_columns[:, None, None], w - 1 - columns, columns)
        if how.crop_size:
            rows = rows + draws.integers("crop y", 0, height - h + 1)[:, None, None]
            columns = columns + draws.integers("crop x", 0, width - w + 1)[:, None, None]
        return rows * width + columns

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._normalization:
            shift, scale = self._normalization[torch.device("cpu")]
            self._normalization[device] = shift.to(device, non_blocking=True), scale.to(device, non_blocking=True)
        return self._normalization[device]

    def _replace(self, images: Tensor, masks: Tensor, augmentation: MaskAugmentation) -> MaskDataset:
        return MaskDataset(
            images,
            masks,
            class_names=self.class_names,
            source=self.source,
            mean=self.mean,
            std=self.std,
            augmentation=augmentation,
        )

    def _check(self) -> None:
        images, masks = self.images, self.masks
        right = images.ndim == 4 and images.dtype == torch.uint8 and masks.dtype == torch.uint8
        if not right or not len(images) or masks.shape != (len(images), *images.shape[2:]):
            raise DataError(
                f"images and masks from {self.source} have the wrong form",
                expected="images uint8 [N, C, H, W] and masks uint8 [N, H, W], N >= 1",
                got=f"images {images.dtype} {list(images.shape)}, masks {masks.dtype} {list(masks.shape)}",
            )
        if masks.device.type == "cpu":
            counted = torch.bincount(masks.flatten(), minlength=256)
            wrong = [i for i in counted.nonzero().flatten().tolist() if self.num_classes <= i != IGNORE]
            if wrong:
                raise DataError(
                    f"masks from {self.source} have class ids without a name",
                    expected=f"0 to {self.num_classes - 1}, or {IGNORE}",
                    got=wrong[0],
                )
        if len(self.mean) != images.shape[1] or len(self.std) != images.shape[1]:
            raise DataError(
                f"images from {self.source} and their mean and std differ in channels",
                expected=f"{images.shape[1]} numbers each",
                got=f"mean {self.mean}, std {self.std}",
            )

    def _check_augmentation(self) -> None:
        how, (height, width) = self.augmentation, self.images.shape[2:]
        if how.crop_size and how.crop_size > min(height, width):
            raise ConfigError(
                "crop_size is larger than the images",
                expected=f"1 to {min(height, width)} pixels",
                got=how.crop_size,
                fix=f"crop_size={min(height, width)}",
            )
        if how.rotate and not how.crop_size and height != width:
            raise ConfigError(
                "rotate needs square images or windows",
                expected="a crop_size",
                got=f"images of {height}x{width} pixels",
                fix=f"crop_size={min(height, width)}",
            )


def _gather(images: Tensor, places: Tensor) -> Tensor:
    """[B, C, H, W] of any dtype, at places [B, h, w] -> [B, C, h, w]."""
    batch, channels = images.shape[:2]
    index = places.flatten(1).unsqueeze(1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(batch, channels, *places.shape[1:])


def mask_folder(root: Path, split: Split, values: Values, class_names: tuple[str, ...]) -> MaskDataset:
    """ROOT/SPLIT/images/NAME.* and ROOT/SPLIT/masks/NAME.*, decoded; see `distkit.data.sets.mask_folder.load_masks`."""
    images, masks = load_masks(root, split, values)
    return MaskDataset(images, masks, class_names=class_names, source=f"folder {root}")
