"""Images of one size with a label or a mask each, held as uint8 in memory, on the training device where they fit."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from distkit.config.check import require
from distkit.data import augment
from distkit.data.augment import PaddingMode, PairGeometry
from distkit.data.batch import ImageBatch
from distkit.data.sets.fingerprint import Values, fingerprint
from distkit.data.stream.draws import Draws
from distkit.errors import ConfigError, DataError

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
#: Class id of mask pixels that do not count; give it to the loss as `ignore_index`.
IGNORE = 255


def default_normalization(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of images that do not say theirs: CIFAR-10's in colour, 0.5 otherwise."""
    return (CIFAR10_MEAN, CIFAR10_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)


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
    """Side in pixels of a square at a random position that is set to the mean colour, >= 0."""

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            require(getattr(self, name) >= 0, name, "pixels, >= 0", getattr(self, name), "4")
        require(self.padding_mode in ("zero", "reflect"), "padding_mode", "zero or reflect", self.padding_mode, "zero")


class Pixels(Values, Protocol):
    """The images of a resident set, uint8 [N, C, H, W]: a tensor, or several files that are read as one."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The images numbered `index`, int64 [B] on the same device; `dim` is 0."""

    def to(self, device: torch.device | str) -> Pixels:
        """The same images on `device`."""


A = TypeVar("A")


class ResidentDataset(ABC, Generic[A]):
    """Images in memory with a target each. `fetch` gathers; subclasses augment.

    Args:
        images: uint8 [N, C, H, W].
        targets: labels or masks, [N, ...] on the same device.
        class_names: one name a class.
        source: where the images come from, for people: "folder data/flowers".
        mean: mean per channel on the scale of [0, 1].
        std: standard deviation per channel likewise, > 0.
        augmentation: random changes.

    Raises:
        DataError: shapes, dtypes or class ids do not fit together.
        ConfigError: the augmentation does not fit the images.
    """

    memory_mapped = False
    """Whether the images stay in a file until something reads them."""
    file_notes: tuple[str, ...] = ()
    """What is unusual about the files that the images come from, for people."""
    borrows_normalization = False
    """Whether mean and std are those of other images."""
    _targets_words = ""

    def __init__(
        self,
        images: Pixels,
        targets: Tensor,
        *,
        class_names: tuple[str, ...],
        source: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: A,
    ) -> None:
        self.images = images
        self.targets = targets
        self.class_names = class_names
        self.source = source
        self.augmentation = augmentation
        self._check_targets()
        self._normalize_by(mean, std)
        self._check_augmentation()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_classes(self) -> int:
        """Number of classes, including those that no sample has."""
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        """Where the images are, and where `fetch` gathers them."""
        return self.images.device

    @property
    def nbytes(self) -> int:
        """Bytes of images and targets."""
        return self.images.nbytes + self.targets.nbytes

    @property
    def fingerprint(self) -> str:
        """Identifies the images and targets, wherever they come from; see `distkit.data.sets.fingerprint`."""
        return fingerprint(self.images, self.targets)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know before training on the images; said at the start of a run."""
        if not self.borrows_normalization:
            return self.file_notes
        whose = "CIFAR-10's mean and std" if len(self.mean) == 3 else f"a mean and std of {self.mean[0]}"
        return *self.file_notes, f"{self.source}: normalised with {whose}; `distkit data stats FOLDER` computes its own"

    def describe(self) -> str:
        """One line for people: "50,000 images 3x32x32 uint8, 10 classes, from folder data/flowers"."""
        shape = "x".join(str(size) for size in self.images.shape[1:])
        words = f"{shape} uint8{self._targets_words}"
        return f"{len(self):,} images {words}, {self.num_classes} classes, from {self.source}"

    def to(self, device: torch.device | str) -> Self:
        """The same data set with its tensors on `device`."""
        moved = copy.copy(self)
        moved.images, moved.targets = self.images.to(device), self.targets.to(device)
        moved.memory_mapped = self.memory_mapped and moved.device.type == "cpu"
        return moved

    def augmented(self, augmentation: A) -> Self:
        """The same images with another augmentation; nothing is copied."""
        other = copy.copy(self)
        other.augmentation = augmentation
        other._check_augmentation()
        return other

    def with_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Self:
        """The same images with other numbers to normalise them; nothing is copied.

        Raises:
            DataError: there are more or fewer channels.
        """
        other = copy.copy(self)
        other._normalize_by(mean, std)
        other.borrows_normalization = False
        return other

    def _normalize_by(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        channels = self.images.shape[1]
        if len(mean) != channels or len(std) != channels:
            raise DataError(
                f"images from {self.source} and their mean and std differ in channels",
                expected=f"{channels} numbers each",
                got=f"mean {mean}, std {std}",
                fix="distkit data stats FOLDER",
            )
        self.mean, self.std = mean, std
        self._normalization = {torch.device("cpu"): augment.normalization(mean, std)}

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B] -> images uint8 [B, C, H, W] and their targets [B, ...], on the device that holds the images."""
        indices = indices.to(self.images.device, non_blocking=True)
        return self.images.index_select(0, indices), self.targets.index_select(0, indices)

    def normalized(self, samples: range) -> Tensor:
        """The images numbered `samples`, as far as they exist, without random changes: float32 [n, C, H, W]."""
        chosen = torch.tensor([i for i in samples if i < len(self)], device=self.device)
        return self._normalize(self.images.index_select(0, chosen))

    def _normalize(self, images: Tensor) -> Tensor:
        device = images.device
        if device not in self._normalization:
            shift, scale = self._normalization[torch.device("cpu")]
            self._normalization[device] = shift.to(device, non_blocking=True), scale.to(device, non_blocking=True)
        return augment.normalize(images, *self._normalization[device])

    @abstractmethod
    def _check_targets(self) -> None:
        """Raise DataError unless images and targets fit together."""

    @abstractmethod
    def _check_augmentation(self) -> None:
        """Raise ConfigError unless the augmentation fits the images."""


