"""Labelled images of one size, held as uint8 in memory, on the training device where they fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distkit.config.check import require
from distkit.data import augment
from distkit.data.augment import PaddingMode
from distkit.data.batch import ImageBatch
from distkit.data.sets.fingerprint import fingerprint
from distkit.data.stream.draws import Draws
from distkit.errors import ConfigError, DataError

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of an image, in this order: crop, flip, (normalise,) cutout. The default changes nothing."""

    crop_padding: int = 0
    """Pixels added on each side before a random window of the old size is cut out, >= 0."""
    padding_mode: PaddingMode = "zero"
    """What is added: black, or the mirrored image."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    cutout: int = 0
    """Side in pixels of a square at a random place that is set to the mean colour, >= 0."""

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            require(getattr(self, name) >= 0, name, "pixels, >= 0", getattr(self, name), "4")
        require(self.padding_mode in ("zero", "reflect"), "padding_mode", "zero or reflect", self.padding_mode, "zero")


class ImageDataset:
    """Resident images. `fetch` gathers, `augment` changes at random and normalises to float32.

    For evaluation give no augmentation: `augment` then only normalises.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], each in [0, len(class_names)).
        class_names: one name a class.
        source: where the images come from, for people: "folder data/flowers".
        mean: mean per channel on the scale of [0, 1].
        std: standard deviation per channel likewise, > 0.
        augmentation: random changes.
        memory_mapped: the images lie in a file until something reads them.

    Raises:
        DataError: shapes, dtypes or labels do not fit together.
        ConfigError: the augmentation does not fit the images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        class_names: tuple[str, ...],
        source: str,
        mean: tuple[float, ...] = CIFAR10_MEAN,
        std: tuple[float, ...] = CIFAR10_STD,
        augmentation: Augmentation | None = None,
        memory_mapped: bool = False,
    ) -> None:
        self.images = images
        self.memory_mapped = memory_mapped and images.device.type == "cpu"
        self.labels = labels
        self.class_names = class_names
        self.source = source
        self.mean = mean
        self.std = std
        self.augmentation = augmentation or Augmentation()
        self._check()
        self._normalization = {torch.device("cpu"): augment.normalization(mean, std)}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, also of those that no label has."""
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        """Where the images lie, and where `fetch` gathers them."""
        return self.images.device

    @property
    def nbytes(self) -> int:
        """Bytes of images and labels."""
        return self.images.nbytes + self.labels.nbytes

    @property
    def fingerprint(self) -> str:
        """Tells these images and labels from others, wherever they come from; see `distkit.data.sets.fingerprint`."""
        return fingerprint(self.images, self.labels)

    def describe(self) -> str:
        """One line for people: "50,000 images 3x32x32 uint8, 10 classes, from folder data/flowers"."""
        shape = "x".join(str(size) for size in self.images.shape[1:])
        return f"{len(self):,} images {shape} uint8, {self.num_classes} classes, from {self.source}"

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same data set with its tensors on `device`."""
        return self._replace(self.images.to(device), self.labels.to(device), self.augmentation)

    def augmented(self, augmentation: Augmentation) -> ImageDataset:
        """The same images with another augmentation; nothing is copied."""
        return self._replace(self.images, self.labels, augmentation)

    def fetch(self, indices: Tensor) -> ImageBatch:
        """int64 [B] -> images uint8 [B, C, H, W] and labels int64 [B], on the device that holds the images."""
        indices = indices.to(self.images.device, non_blocking=True)
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)

    def normalized(self, samples: range) -> Tensor:
        """The images numbered `samples`, as far as there are so many, without random changes: float32 [n, C, H, W]."""
        chosen = torch.tensor([i for i in samples if i < len(self)], device=self.device)
        return augment.normalize(self.images.index_select(0, chosen), *self._constants(self.device))

    def augment(self, batch: ImageBatch, draws: Draws) -> ImageBatch:
        """A batch from `fetch`, on any device -> float32 images, normalised, and the labels as they are.

        Reads the draws `crop`, `flip` and `cutout`. The batch that is given is not changed.
        """
        images, labels = batch
        how = self.augmentation
        if how.crop_padding:
            corner = draws.integers("crop", 0, 2 * how.crop_padding + 1, count=2)
            images = augment.random_crop(images, corner[:, 0], corner[:, 1], how.crop_padding, how.padding_mode)
        if how.flip:
            images = augment.flip(images, draws.bernoulli("flip", 0.5))
        images = augment.normalize(images, *self._constants(images.device))
        if how.cutout:
            y = draws.integers("cutout y", 0, images.shape[2])
            x = draws.integers("cutout x", 0, images.shape[3])
            images = augment.cutout(images, y, x, how.cutout)
        return images, labels

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._normalization:
            shift, scale = self._normalization[torch.device("cpu")]
            self._normalization[device] = shift.to(device, non_blocking=True), scale.to(device, non_blocking=True)
        return self._normalization[device]

    def _replace(self, images: Tensor, labels: Tensor, augmentation: Augmentation) -> ImageDataset:
        return ImageDataset(
            images,
            labels,
            class_names=self.class_names,
            source=self.source,
            mean=self.mean,
            std=self.std,
            augmentation=augmentation,
            memory_mapped=self.memory_mapped,
        )

    def _check(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != torch.uint8 or labels.dtype != torch.int64:
            raise DataError(
                f"images from {self.source} have the wrong form",
                expected="images uint8 [N, C, H, W] and labels int64 [N]",
                got=f"images {images.dtype} {list(images.shape)}, labels {labels.dtype} {list(labels.shape)}",
            )
        if labels.shape != images.shape[:1] or not len(labels):
            raise DataError(
                f"images from {self.source} have no label each",
                expected="as many labels as images, at least one",
                got=f"{len(images)} images, {len(labels)} labels",
            )
        if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise DataError(
                f"labels from {self.source} are out of range",
                expected=f"0 to {self.num_classes - 1}",
                got=f"{int(labels.min())} to {int(labels.max())}",
            )
        if len(self.mean) != images.shape[1] or len(self.std) != images.shape[1]:
            raise DataError(
                f"images from {self.source} and their mean and std differ in channels",
                expected=f"{images.shape[1]} numbers each",
                got=f"mean {self.mean}, std {self.std}",
            )
        if self.augmentation.padding_mode == "reflect" and self.augmentation.crop_padding >= min(images.shape[2:]):
            raise ConfigError(
                "crop_padding is too large to mirror the image",
                expected=f"less than {min(images.shape[2:])} pixels",
                got=self.augmentation.crop_padding,
            )
