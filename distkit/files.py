"""Whole files: a reader sees the old file or the new one, never a half, also after a crash or a power cut.

Everything is written under a temporary name in the same folder, synced to disk, renamed, and the folder is synced. A
failure removes the temporary file. Only a killed process leaves one: its name begins with `TEMPORARY`. What lies under
a name already may be anybody's: a link is not followed, and what is no regular file is not waited for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import math
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from distkit.errors import say

TEMPORARY = ".tmp-"


#: What a full disk answers.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextlib.contextmanager
def atomic_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """An open file, for writing and reading, that becomes `path` when the block ends without an exception.

    Args:
        path: its folder exists; a file that is there is replaced.
        mode: permissions, less those that the umask takes away.

    Raises:
        OSError: the folder is not writable, the disk is full, or `path` is a folder; nothing is left behind.
    """
    try:
        with atomic_files([path], mode) as (file,):
            yield file
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write names no file by itself
        raise


@contextlib.contextmanager
def atomic_files(
    paths: Sequence[Path], mode: int = 0o666, before_rename: Callable[[], object] | None = None
) -> Iterator[Sequence[BinaryIO]]:
    """Several files of one folder, all on the disk before the first one gets its name; in the order of `paths`.

    Args:
        paths, mode: as `atomic_file`.
        before_rename: called in between.

    Raises:
        OSError: as `atomic_file`.
    """
    temporaries = [_temporary(path) for path in paths]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(os.fdopen(_create(name, mode), "w+b")) for name in temporaries]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        if before_rename is not None:
            before_rename()
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    sync_folder(paths[0].parent)


@contextlib.contextmanager
def atomic_path(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """The same for a library that writes a file by its name: yields the temporary name of an empty file.

    The file gets `mode` and the umask whatever permissions the library gives it (safetensors: the owner's only).

    Raises:
        OSError: as `atomic_file`.
    """
    temporary = _temporary(path)
    try:
        descriptor = _create(temporary, mode)
        permissions = os.fstat(descriptor).st_mode & 0o7777
        os.close(descriptor)
        yield temporary
        with os.fdopen(open_regular(temporary, os.O_RDWR), "rb+") as file:  # the library may have made another file
            os.fchmod(file.fileno(), permissions)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write names no file by itself
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes | memoryview, mode: int = 0o666) -> None:
    """Make `data` the content of `path`; arguments and errors as `atomic_file`."""
    with atomic_file(path, mode) as file:
        file.write(data)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write `value` to `path` as indented JSON, with null for NaN and infinity, which JSON does not have.

    Raises:
        OSError: as `atomic_file`.
        TypeError: `value` holds something that JSON does not have either; `path` stays as it is.
    """
    write_bytes(path, json.dumps(_without_nan(value), indent=2, allow_nan=False).encode() + b"\n")


def overwrite_json(path: Path, value: Mapping[str, object]) -> None:
    """As `write_json`; on a full disk into the blocks that `path` has, where a kill can leave a part of it.

    Raises:
        OSError: there is no room in them either; or as `write_json`.
    """
    try:
        write_json(path, value)
    except OSError as error:
        if error.errno not in FULL:
            raise
        data = json.dumps(_without_nan(value), indent=2, allow_nan=False).encode() + b"\n"
        descriptor = open_regular(path, os.O_WRONLY)
        try:
            if os.pwrite(descriptor, data, 0) != len(data):
                raise
            os.ftruncate(descriptor, len(data))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: Path, flags: int, mode: int = 0o666, *, follow: bool = False) -> int:
    """Open the regular file `path` as os.open(2) would; a FIFO is not waited for.

    Args:
        path, flags, mode: with O_CREAT a file that is not there is made.
        follow: also where a symbolic link points.

    Raises:
        OSError: `path` is a link, or is not a regular file; or as os.open.
    """
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)  # regular files do not care for NONBLOCK
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "is a symbolic link", str(path)) from error
        if error.errno == errno.ENXIO:  # a FIFO without a reader, a socket
            raise OSError(errno.EINVAL, "is not a regular file", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return descriptor


def read_regular(path: Path, most: int) -> bytes:
    """All of the regular file `path`, or of the one that it links to.

    Raises:
        OSError: it has more than `most` bytes; or as `open_regular`.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY, follow=True), "rb") as file:
        large = os.fstat(file.fileno()).st_size > most
        data = b"" if large else file.read(most + 1)
    if large or len(data) > most:
        raise OSError(errno.EFBIG, f"has more than the {most:,} bytes that are read", str(path))
    return data


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power cut.

    Raises:
        OSError: it is not a folder, or the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path, name: str = "") -> None:
    """Remove what killed writers of the file `name`, or of any, left in `folder`; only where nobody else is writing.

    Raises:
        OSError: one cannot be removed.
    """
    for path in folder.glob(f"{TEMPORARY}{glob.escape(name)}*"):
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock file `path` against all other processes; it is removed at the end. The lock ends with its process.

    Yields False where the file system has no locks: work continues without one.

    Args:
        path: a file that is used for nothing else; its folder exists.
        on_wait: called before waiting for a process that has the lock.

    Raises:
        OSError: the file cannot be made, or is a link.
    """
    with contextlib.ExitStack() as stack:
        exclusive = current = False
        while not current:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, descriptor)
            exclusive = _lock(descriptor, path, on_wait)
            # Whoever had the lock has removed the file: a new one of that name may be locked by somebody else.
            current = not exclusive or _is_open(descriptor, path)
        if exclusive:
            stack.callback(path.unlink, missing_ok=True)
        yield exclusive


def _lock(descriptor: int, path: Path, on_wait: Callable[[], None]) -> bool:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        say(f"distkit: warning: {path} cannot be locked ({error}); processes that start together may do the same work")
        return False
    return True


def _temporary(path: Path) -> Path:
    """A unique temporary name: two processes writing the same file must not rename each other's half."""
    name = os.fsdecode(os.fsencode(path.name)[:200])  # file systems take 255 bytes
    return path.with_name(f"{TEMPORARY}{name}-{uuid.uuid4().hex[:8]}")


def _create(path: Path, mode: int) -> int:
    """A new, empty file, open for reading and writing; never one that is there already, nor where a link points."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_open(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
