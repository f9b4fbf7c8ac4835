"""Writes a packed file so that a kill at any instant costs at most the chunk in hand, and two writers never mix.

The file grows under a hidden name, locked by its writer. It begins with the digest of its plan; each chunk of images
is followed by its checksum in the table. Who finds such a file with the same plan keeps the chunks whose checksum is
right and goes on behind them. The name of the data set appears by a rename, when everything is on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from distkit.data.packed.format import DIGESTS, PARTIAL_MAGIC, PREFIX_BYTES, START, prefix
from distkit.data.packed.read import PackedFile
from distkit.data.packed.sources import Plan, blocks, in_order
from distkit.errors import DataError

Advance = Callable[[int], None]
#: Tries to lock a file that another process has, before it is said and waited for.
NAPS, NAP_SECONDS = 6, 0.05


def write_pack(path: Path, plan: Plan, *, num_workers: int, overwrite: bool, report: Callable[[str], None],
               progress: Callable[[str, int], contextlib.AbstractContextManager[Advance]]) -> bool:  # fmt: skip
    """Write `plan` to `path`; False where that has been done already.

    Args:
        path: the packed file; its folder exists.
        plan: what to write.
        num_workers: threads that read images.
        overwrite: write also where `path` holds the same or something else.
        report: told what is unusual, a line at a time.
        progress: shows a title and a number of bytes; its context is told how many are done.

    Raises:
        DataError: `path` holds something else, the folder cannot be written, or an image cannot be read.
    """
    before = _identity(path)
    if not overwrite and _is_done(path, plan):
        return False
    partial = path.with_name(f".{path.name}.partial")
    with _explained(path, partial, plan):
        handle = _claim(partial, report)
    try:
        if _identity(path) != before and _is_done(path, plan):
            return False
        writer = PackWriter(handle, plan)
        with _explained(path, partial, plan):
            _check_space(path, handle, plan)
            done = writer.resume()
        if done:
            report(f"{path}: going on at {done / plan.offsets[-1]:.1%} of an interrupted run")
        with progress(str(path), int(plan.offsets[-1])) as advance, _explained(path, partial, plan):
            writer.write_images(done, num_workers, advance)
            writer.finish()
            partial.replace(path)
            _sync_folder(path.parent)
        return True
    finally:
        if not os.fstat(handle).st_size:
            partial.unlink(missing_ok=True)
        os.close(handle)


class PackWriter:
    """The unfinished file behind a locked, open `handle`."""

    def __init__(self, handle: int, plan: Plan) -> None:
        self._handle = handle
        self._plan = plan
        header = plan.header
        self._images = header.sections["images"].offset
        self._digests = np.zeros(header.sections["digests"].shape, np.uint8)
        self._crc = np.zeros(header.num_samples, np.uint32)

    def resume(self) -> int:
        """Make the file one of this plan; bytes of images that are there already, whole chunks, all of them checked."""
        header, start = self._plan.header, os.pread(self._handle, PREFIX_BYTES, 0)
        fresh = len(start) < PREFIX_BYTES or DIGESTS.unpack_from(start, START.size)[1] != header.plan_digest()
        if fresh:
            os.ftruncate(self._handle, 0)
        self._write(0, prefix(header, holder=_myself()))
        for name, table in self._plan.tables.items():
            self._write(header.sections[name].offset, table.tobytes())
        return 0 if fresh else self._checked_bytes()

    def write_images(self, done: int, num_workers: int, advance: Advance) -> None:
        """Write the images from byte `done` on, a multiple of the chunk size, or all of them."""
        plan, size = self._plan, self._plan.header.chunk_bytes
        first = int(np.searchsorted(plan.offsets, done, "right")) - 1
        self._read_crc(first)
        skip, chunk, buffer = done - int(plan.offsets[first]), done // size, bytearray()
        advance(done)

        def work(samples: range) -> list[bytes]:
            return [plan.read(index) for index in samples]

        with contextlib.closing(in_order(work, blocks(plan.offsets, first), num_workers)) as found:
            for block in found:
                for sample in block:
                    self._crc[first] = zlib.crc32(sample) if plan.header.form == "encoded" else 0
                    first += 1
                    buffer += sample[skip:] if skip else sample
                    skip = 0
                    while len(buffer) >= size:
                        self._write_chunk(chunk, buffer[:size])
                        del buffer[:size]
                        chunk += 1
                        advance(chunk * size)
        if buffer:
            self._write_chunk(chunk, buffer)
        advance(int(plan.offsets[-1]))

    def finish(self) -> None:
        """Write the checksums and the header, and wait until all is on the disk."""
        tables = {**self._plan.tables, "digests": self._digests}
        if self._plan.header.form == "encoded":
            tables["crc"] = self._crc.astype("<u4", copy=False)
            self._write(self._plan.header.sections["crc"].offset, tables["crc"].tobytes())
        sections = dict(self._plan.header.sections)
        for name, table in tables.items():
            sections[name] = dataclasses.replace(sections[name], sha256=hashlib.sha256(table.tobytes()).hexdigest())
        header = dataclasses.replace(self._plan.header, sections=sections)
        os.ftruncate(self._handle, header.file_bytes)
        self._write(0, prefix(header) + header.to_json())
        os.fsync(self._handle)

    def _checked_bytes(self) -> int:
        header = self._plan.header
        size, end = header.chunk_bytes, header.sections["images"].num_bytes
        known = os.pread(self._handle, self._digests.size, header.sections["digests"].offset)
        for chunk in range(header.num_chunks):
            start, stop = chunk * size, min((chunk + 1) * size, end)
            digest = hashlib.sha256(self._read(start, stop)).digest()
            if digest != known[32 * chunk : 32 * chunk + 32]:
                return start
            self._digests[chunk] = np.frombuffer(digest, np.uint8)
        return end

    def _read_crc(self, stop: int) -> None:
        """The CRC of the samples before `stop`, from the bytes that are there."""
        if self._plan.header.form == "encoded":
            for index in range(stop):
                start, end = self._plan.offsets[index : index + 2].tolist()
                self._crc[index] = zlib.crc32(self._read(start, end))

    def _write_chunk(self, chunk: int, data: bytearray) -> None:
        self._write(self._images + chunk * self._plan.header.chunk_bytes, data)
        digest = hashlib.sha256(data).digest()
        self._digests[chunk] = np.frombuffer(digest, np.uint8)
        self._write(self._plan.header.sections["digests"].offset + 32 * chunk, digest)

    def _read(self, start: int, stop: int) -> bytes:
        return os.pread(self._handle, stop - start, self._images + start)

    def _write(self, offset: int, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._handle, view, offset)
            view, offset = view[written:], offset + written


def _claim(partial: Path, report: Callable[[str], None]) -> int:
    """Open and lock the unfinished file; wait while another process has it. The lock ends with its process."""
    naps = 0
    while True:
        # a link here would let the pack overwrite what it points to
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                naps += 1
                if naps < NAPS:
                    # A process that has just started to write has not yet put its name into the file.
                    time.sleep(NAP_SECONDS)
                    os.close(handle)
                    continue
                if naps == NAPS:
                    report(f"waiting for {_holder(handle)}, which writes {partial}")
                fcntl.flock(handle, fcntl.LOCK_EX)
            # Whoever had the lock may have renamed or removed the file in the meantime.
            if _identity(partial) == (os.fstat(handle).st_dev, os.fstat(handle).st_ino):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _holder(handle: int) -> str:
    start = os.pread(handle, PREFIX_BYTES, 0)
    if len(start) < PREFIX_BYTES or not start.startswith(PARTIAL_MAGIC):
        return "another process"
    name: bytes = DIGESTS.unpack_from(start, START.size)[2]
    return name.rstrip(b"\0").decode(errors="replace")


def _myself() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _is_done(path: Path, plan: Plan) -> bool:
    """Whether `path` holds what `plan` would write; DataError where it holds something else."""
    if not path.exists():
        return False
    try:
        got = PackedFile(path).header
    except DataError as error:
        raise DataError(f"{path} exists and is no whole packed file", expected="no file, or the same data set",
                        got=error, fix="--overwrite") from error  # fmt: skip
    if got.plan_digest() != plan.header.plan_digest():
        raise DataError(
            f"{path} exists and holds something else",
            expected=f"no file, or the same {plan.header.num_samples:,} images of {plan.header.name}, unchanged",
            got=f"{got.num_samples:,} images of {got.name}, {got.form}",
            fix="--overwrite",
        )
    return True


def _check_space(path: Path, handle: int, plan: Plan) -> None:
    status, free = os.fstat(handle), shutil.disk_usage(path.parent).free
    missing = plan.header.file_bytes - 512 * status.st_blocks
    if missing > free:
        raise OSError(f"the disk has {free:,} bytes free, {missing:,} are to be written")


@contextlib.contextmanager
def _explained(path: Path, partial: Path, plan: Plan) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written",
            expected=f"a folder that can be written, with {plan.header.file_bytes:,} bytes of space and file locks",
            got=error,
            fix=f"the same command when there is space: it goes on where it stopped. To give up: rm {partial}",
        ) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
