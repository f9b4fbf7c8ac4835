"""Where images come from: CIFAR-10, a folder of images, or a generator. Nothing is ever silently replaced."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from distkit.config import DataConfig, Split
from distkit.config.check import require_number
from distkit.data.cache import locked
from distkit.data.image_folder import load_folder
from distkit.data.images import CIFAR10_MEAN, CIFAR10_STD, Augmentation, ImageDataset
from distkit.data.synthetic import generate
from distkit.errors import DataError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]


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
    if data.source == "cifar10":
        images = cifar10(data.root, split)
    elif data.source == "folder":
        images = folder(data.root, split, data.cache_dir, image_size)
    else:
        images = synthetic(split, seed)
    return images.augmented(augmentation) if augmentation and split == "train" else images


def folder(root: Path, split: Split, cache_dir: Path | None = None, image_size: int | None = 32) -> ImageDataset:
    """ROOT/train/CLASS/* and ROOT/test/CLASS/*, decoded once; see `distkit.data.image_folder.load_folder`."""
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
    """CIFAR-10 (Krizhevsky 2009) by torchvision, downloaded into `root` unless it is there.

    Raises:
        DataError: it cannot be downloaded, unpacked or verified; the message names the other sources. Nothing is left
            of a failed download.
    """
    try:
        dataset = _open_cifar10(root, split)
    except (OSError, HTTPException, RuntimeError, EOFError, ImportError) as error:
        raise DataError(
            f"CIFAR-10 cannot be downloaded to {root}",
            expected="a network connection, or a verified copy made before by the same command",
            got=f"{type(error).__name__}: {error}",
            fix="--data.source folder --data.root DIR, or --data.source synthetic",
        ) from error
    return ImageDataset(
        torch.from_numpy(np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))),
        torch.tensor(dataset.targets, dtype=torch.int64),
        class_names=tuple(dataset.classes),
        source=f"CIFAR-10 in {root}",
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
    )


def _open_cifar10(root: Path, split: Split) -> CIFAR10:
    """torchvision's data set; it compares the md5 of every file with its own list before it reads one."""
    from torchvision.datasets import CIFAR10

    def opened() -> CIFAR10:
        with warnings.catch_warnings():
            # NumPy 2.4 warns about the way in which the arrays of 2009 were pickled.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            return CIFAR10(root, train=split == "train")

    try:
        return opened()
    except RuntimeError:
        root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        try:
            return opened()
        except RuntimeError:
            _download_cifar10(root)
        return opened()


def _download_cifar10(root: Path) -> None:
    """Download and unpack in a folder of its own, and move it to its place when all of it is verified."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as name:
        archive = root / CIFAR10.filename
        if check_integrity(str(archive), CIFAR10.tgz_md5):
            (Path(name) / CIFAR10.filename).symlink_to(os.path.abspath(archive))
        CIFAR10(name, download=True)
        target = root / CIFAR10.base_folder
        if target.exists():
            shutil.rmtree(target)
        (Path(name) / CIFAR10.base_folder).replace(target)
