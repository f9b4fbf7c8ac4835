"""One decoded copy of a data set in one safetensors file: written atomically, checked when read, memory mapped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distkit.errors import DataError

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against the other processes of this machine; the lock ends with the process and leaves no file.

    Where the file system has no locks the work goes on without: writers still rename, they only do the work twice.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            logger.warning("%s cannot be locked; processes that start together may do the same work", folder)
        yield
    finally:
        os.close(handle)


def read_cache(path: Path, fingerprint: str) -> tuple[Tensors, dict[str, str]] | None:
    """The tensors (memory mapped) and the metadata of a cache file.

    None where there is no file, where it is a copy of something else than `fingerprint`, or where it is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return None
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be read and is made again: %s", path, error)
        return None
    if metadata.get("digest") != _digest(tensors):
        logger.warning("%s is damaged and is made again", path)
        return None
    return tensors, metadata


class CacheWriter:
    """A place for a cache file, taken before the work starts, so that a folder that cannot be written fails early.

    Use as a context manager, with the folder `locked`; without `commit` nothing is left behind.

    Raises:
        DataError: the folder cannot be written; the message names --data.cache-dir.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")

    def __enter__(self) -> CacheWriter:
        with self._explained():
            self._temporary.touch(exist_ok=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.unlink(missing_ok=True)

    def commit(self, tensors: Tensors, metadata: dict[str, str], fingerprint: str) -> None:
        """Write everything to disk, then give it its name."""
        metadata = {**metadata, "fingerprint": fingerprint, "digest": _digest(tensors)}
        with self._explained():
            # safetensors writes files that only their owner can read; data are for everyone the folder is for.
            mode = self._temporary.stat().st_mode
            save_file(tensors, self._temporary, metadata)
            self._temporary.chmod(mode)
            _sync(self._temporary)
            self._temporary.replace(self.path)
            _sync(self.path.parent)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"the decoded copy of the images cannot be written to {self.path.parent}",
                expected="a folder that can be written, with enough space",
                got=error,
                fix="--data.cache-dir DIR",
            ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(tensors: Tensors) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.numpy().data)
    return total.hexdigest()