class ImageDataset(ResidentDataset[Augmentation]):
    """Resident images with a label each. `augment` changes at random and normalises to float32.

    For evaluation give no augmentation: `augment` then only normalises.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], each in [0, len(class_names)).
        mean: mean per channel on the scale of [0, 1]; None: `default_normalization`, which is said at the start.
        std: standard deviation per channel likewise, > 0.
        memory_mapped: the images stay in a file until something reads them.

    The other arguments and what is raised: see `ResidentDataset`.
    """

    def __init__(
        self,
        images: Pixels,
        labels: Tensor,
        *,
        class_names: tuple[str, ...],
        source: str,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        augmentation: Augmentation | None = None,
        memory_mapped: bool = False,
    ) -> None:
        how = augmentation or Augmentation()
        usual = default_normalization(images.shape[1] if len(images.shape) == 4 else 3)
        super().__init__(images, labels, class_names=class_names, source=source, mean=mean or usual[0],
                         std=std or usual[1], augmentation=how)  # fmt: skip
        self.borrows_normalization = (mean is None or std is None) and class_names != CIFAR10_CLASSES
        self.memory_mapped = memory_mapped and images.device.type == "cpu"

    @property
    def labels(self) -> Tensor:
        """Class numbers, int64 [N]."""
        return self.targets

    def augment(self, batch: ImageBatch, draws: Draws) -> ImageBatch:
        """A batch from `fetch`, on any device -> float32 images, normalised, and the labels as they are.

        Reads the draws `crop`, `flip`, `cutout y` and `cutout x`. The batch that is given is not changed.
        """
        images, labels = batch
        how = self.augmentation
        if how.crop_padding:
            corner = draws.integers("crop", 0, 2 * how.crop_padding + 1, count=2)
            images = augment.random_crop(images, corner[:, 0], corner[:, 1], how.crop_padding, how.padding_mode)
        if how.flip:
            images = augment.flip(images, draws.bernoulli("flip", 0.5))
        images = self._normalize(images)
        if how.cutout:
            y = draws.integers("cutout y", 0, images.shape[2])
            x = draws.integers("cutout x", 0, images.shape[3])
            images = augment.cutout(images, y, x, how.cutout)
        return images, labels

    def _check_targets(self) -> None:
        images, labels = self.images, self.targets
        if len(images.shape) != 4 or images.dtype != torch.uint8 or labels.dtype != torch.int64:
            raise DataError(
                f"images from {self.source} have the wrong form",
                expected="images uint8 [N, C, H, W] and labels int64 [N]",
                got=f"images {images.dtype} {list(images.shape)}, labels {labels.dtype} {list(labels.shape)}",
            )
        if labels.shape != images.shape[:1] or not len(labels):
            raise DataError(
                f"images from {self.source} do not have one label each",
                expected="as many labels as images, at least one",
                got=f"{len(images)} images, {len(labels)} labels",
            )
        if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise DataError(
                f"labels from {self.source} are out of range",
                expected=f"0 to {self.num_classes - 1}",
                got=f"{int(labels.min())} to {int(labels.max())}",
            )

    def _check_augmentation(self) -> None:
        how, smallest = self.augmentation, min(self.images.shape[2:])
        if how.padding_mode == "reflect" and how.crop_padding >= smallest:
            raise ConfigError(
                "crop_padding is too large to mirror the image",
                expected=f"less than {smallest} pixels",
                got=how.crop_padding,
            )


