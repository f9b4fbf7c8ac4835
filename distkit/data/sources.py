"""Images by source: a torchvision set, a folder, packed files or a generator. No source ever stands in for another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from distkit.config import DataConfig, Split
from distkit.config.check import require_number
from distkit.data.packed.plan import common_shape, plan_folder
from distkit.data.packed.read import PackedImages, open_packed
from distkit.data.packed.write import write_packed
from distkit.data.sets.decode import shape_words
from distkit.data.sets.image_folder import list_images
from distkit.data.sets.images import CIFAR10_MEAN, CIFAR10_STD, Augmentation, ImageDataset
from distkit.data.sets.synthetic import generate
from distkit.data.sets.torchvision_sets import torchvision_set
from distkit.errors import DataError
from distkit.runtime.process import available_cores


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
    """ROOT/SPLIT/ with raw images; see `distkit.data.packed.read`.

    Raises:
        DataError: there is none, or it holds encoded images, which are read one by one.
    """
    images = open_packed(root, split)
    if isinstance(images, ImageDataset):
        return images
    raise DataError(
        f"{root / split} holds encoded images, and this recipe takes whole batches of raw ones",
        expected="images of one size, packed raw",
        got="encoded images",
        fix=f"distkit data pack FOLDER {root} --form raw --overwrite",
    )


def folder(root: Path, split: Split, cache_dir: Path | None = None, image_size: int | None = 32) -> ImageDataset:
    """ROOT/train/CLASS/* and ROOT/test/CLASS/* as images 3xHxW, decoded at the first call only.

    The decoded copy is a packed split. It is made again when a file of the folder or a byte of the copy has changed.

    Args:
        root: the folder that has train/ and test/.
        split: which of them.
        cache_dir: where the decoded copy is kept; None: in `root`.
        image_size: height and width of every image; None: those of the first.

    Raises:
        DataError: the tree is not as it should be, an image is damaged or of another size, or the copy cannot be
            written; the message names the file.
    """
    listing = list_images(root, split)
    shape = (3, image_size, image_size) if image_size else common_shape(listing, "raw", 1)
    expected = shape_words(shape[1:]) if image_size and shape else None
    plan = plan_folder(listing, split, shape, expected=expected, fix=None)
    cache = _cache_folder(root, split, cache_dir)
    try:
        write_packed(cache, plan, num_workers=available_cores(), overwrite=True)
    except OSError as error:
        raise DataError(
            f"the decoded copy of the images cannot be written to {cache.parent}",
            expected="a folder that can be written, with enough space",
            got=error,
            fix="--data.cache-dir DIR",
        ) from error
    images = PackedImages(cache).resident()
    images.source, images.memory_mapped = f"folder {root}", False  # all of it has just been read
    return images


def _cache_folder(root: Path, split: Split, cache_dir: Path | None) -> Path:
    if cache_dir is None:
        return root / f".distkit-cache-{split}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the folder {cache_dir} of --data.cache-dir cannot be made"
        raise DataError(what, expected="a folder", got=error, fix="--data.cache-dir DIR") from error
    tag = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:12]
    return cache_dir / f"distkit-cache-{tag}-{split}"


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
