"""Folders of labelled images, ROOT/train/CLASS/* and ROOT/test/CLASS/*: listed and checked."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from distkit.config import Split
from distkit.data.sets.decode import SUFFIXES
from distkit.errors import DataError

SPLITS: tuple[Split, Split] = ("train", "test")
LAYOUT = "ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg (or .png, …)"


@dataclass(frozen=True)
class Listing:
    """The image files of one split, by class name and then by path: the order of the samples."""

    folder: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...]
    """Paths below the folder."""
    sizes: tuple[int, ...]
    """Bytes of each file."""
    labels: tuple[int, ...]
    sha256: str
    """Of every path, size and time of change."""


def list_images(root: Path, split: Split) -> Listing:
    """List a split, and check that both splits have the same classes.

    Raises:
        DataError: the tree is not as it should be; the message names the folder or the file.
    """
    names = {each: class_folders(root / each) for each in SPLITS}
    check_same_classes(root, names)
    return list_split(root / split, names[split])


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


def list_split(folder: Path, class_names: tuple[str, ...]) -> Listing:
    """List FOLDER/CLASS/* for these classes.

    Raises:
        DataError: a class has no image, or a file is not what it seems.
    """
    files: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    for label, name in enumerate(class_names):
        images = sorted(_images(folder / name, name))
        if not images:
            raise DataError(f"the class folder {folder / name} has no image", expected=LAYOUT)
        for file, size, changed in images:
            digest.update(f"{file}\0{size}\0{changed}\n".encode(errors="surrogateescape"))
            files.append(file)
            sizes.append(size)
            labels.append(label)
    return Listing(folder, class_names, tuple(files), tuple(sizes), tuple(labels), digest.hexdigest())


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


def _images(folder: Path, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Path below the split's folder, bytes and time of change of every image in `folder` and below."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}/{entry.name}"
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except OSError as error:  # a link to nowhere or in a circle
                what = f"{folder / entry.name} cannot be read"
                raise DataError(what, expected="an image or a folder", got=error, fix="repair or delete it") from error
            if stat.S_ISDIR(status.st_mode):
                if entry.is_symlink() and folder.resolve().is_relative_to(Path(entry.path).resolve()):
                    what = f"the link {entry.path} leads back to a parent folder"
                    raise DataError(what, expected="no cycle of links", fix=f"rm {entry.path}")
                yield from _images(folder / entry.name, name)
            elif entry.name.lower().endswith(SUFFIXES):
                if not stat.S_ISREG(status.st_mode):
                    raise DataError(f"{entry.path} is not a regular file", expected="an image", fix="delete it")
                yield name, status.st_size, status.st_mtime_ns
