"""Writes new files only, hashes them while writing, and returns when they are on disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

from distkit.checkpoint.format import FileEntry

CHUNK_BYTES = 2**22
#: Below this size, a second thread and direct writes cost more than they save.
SMALL_BYTES = 2**20


def _nothing() -> None:
    """Nobody wants to be called."""


def write_file(
    path: Path, data: memoryview, *, halfway: Callable[[], None] = _nothing, before_sync: Callable[[], None] = _nothing
) -> FileEntry:
    """Write `data` to `path`, which must not exist, and fsync it; returns its size and sha256.

    Large page-aligned data goes past the page cache where the file system can (O_DIRECT): no copy, and the state
    evicts nothing else from memory. The hash is computed while writing (hashlib releases the GIL).

    Args:
        path: the file; mode 0600.
        data: bytes, contiguous.
        halfway, before_sync: called when half is written, and before the fsync.

    Raises:
        OSError: the disk is full, read-only, or failing.
    """
    digest = hashlib.sha256()
    hasher = None
    if data.nbytes < SMALL_BYTES:
        digest.update(data)
    else:
        hasher = Thread(target=_hash, args=(digest, data), name="distkit-hash")
        hasher.start()
    try:
        with _opened(path, direct=data.nbytes >= SMALL_BYTES) as descriptor:
            middle = data.nbytes // 2 // 4096 * 4096 or data.nbytes // 2
            _write(descriptor, data[:middle])
            halfway()
            _write(descriptor, data[middle:])
            before_sync()
            os.fsync(descriptor)
    finally:
        if hasher is not None:
            hasher.join()
    return FileEntry(data.nbytes, digest.hexdigest())


def _hash(digest: hashlib._Hash, data: memoryview) -> None:
    for start in range(0, data.nbytes, CHUNK_BYTES):
        digest.update(data[start : start + CHUNK_BYTES])


@contextlib.contextmanager
def _opened(path: Path, *, direct: bool) -> Iterator[int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = -1
    if direct and hasattr(os, "O_DIRECT"):
        try:
            descriptor = os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some kernels create the file before they refuse
    if descriptor < 0:
        descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: memoryview) -> None:
    """All of `data`; what direct writes cannot take (an odd length or address) goes through the page cache."""
    while data.nbytes:
        part = data[:CHUNK_BYTES]
        if part.nbytes % 4096:
            _make_buffered(descriptor)
        try:
            data = data[os.write(descriptor, part) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _make_buffered(descriptor):
                raise


def _make_buffered(descriptor: int) -> bool:
    """Leave direct mode; False when the file was not in it."""
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not flags & direct:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
    return True
