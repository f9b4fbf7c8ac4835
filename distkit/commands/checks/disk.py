"""The directory of the checkpoints: whether a save works there, and whether all that are kept have room."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distkit.checkpoint.retention import list_checkpoints
from distkit.commands.checks.finding import Context, Finding, in_words
from distkit.files import sync_folder

NAME = "checkpoints"
PROBE_BYTES = 2**20
HINTS = {
    errno.ENOSPC: "free space or inodes there",
    errno.EDQUOT: "your quota is used up: remove files",
    errno.EROFS: "it is mounted read-only: remount it",
    errno.EACCES: "you may not write there: chmod or chown",
    errno.EPERM: "an attribute or the kind of file system forbids it: lsattr -d",
    errno.ENOTDIR: "a file lies where a folder belongs: move it away",
}


def checkpoints(context: Context) -> list[Finding]:
    """Do what a save does, in small; then compare space and inodes with the predicted size."""
    folder = nearest_folder(context.run_dir)
    try:
        for step in try_save(folder):
            doing = step
    except OSError as error:
        hint = HINTS.get(error.errno or 0, "saves need files, fsync and the renaming of folders")
        remedy = f"{hint}; or another --run-dir"
        return [Finding(NAME, "error", f"{folder}: cannot {doing}: {error.strerror}", remedy)]
    return [*_space(context, folder), *_inodes(context, folder)] or [Finding(NAME, "ok", _room(context, folder))]


def nearest_folder(path: Path) -> Path:
    """RUN/checkpoints, or what of its path exists: nothing is made here that outlives the check."""
    path = Path(os.path.abspath(path)) / "checkpoints"
    return next(folder for folder in (path, *path.parents) if os.path.lexists(folder))


def try_save(folder: Path) -> Iterator[str]:
    """The steps of a save, each named before it is done; nothing of it stays where the file system allows that.

    Raises:
        OSError: of the step that was named last.
    """
    yield "create a folder"
    made = Path(tempfile.mkdtemp(prefix=".tmp-doctor-", dir=folder))
    renamed = made.with_name(made.name + "-renamed")
    try:
        yield "write a file"
        with open(made / "probe", "wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            yield "fsync a file"
            os.fsync(file.fileno())
        yield "fsync a folder"
        sync_folder(made)
        yield "rename a folder"
        os.rename(made, renamed)
        sync_folder(folder)
        yield "remove a folder"
        shutil.rmtree(renamed)
    finally:
        for path in (made, renamed):
            with contextlib.suppress(OSError):
                shutil.rmtree(path, ignore_errors=True)


def _needed(context: Context) -> int | None:
    """Checkpoints that are still to be written before old ones go: those that are kept, and the one being written."""
    if context.footprint is None or context.footprint.kept is None:
        return None
    there = len(list_checkpoints(context.run_dir / "checkpoints"))
    return max(1, context.footprint.kept + 1 - there)


def _space(context: Context, folder: Path) -> list[Finding]:
    footprint, free = context.footprint, shutil.disk_usage(folder).free
    if footprint is None:
        return []
    many, size = _needed(context), in_words(footprint.nbytes)
    if many is None:
        message = f"every checkpoint is kept, and {in_words(free)} hold {free // max(1, footprint.nbytes)} of {size}"
        return [Finding(NAME, "warning", message, "--checkpoint.keep-last 3, and --checkpoint.keep-every N")]
    need = many * footprint.nbytes
    if need <= free:
        return []
    message = f"{folder}: {in_words(free)} free, and {many} checkpoints of {size} need {in_words(need)}"
    return [Finding(NAME, "error", f"{message} ({footprint.source})", "free space there, another --run-dir, or a "
                    "smaller --checkpoint.keep-last")]  # fmt: skip


def _inodes(context: Context, folder: Path) -> list[Finding]:
    """Files and folders that may still be made; some file systems have no such limit and say 0 of 0."""
    stats = os.statvfs(folder)
    if stats.f_files == 0 or context.footprint is None:
        return []
    need = (_needed(context) or 1) * context.footprint.files
    if need <= stats.f_favail:
        return []
    message = f"{folder}: {stats.f_favail} inodes free, and the checkpoints need {need}"
    return [Finding(NAME, "error", message, "remove small files there, or another --run-dir")]


def _room(context: Context, folder: Path) -> str:
    free = in_words(shutil.disk_usage(folder).free)
    if context.footprint is None:
        return (
            f"{folder}: write, fsync and rename work, {free} free; --params N compares this with a model's checkpoints"
        )
    many = _needed(context)
    size = f"{many} x {in_words(context.footprint.nbytes)} ({context.footprint.source})"
    return f"{folder}: write, fsync and rename work, {free} free for {size}"
