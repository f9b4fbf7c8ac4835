"""Folders of labelled images, ROOT/train/CLASS/* and ROOT/test/CLASS/*: listed and checked."""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distkit.config import Split
from distkit.data.sets.decode import SUFFIXES
from distkit.errors import DataError, nearest, printable, shorten

SPLITS: tuple[Split, Split] = ("train", "test")
LAYOUT = "ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg (or .png, …)"
ALLOW_EMPTY = "--data.allow-empty-classes"

ClassFolders = Mapping[str, str]
"""Class name in Unicode's composed form (NFC) -> the name of its folder; by class name."""


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
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Endings of the files that are not read, or where they lie -> how many."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about the files: those left out, and classes without images."""
        empty = [printable(name) for i, name in enumerate(self.class_names) if i not in set(self.labels)]
        return (*left_out_note(self.folder, self.left_out),
                *([f"{self.folder}: no image of {shorten(empty, 10)}"] if empty else []))  # fmt: skip


def left_out_note(folder: Path, left_out: Mapping[str, int]) -> tuple[str, ...]:
    """A sentence about the files that are not read; none where there are none."""
    if not left_out:
        return ()
    count = sum(left_out.values())
    kinds = ", ".join(f"{printable(ending)} ({number:,})" for ending, number in sorted(left_out.items()))
    return (f"{folder}: {count:,} {'file is' if count == 1 else 'files are'} left out: {kinds}",)


def list_images(root: Path, split: Split, allow_empty: bool = False) -> Listing:
    """List a split, and check that both splits have the same classes.

    Args:
        root: the folder that has train/ and test/.
        split: which of them.
        allow_empty: accept classes without images in this split.

    Raises:
        DataError: the tree is not as it should be; the message names the folder or the file.
    """
    folders = {each: class_folders(root / each) for each in SPLITS}
    names = all_classes(root, folders, allow_empty)
    return list_split(root / split, folders[split], names, allow_empty)


def all_classes(
    root: Path, folders: Mapping[Split, ClassFolders], allow_empty: bool, option: str = ALLOW_EMPTY
) -> tuple[str, ...]:
    """The class names of all splits of `root`, sorted.

    Raises:
        DataError: the splits differ in them, and that is not allowed; `option` is what allows it.
    """
    names = sorted({name for each in folders.values() for name in each})
    lone = [name for name in names if any(name not in each for each in folders.values())]
    if lone and not allow_empty:
        where = {split: [printable(name) for name in lone if name in each] for split, each in folders.items()}
        raise DataError(
            f"the {' and '.join(folders)} folders in {root} have different classes",
            expected=f"the same class folders in both; {option}, where a class has no image in one of them",
            got="; ".join(f"only in {split}: {shorten(each, 10)}" for split, each in where.items() if each),
            fix=_rename(root, folders, lone) or option,
        )
    return tuple(names)


def _rename(root: Path, folders: Mapping[Split, ClassFolders], lone: Sequence[str]) -> str | None:
    """The command that renames the first class which only the last split has, where another one is spelled like it."""
    first, *_, last = folders
    there = {name.casefold(): name for name in lone if name in folders[first]}
    for name in (name for name in lone if name in folders[last]):
        like = there.get(name.casefold()) or there.get(nearest(name.casefold(), there) or "")
        if like is not None:
            source, target = root / last / folders[last][name], root / last / folders[first][like]
            return f"mv {shlex.quote(str(source))} {shlex.quote(str(target))}"
    return None


