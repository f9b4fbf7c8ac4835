"""Images by source: a torchvision set, a folder, packed files or a generator. No source ever stands in for another."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from distkit.config import Color, DataConfig, Split
from distkit.config.check import require_number
from distkit.data.packed.format import read_index
from distkit.data.packed.plan import GREY, channels_of, common_shape, plan_folder
from distkit.data.packed.read import PackedImages, open_packed, packed_folder
from distkit.data.packed.write import write_packed
from distkit.data.sets.decode import head, shape_words
from distkit.data.sets.image_folder import SPLITS, all_classes, class_folders, image_files, list_images
from distkit.data.sets.images import CIFAR10_MEAN, CIFAR10_STD, Augmentation, ImageDataset
from distkit.data.sets.synthetic import generate
from distkit.data.sets.torchvision_sets import TORCHVISION_SETS, torchvision_set
from distkit.errors import DataError
from distkit.runtime.process import available_cores

NUM_SYNTHETIC_CLASSES = 10


@dataclass(frozen=True)
class ImageFacts:
    """What a model must know of images before it is built."""

    num_classes: int
    """Classes, including those without an image."""
    channels: int
    """1, grey, or 3."""


def image_facts(data: DataConfig) -> ImageFacts:
    """Classes and channels of the training images that a configuration asks for, without reading them all.

    Of a set that is known by name, and of synthetic images, nothing is read; of a folder the names of its classes and
    the heads of its images until one is not grey.

    Raises:
        DataError: the folder or the packed split is not as it should be.
    """
    if data.source == "synthetic":
        return ImageFacts(NUM_SYNTHETIC_CLASSES, 3)
    if data.source == "packed":
        index = read_index(packed_folder(data.root, "train"))[0]
        return ImageFacts(len(index.class_names), index.sample_shape[0] if index.sample_shape else index.channels)
    if data.source == "folder":
        folders = {split: class_folders(data.root / split) for split in SPLITS}
        names = all_classes(data.root, folders, data.allow_empty_classes)
        return ImageFacts(len(names), folder_channels(data.root, data.color, data.cache_dir, data.allow_empty_classes))
    row = TORCHVISION_SETS[data.source]
    return ImageFacts(row.num_classes, len(row.mean))


def load_images(
    data: DataConfig,
    split: Split,
    *,
    seed: int,
    augmentation: Augmentation | None = None,
    image_size: int | None = 32,
    facts: ImageFacts | None = None,
) -> ImageDataset:
    """The images that a configuration asks for; `augmentation` is for the train split only.

    Args:
        data: the source, where it is, and how it is read.
        split: train or test.
        seed: seed of the synthetic images; the other sources have none.
        augmentation: random changes of training images.
        image_size: height and width that a folder's images must have; None: those of the first.
        facts: classes and channels that the model was built for.

    Raises:
        DataError: they cannot be had, or have other classes or channels; the message says what to type.
    """
    if data.source == "folder":
        images = folder(data.root, split, data.cache_dir, image_size, color=data.color, background=data.background,
                        allow_empty_classes=data.allow_empty_classes)  # fmt: skip
    elif data.source == "synthetic":
        images = synthetic(split, seed)
    elif data.source == "packed":
        images = packed_images(data.root, split)
    else:
        images = torchvision_set(data.source, data.root, split)
    actual = ImageFacts(images.num_classes, images.images.shape[1])
    if facts is not None and facts != actual:
        words = "{0.num_classes} classes and {0.channels} channels".format
        fix = "--num-classes None --channels None"
        if split == "test":  # the splits were packed one by one
            fix = f"distkit data pack FOLDER {data.root} --overwrite"
        raise DataError(f"the model does not fit the {split} images from {images.source}", expected=words(facts),
                        got=words(actual), fix=fix)  # fmt: skip
    if data.mean is not None and data.std is not None:
        images = images.with_normalization(data.mean, data.std)
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


def folder(
    root: Path,
    split: Split,
    cache_dir: Path | None = None,
    image_size: int | None = 32,
    *,
    color: Color = "auto",
    background: str = "white",
    allow_empty_classes: bool = False,
) -> ImageDataset:
    """ROOT/train/CLASS/* and ROOT/test/CLASS/* as images CxHxW, decoded at the first call only.

    The decoded copy is a packed split. It is made again when a file of the folder or a byte of the copy has changed.

    Args:
        root: the folder that has train/ and test/.
        split: which of them.
        cache_dir: where the decoded copy is kept; None: in `root`.
        image_size: height and width of every image; None: those of the first.
        color: rgb, grey, or auto: grey where every training image is grey, else rgb.
        background: what transparent pixels are laid on: white, grey, black or #rrggbb.
        allow_empty_classes: accept classes that have images in only one split.

    Raises:
        DataError: the tree is not as it should be, an image is damaged or of another size, or the copy cannot be
            written; the message names the file.
    """
    listing = list_images(root, split, allow_empty_classes)
    channels = folder_channels(root, color, cache_dir, allow_empty_classes)
    shape = (channels, image_size, image_size) if image_size else common_shape(listing, "raw", 1, channels)
    expected = shape_words(shape[1:]) if image_size and shape else None
    plan = plan_folder(listing, split, shape, channels=channels, color=color, background=background, expected=expected,
                       fix=None)  # fmt: skip
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
    packed = PackedImages(cache)
    images = packed.resident()
    images.source, images.memory_mapped = f"folder {root}", False  # all of it has just been read
    images.file_notes = (*listing.notes, *(f"{listing.folder}: {note}" for note in packed.split.index.notes))
    return images


def folder_channels(root: Path, color: Color, cache_dir: Path | None = None, allow_empty_classes: bool = False) -> int:
    """Channels of a folder's images, 1 or 3: both splits have those of the training images.

    Images are opened until one has colour; a decoded copy that is up to date says it at once.

    Raises:
        DataError: the tree is not as it should be, or an image is damaged.
    """
    if color != "auto":
        return 1 if color == "grey" else 3
    if _first_is_colored(root / "train"):
        return 3
    listing = list_images(root, "train", allow_empty_classes)
    with contextlib.suppress(DataError):
        index = read_index(_cache_folder(root, "train", cache_dir))[0]
        if (index.source_sha256, index.color) == (listing.sha256, color):
            return index.channels
    return channels_of(listing, color, available_cores())


def _first_is_colored(folder: Path) -> bool:
    """Whether the image that is found first has colour: most folders need no other look, and no listing."""
    for name in class_folders(folder).values():
        for file, _, _ in image_files(folder / name, name, Counter()):
            return head(folder / file)[0] not in GREY
    return False


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
    split: Split, seed: int, *, num_train: int = 10_000, num_test: int = 2_000, num_classes: int = NUM_SYNTHETIC_CLASSES
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
