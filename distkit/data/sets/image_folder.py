"""Folders of images, ROOT/train/CLASS/* and ROOT/test/CLASS/*: listed, checked, decoded once into one cache file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from distkit.config import Split
from distkit.data.sets.cache import CacheWriter, Tensors, locked, read_cache
from distkit.errors import DataError
from distkit.runtime.process import available_cores

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
SPLITS: tuple[Split, Split] = ("train", "test")
LAYOUT = "ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg (or .png, …)"
#: Files that a thread decodes at a time.
CHUNK = 256


@dataclass(frozen=True)
class Listing:
    """The image files of one split, by class name and then by path: the order of the samples."""

    folder: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    """Bytes of each file."""
    labels: tuple[int, ...]
    fingerprint: str


def load_folder(
    root: Path, split: Split, cache_dir: Path | None, image_size: int | None
) -> tuple[Tensors, tuple[str, ...]]:
    """`{"images": uint8 [N, 3, H, W], "labels": int64 [N]}` and the class names, decoded at the first call only.

    Args:
        root: the folder that has train/ and test/.
        split: which of them.
        cache_dir: where the decoded copy is kept; None: in `root`.
        image_size: height and width of every image; None: those of the first.

    Raises:
        DataError: the tree is not as it should be, an image is damaged or of another size, or the copy cannot be
            written; the message names the file.
    """
    listing = list_images(root, split, image_size)
    path = _cache_path(root, split, cache_dir)
    found = read_cache(path, listing.fingerprint)
    if found is None:
        with locked(path.parent):
            found = read_cache(path, listing.fingerprint) or _build(path, listing, image_size)
    return found[0], listing.class_names


def list_images(root: Path, split: Split, image_size: int | None) -> Listing:
    """List a split, and check that both splits have the same classes."""
    names = {each: class_folders(root / each) for each in SPLITS}
    check_same_classes(root, names)
    return list_split(root / split, names[split], f"1 {image_size}")


def check_same_classes(root: Path, names: Mapping[Split, tuple[str, ...]]) -> None:
    """Raise DataError unless the splits of `root` have the same class names."""
    every = {name for each in names.values() for name in each}
    lone = sorted(every - every.intersection(*names.values()))
    if lone:
        raise DataError(
            f"the {' and '.join(names)} folders in {root} have different classes",
            expected="the same class folders in both",
            got=f"only in one of them: {', '.join(lone[:10])}",
            fix=f"mkdir or rename the folder {lone[0]}",
        )


def list_split(folder: Path, class_names: tuple[str, ...], salt: str) -> Listing:
    """List FOLDER/CLASS/* for these classes; `salt` is part of the fingerprint.

    Raises:
        DataError: a class has no image.
    """
    files: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    total = hashlib.sha256(f"{salt}\n".encode())
    for label, name in enumerate(class_names):
        found = sorted(_files(folder / name, name))
        if not found:
            raise DataError(f"the class folder {folder / name} has no image", expected=LAYOUT)
        for file, size, changed in found:
            total.update(f"{file}\0{size}\0{changed}\n".encode(errors="surrogateescape"))
        files += [file for file, _, _ in found]
        sizes += [size for _, size, _ in found]
        labels += [label] * len(found)
    return Listing(folder, class_names, tuple(files), tuple(sizes), tuple(labels), total.hexdigest())


def class_folders(folder: Path, fix: str = "--data.root DIR") -> tuple[str, ...]:
    """Names of the class folders in FOLDER, sorted.

    Raises:
        DataError: there is no such folder, or it has none; `fix` is what to type.
    """
    if not folder.is_dir():
        missing = folder.parent if not folder.parent.is_dir() else folder
        raise DataError(f"there is no folder {missing}", expected=LAYOUT, fix=fix)
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"the folder {folder} has no class folders", expected=LAYOUT, fix=fix)
    return tuple(names)


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Path below the split's folder, bytes and time of change of every image in `folder` and below."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}/{entry.name}"
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except OSError as error:  # a link to nowhere or in a circle
                raise DataError(f"{folder / entry.name} cannot be read", expected="an image or a folder", got=error,
                                fix="mend or delete it") from error  # fmt: skip
            if stat.S_ISDIR(status.st_mode):
                if entry.is_symlink() and folder.resolve().is_relative_to(Path(entry.path).resolve()):
                    raise DataError(f"the link {entry.path} leads back to a folder around it", expected="no circle",
                                    fix=f"rm {entry.path}")  # fmt: skip
                yield from _files(folder / entry.name, name)
            elif entry.name.lower().endswith(SUFFIXES):
                if not stat.S_ISREG(status.st_mode):
                    raise DataError(f"{entry.path} is not a regular file", expected="an image", fix="delete it")
                yield name, status.st_size, status.st_mtime_ns


def _cache_path(root: Path, split: Split, cache_dir: Path | None) -> Path:
    if cache_dir is None:
        return root / f".distkit-cache-{split}.safetensors"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError("--data.cache-dir cannot be made", expected="a folder", got=error, fix="--data.cache-dir DIR") \
            from error  # fmt: skip
    tag = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:12]
    return cache_dir / f"distkit-cache-{tag}-{split}.safetensors"


def _build(path: Path, listing: Listing, image_size: int | None) -> tuple[Tensors, dict[str, str]]:
    logger.info("decoding %d images of %s into %s", len(listing.files), listing.folder, path)
    metadata = {"class_names": json.dumps(listing.class_names), "count": str(len(listing.files))}
    with CacheWriter(path) as writer:
        images = decode([listing.folder / file for file in listing.files], image_size)
        tensors = {"images": torch.from_numpy(images), "labels": torch.tensor(listing.labels, dtype=torch.int64)}
        writer.commit(tensors, metadata, listing.fingerprint)
    return read_cache(path, listing.fingerprint) or (tensors, metadata)


def decode(paths: list[Path], image_size: int | None) -> NDArray[np.uint8]:
    """Decode images to RGB with all cores: uint8 [len(paths), 3, H, W].

    Raises:
        DataError: an image is damaged or of another size; the first such path in the order of `paths`.
    """
    height, width = (image_size, image_size) if image_size else _decode_one(paths[0]).shape[:2]
    images = np.empty((len(paths), 3, height, width), np.uint8)

    def work(start: int) -> None:
        for i, path in enumerate(paths[start : start + CHUNK], start):
            pixels = _decode_one(path)
            if pixels.shape[:2] != (height, width):
                raise DataError(
                    f"the image {path} has another size",
                    expected=f"{height}x{width} pixels" + ("" if image_size else f", as {paths[0]}"),
                    got=f"{pixels.shape[0]}x{pixels.shape[1]} pixels",
                )
            images[i] = pixels.transpose(2, 0, 1)

    pool = ThreadPoolExecutor(available_cores())
    try:
        list(pool.map(work, range(0, len(paths), CHUNK)))  # raises what a thread raised
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def _decode_one(path: Path) -> NDArray[np.uint8]:
    return decode_image(path, str(path), fix=f"rm {path}")


#: Pillow's modes that fit into 8 bits a channel; 16-bit grey would silently turn white.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")


def decode_image(source: Path | BinaryIO, name: str, fix: str) -> NDArray[np.uint8]:
    """An image file, whatever its mode, as RGB: uint8 [H, W, 3].

    Raises:
        DataError: it is damaged or no image; the message has `name` and says to type `fix`.
    """
    with explained(name, fix), Image.open(source) as image:
        if image.mode not in MODES:
            raise DataError(f"{name} has pixels of mode {image.mode}, which 8 bits cannot hold",
                            expected=", ".join(MODES), fix=fix)  # fmt: skip
        return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def explained(name: str, fix: str) -> Iterator[None]:
    """Turn what Pillow raises for the image `name` into a DataError."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"the image {name} cannot be decoded", expected="a whole image file", got=error, fix=fix
        ) from error
