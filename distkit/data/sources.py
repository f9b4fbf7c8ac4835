"""Where images come from: a torchvision set, a folder of images, or a generator. Nothing is ever silently replaced."""

from __future__ import annotations

from pathlib import Path

import torch

from distkit.config import DataConfig, Split
from distkit.config.check import require_number
from distkit.data.packed.read import open_packed
from distkit.data.sets.image_folder import load_folder
from distkit.data.sets.images import CIFAR10_MEAN, CIFAR10_STD, Augmentation, ImageDataset
from distkit.data.sets.synthetic import generate
from distkit.data.sets.torchvision_sets import torchvision_set
from distkit.errors import DataError


def load_images(
    data: DataConfig,
    split: Split,
    *,
    seed: int,
    augmentation: Augmentation | None = None,
    image_size: int | None = 32,
) -> ImageDataset:
    """The images that a configuration asks for; `augmentation` is for the train split only.

    Args:
        data: source, root and cache_dir.
        split: train or test.
        seed: seed of the synthetic images; the other sources have none.
        augmentation: random changes of training images.
        image_size: height and width that a folder's images must have; None: those of the first.

    Raises:
        DataError: they cannot be had; the message says what to type.
    """
    if data.source == "folder":
        images = folder(data.root, split, data.cache_dir, image_size)
    elif data.source == "synthetic":
        images = synthetic(split, seed)
    elif data.source == "packed":
        images = packed_images(data.root, split)
    else:
        images = torchvision_set(data.source, data.root, split)
    return images.augmented(augmentation) if augmentation and split == "train" else images


def packed_images(root: Path, split: Split) -> ImageDataset:
    """ROOT/SPLIT.pack with raw images; see `distkit.data.packed.read`.

    Raises:
        DataError: there is none, or it holds encoded images, which are read one by one.
    """
    images = open_packed(root, split)
    if isinstance(images, ImageDataset):
        return images
    raise DataError(
        f"{root / split}.pack holds encoded images, and this recipe takes whole batches of raw ones",
        expected="images of one size, packed raw",
        got="encoded images",
        fix=f"distkit data pack FOLDER {root} --form raw --overwrite",
    )


def folder(root: Path, split: Split, cache_dir: Path | None = None, image_size: int | None = 32) -> ImageDataset:
    """ROOT/train/CLASS/* and ROOT/test/CLASS/*, decoded once; see `distkit.data.sets.image_folder.load_folder`."""
    tensors, class_names = load_folder(root, split, cache_dir, image_size)
    return ImageDataset(
        tensors["images"],
        tensors["labels"],
        class_names=class_names,
        source=f"folder {root}",
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
    )


def synthetic(
    split: Split, seed: int, *, num_train: int = 10_000, num_test: int = 2_000, num_classes: int = 10
) -> ImageDataset:
    """Generated 3x32x32 images that a small convolutional network learns and a linear model does not.

    The same seed gives the same images; train and test have one distribution and no image in common.

    Args:
        split: train or test.
        seed: 0 to 2^63 - 1.
        num_train: images of the train split, >= 1.
        num_test: images of the test split, >= 1.
        num_classes: classes, >= 2, equally frequent up to one image.
    """
    require_number("num_train", num_train, least=1, example="10000")
    require_number("num_test", num_test, least=1, example="2000")
    require_number("num_classes", num_classes, least=2, example="10")
    images, labels = generate(seed, split, num_train if split == "train" else num_test, num_classes)
    return ImageDataset(
        torch.from_numpy(images),
        torch.from_numpy(labels),
        class_names=tuple(f"class {i}" for i in range(num_classes)),
        source=f"synthetic (seed {seed})",
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
    )


def cifar10(root: Path, split: Split) -> ImageDataset:
    """CIFAR-10 (Krizhevsky 2009); `torchvision_set` has the others too."""
    return torchvision_set("cifar10", root, split)