def list_split(
    folder: Path,
    folders: ClassFolders,
    class_names: Sequence[str] | None = None,
    allow_empty: bool = False,
    option: str = ALLOW_EMPTY,
) -> Listing:
    """List FOLDER/CLASS/*.

    Args:
        folder: of the split.
        folders: its classes.
        class_names: all classes in order; None: those of `folders`.
        allow_empty: accept classes without images; at least one must have some.
        option: what the user types to allow that.

    Raises:
        DataError: there is no image, or none in a class, or a file is not what it seems.
    """
    class_names = tuple(folders) if class_names is None else tuple(class_names)
    files: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    left_out: Counter[str] = Counter(_beside(folder))
    for label, name in enumerate(class_names):
        others: Counter[str] = Counter()
        images = sorted(image_files(folder / folders[name], folders[name], others)) if name in folders else []
        left_out += others
        if not (images or allow_empty):
            kinds = f"{others.total()} other files: {', '.join(sorted(others))}" if others else "no file"
            raise DataError(f"the class folder {folder / folders[name]} has no image", expected=LAYOUT, got=kinds,
                            fix=option)  # fmt: skip
        for file, size, changed in images:
            digest.update(f"{file}\0{size}\0{changed}\n".encode(errors="surrogateescape"))
            files.append(file)
            sizes.append(size)
            labels.append(label)
    if not files:
        raise DataError(f"the folder {folder} has no image", expected=LAYOUT, got=", ".join(sorted(left_out)) or None)
    return Listing(folder, class_names, tuple(files), tuple(sizes), tuple(labels), digest.hexdigest(), left_out)


def _beside(folder: Path) -> Mapping[str, int]:
    """Images that lie in a split's folder itself, where they belong to no class."""
    count = sum(entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and not _is_folder(entry)
                for entry in entries(folder) or ())  # fmt: skip
    return {"images in no class folder": count} if count else {}


def class_folders(folder: Path, fix: str = "--data.root DIR") -> ClassFolders:
    """The class folders in FOLDER.

    Raises:
        DataError: there is no such folder, it cannot be read, it has none, or two that differ only in the way in which
            their names are encoded; `fix` is what to type.
    """
    inside = entries(folder)
    if inside is None:
        missing = folder if entries(folder.parent) is not None else folder.parent
        raise DataError(f"there is no folder {missing}", expected=LAYOUT, fix=fix)
    folders: dict[str, str] = {}
    for name in sorted(entry.name for entry in inside if not entry.name.startswith(".") and _is_folder(entry)):
        composed = unicodedata.normalize("NFC", name)
        if composed in folders:
            first, second = (f"{folder / each} ({each!a})" for each in (folders[composed], name))
            raise DataError(f"two folders in {folder} are one class, {composed}, in two encodings (NFC and NFD)",
                            expected="one folder", got=f"{first}, {second}",
                            fix="move the images of one into the other")  # fmt: skip
        folders[composed] = name
    if not folders:
        raise DataError(f"the folder {folder} has no class folders", expected=LAYOUT, fix=fix)
    return dict(sorted(folders.items()))


def entries(folder: Path) -> list[os.DirEntry[str]] | None:
    """What is in a folder; None where there is no such folder.

    Raises:
        DataError: it is there and cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read", expected="a folder that this user may read", got=error,
                        fix=f"chmod u+rx {shlex.quote(str(error.filename or folder))}") from error  # fmt: skip


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link into a folder that this user may not enter
        return False


def image_files(folder: Path, prefix: str, left_out: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """Path, beginning with `prefix`, bytes and time of change of every image in `folder` and below.

    Counts the endings of other files in `left_out`; hidden ones are nothing.

    Raises:
        DataError: something cannot be read or is not what it seems.
    """
    for entry in entries(folder) or ():
        name = f"{prefix}/{entry.name}"
        if entry.name.startswith("."):
            continue
        try:
            status = entry.stat()
        except OSError as error:  # a link to nowhere or in a circle, or a folder that may be listed and not entered
            denied = isinstance(error, PermissionError)
            fix = f"chmod u+rx {shlex.quote(str(folder))}" if denied else "repair or delete it"
            what = f"{folder / entry.name} cannot be read"
            raise DataError(what, expected="an image or a folder", got=error, fix=fix) from error
        if stat.S_ISDIR(status.st_mode):
            if entry.is_symlink() and folder.resolve().is_relative_to(Path(entry.path).resolve()):
                what = f"the link {entry.path} leads back to a parent folder"
                raise DataError(what, expected="no cycle of links", fix=f"rm {entry.path}")
            yield from image_files(folder / entry.name, name, left_out)
        elif entry.name.lower().endswith(SUFFIXES):
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{entry.path} is not a regular file", expected="an image", fix="delete it")
            yield name, status.st_size, status.st_mtime_ns
        else:
            left_out[Path(entry.name).suffix.lower() or "no ending"] += 1