class MaskDataset(ResidentDataset[PairGeometry]):
    """Resident images with a mask each, for segmentation. `augment` moves both alike and normalises to float32.

    For evaluation give no augmentation: `augment` then only normalises.

    Args:
        images: uint8 [N, C, H, W].
        masks: class ids uint8 [N, H, W], each below len(class_names), or 255 for pixels that do not count.
        mean: mean per channel on the scale of [0, 1]; None: 0.5 each.
        std: standard deviation per channel likewise, > 0; None: 0.5 each.

    The other arguments and what is raised: see `ResidentDataset`.
    """

    _targets_words = " with masks"

    def __init__(
        self,
        images: Pixels,
        masks: Tensor,
        *,
        class_names: tuple[str, ...],
        source: str,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        augmentation: PairGeometry | None = None,
    ) -> None:
        half = (0.5,) * images.shape[1]
        super().__init__(
            images,
            masks,
            class_names=class_names,
            source=source,
            mean=mean or half,
            std=std or half,
            augmentation=augmentation or PairGeometry(),
        )

    @property
    def masks(self) -> Tensor:
        """Class ids, uint8 [N, H, W]."""
        return self.targets

    def augment(self, batch: tuple[Tensor, Tensor], draws: Draws) -> tuple[Tensor, Tensor]:
        """A batch from `fetch`, on any device -> images float32 [B, C, h, w], normalised, and masks int64 [B, h, w].

        Reads the draws of `PairGeometry.apply`. The batch that is given is not changed.
        """
        images, masks = self.augmentation.apply(*batch, draws)
        return self._normalize(images), masks.to(torch.int64)

    def _check_targets(self) -> None:
        images, masks = self.images, self.targets
        dtypes_fit = images.dtype == torch.uint8 and masks.dtype == torch.uint8
        shapes_fit = len(images.shape) == 4 and masks.shape == (len(images), *images.shape[2:])
        if not dtypes_fit or not shapes_fit or not len(images):
            raise DataError(
                f"images and masks from {self.source} have the wrong form",
                expected="images uint8 [N, C, H, W] and masks uint8 [N, H, W], N >= 1",
                got=f"images {images.dtype} {list(images.shape)}, masks {masks.dtype} {list(masks.shape)}",
            )
        if masks.device.type == "cpu":
            present = torch.bincount(masks.flatten(), minlength=256).nonzero().flatten().tolist()
            unnamed = [i for i in present if self.num_classes <= i != IGNORE]
            if unnamed:
                raise DataError(
                    f"masks from {self.source} have class ids without a name",
                    expected=f"0 to {self.num_classes - 1}, or {IGNORE}",
                    got=unnamed[0],
                )

    def _check_augmentation(self) -> None:
        how = self.augmentation
        height, width = how.resized_crop.size if how.resized_crop else self.images.shape[2:]
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
