"""Whether a checkpoint on disk is, to the bit, what was written; nothing in it is trusted before that.

Read here are the manifest, the sizes, the sha256 of each file, the headers of the shards (safetensors: 8 bytes of
little-endian length, JSON that names each tensor's dtype, shape and place, then the tensors without gaps), and, by
`open_checkpoint`, state.json.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar, cast

from distkit.checkpoint.format import (
    DTYPES,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_STATE_BYTES,
    STATE,
    Manifest,
    Shard,
    parse_manifest,
    step_name,
)
from distkit.checkpoint.saved_state import check_state, parse_state
from distkit.errors import CheckpointError, printable
from distkit.files import open_regular
from distkit.json_files import JsonError, is_count, parse_object

#: What a thread reads and hashes at a time.
CHUNK_BYTES = 2**20
#: Larger headers are refused unread, as the safetensors library does.
MAX_HEADER_BYTES = 100_000_000
T = TypeVar("T")


class Listed(NamedTuple):
    """What the manifest says about one key of a file: whose shard it is, of which dtype (torch's name)."""

    tensor: str
    dtype: str
    shard: Shard


class _Place(NamedTuple):
    """What a header says about one key; `start` and `stop` are bytes of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


#: For each file of a checkpoint, by key, what should be in it.
Contents = Mapping[str, Mapping[str, Listed]]


def _damaged(directory: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{directory}: {printable(what)}")  # in one line


@dataclass(frozen=True)
class OpenFile:
    """A regular file of a checkpoint, open for reading."""

    directory: Path
    name: str
    raw: io.FileIO

    def damaged(self, what: str) -> NoReturn:
        """Raise the CheckpointError that names this file."""
        _damaged(self.directory, f"{self.name} {what}")

    def size(self) -> int:
        """Bytes of the file as it is now."""
        return os.fstat(self.raw.fileno()).st_size

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `start` on.

        Raises:
            CheckpointError: the file ends before.
        """
        self.raw.seek(start)
        while target.nbytes:
            count = self.raw.readinto(target)
            if not count:
                self.damaged(f"ends {target.nbytes} bytes too early")
            target = target[count:]


@contextlib.contextmanager
def open_file(directory: Path, name: str) -> Iterator[OpenFile]:
    """Open the regular file `name`; a symlink is not followed and a FIFO not waited for.

    Raises:
        CheckpointError: it is missing or not a regular file; or reading fails while it is open.
    """
    try:
        descriptor = open_regular(directory / name, os.O_RDONLY)
        try:
            with io.FileIO(descriptor, closefd=False) as raw:
                yield OpenFile(directory, name, raw)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        _damaged(directory, f"missing file {name}")
    except OSError as error:
        reason = "is a symlink" if error.errno == errno.ELOOP else error.strerror or str(error)
        _damaged(directory, f"{name} {reason if reason.startswith('is ') else f'cannot be read: {reason}'}")


def read_small(directory: Path, name: str, limit: int) -> bytes:
    """All of the file `name`.

    Raises:
        CheckpointError: it has more than `limit` bytes, or `open_file` refuses it.
    """
    with open_file(directory, name) as file:
        if file.size() > limit:
            file.damaged(f"has {file.size()} bytes, more than the {limit} that are read")
        data = bytearray(file.size())
        file.read_into(0, memoryview(data))
    return bytes(data)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the checkpoint in `directory`; of the other files nothing is read.

    Raises:
        CheckpointError: `directory` is not a real directory, the manifest is missing or not believable (see
            `parse_manifest`), or the name of the directory is that of another step.
    """
    link = os.path.islink(directory)
    if link or not os.path.isdir(directory):
        _damaged(directory, "is a symlink" if link else "is not a directory")
    data = read_small(directory, MANIFEST, MAX_MANIFEST_BYTES)
    try:
        manifest = parse_manifest(data)
    except CheckpointError as error:
        _damaged(directory, str(error))
    name = os.path.basename(os.path.abspath(directory))
    if name.startswith("step-") and name != step_name(manifest.step):
        _damaged(directory, f"{MANIFEST} is for step {manifest.step}: the directory was renamed")
    return manifest


def check_listing(directory: Path, manifest: Manifest) -> None:
    """Check that `directory` holds exactly the manifest's files, as regular files of the sizes it gives.

    Raises:
        CheckpointError: naming the first one, in the order of their names, that does not.
    """
    try:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(directory)}
    except OSError as error:
        _damaged(directory, f"the directory cannot be read: {error.strerror or error}")
    for name in sorted(found.keys() | manifest.files.keys() | {MANIFEST}):
        listed = manifest.files.get(name)
        if name not in found:
            _damaged(directory, f"missing file {name}")
        if listed is None and name != MANIFEST:
            _damaged(directory, f"unexpected file {name}")
        if not stat.S_ISREG(found[name].st_mode):
            link = stat.S_ISLNK(found[name].st_mode)
            _damaged(directory, f"{name} is " + ("a symlink" if link else "not a regular file"))
        if listed is not None and found[name].st_size != listed.bytes:
            _damaged(directory, f"{name} has {found[name].st_size} bytes, the manifest says {listed.bytes}")


def list_contents(directory: Path, manifest: Manifest) -> Contents:
    """What the manifest says about the inside of each file.

    Raises:
        CheckpointError: two shards have the same place.
    """
    contents: dict[str, dict[str, Listed]] = defaultdict(dict)
    for name, entry in manifest.tensors.items():
        for shard in entry.shards:
            other = contents[shard.file].setdefault(shard.key, Listed(name, entry.dtype, shard))
            if other.shard is not shard:
                both = f"of tensor {other.tensor} and of tensor {name}"
                _damaged(directory, f"{MANIFEST}: {shard.key} in {shard.file} is a shard {both}")
    return contents


def read_header(file: OpenFile, contents: Contents) -> dict[str, int]:
    """Read the header of a shard file and compare it with what the manifest says.

    Returns:
        For each key the byte of the file at which its tensor begins.

    Raises:
        CheckpointError: the header is broken, names other tensors, or does not fill the file without gaps.
    """
    begin, header = _read_header(file)
    places = _places(file, header)
    wanted = contents.get(file.name, {})
    for key, listed in wanted.items():
        if key not in places:
            file.damaged(f"does not hold {key}, a shard of tensor {listed.tensor}")
        place, dtype, shape = places[key], DTYPES[listed.dtype], listed.shard.shape
        if (place.dtype, place.shape) != (dtype[0], shape):
            needed = f"tensor {listed.tensor} needs {dtype[0]} {list(shape)}"
            file.damaged(f"holds {key} as {place.dtype} {list(place.shape)}, {needed}")
        if place.stop - place.start != math.prod(shape) * dtype[1]:
            file.damaged(f"gives {key} {place.stop - place.start} bytes, its shape {math.prod(shape) * dtype[1]}")
    end = 0
    for key, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
        if key not in wanted:
            file.damaged(f"holds {key}, which the manifest does not list")
        if place.start != end:
            file.damaged(f"has a gap or an overlap: {key} begins at byte {place.start} of the data, not {end}")
        end = place.stop
    if file.size() != begin + end:
        file.damaged(f"has {file.size()} bytes, its header says {begin + end}")
    return {key: begin + place.start for key, place in places.items()}


def _read_header(file: OpenFile) -> tuple[int, dict[str, object]]:
    """The byte at which the data begins, and the JSON before it."""
    size, prefix = file.size(), bytearray(8)
    if size < len(prefix):
        file.damaged("is too short for a safetensors file")
    file.read_into(0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > min(size - len(prefix), MAX_HEADER_BYTES):
        file.damaged(f"claims a header of {length} bytes in a file of {size}")
    text = bytearray(length)
    file.read_into(len(prefix), memoryview(text))
    try:
        return len(prefix) + length, parse_object(bytes(text))
    except JsonError as error:
        file.damaged(f"has a malformed header: {error}")


def _places(file: OpenFile, header: Mapping[str, object]) -> dict[str, _Place]:
    """What the header says about each key."""
    try:
        return {key: _place(value) for key, value in header.items() if key != "__metadata__"}
    except (TypeError, KeyError) as error:
        file.damaged(f"has a malformed header: {type(error).__name__} {error}")


def step_of_weights(file: Path) -> int:
    """The step whose weights `file`, a weights.safetensors of a run, holds.

    Raises:
        CheckpointError: it does not say so, or cannot be read.
    """
    with open_file(file.parent, file.name) as opened:
        metadata = _read_header(opened)[1].get("__metadata__")
        step = metadata.get("step") if isinstance(metadata, dict) else None
        if not (isinstance(step, str) and step.isascii() and step.isdecimal() and len(step) < 19):
            opened.damaged("does not say of which step it is")
        return int(step)


def _place(value: object) -> _Place:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.100}")
    dtype, shape, span = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(span, list) and len(span) == 2):
        raise TypeError(f"{value!r:.100}")
    if not all(map(is_count, (*shape, *span))):
        raise TypeError(f"{value!r:.100}")
    return _Place(dtype, tuple(shape), *span)


def check_file(directory: Path, manifest: Manifest, name: str) -> None:
    """The file `name` has the sha256 that the manifest names, and a shard holds exactly the tensors listed for it.

    Raises:
        CheckpointError: it does not, or the manifest does not list it.
    """
    _check_file(directory, manifest, list_contents(directory, manifest), name, memoryview(bytearray(CHUNK_BYTES)))


def _check_file(directory: Path, manifest: Manifest, contents: Contents, name: str, buffer: memoryview) -> None:
    if name not in manifest.files:
        _damaged(directory, f"{MANIFEST} does not list {name}")
    with open_file(directory, name) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.raw.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        digest = hashlib.sha256()
        while count := file.raw.readinto(buffer):
            digest.update(buffer[:count])
        if digest.hexdigest() != manifest.files[name].sha256:
            file.damaged("does not match its sha256 in the manifest: its bytes were changed")
        if name != STATE:
            read_header(file, contents)


def verify(directory: Path, files: Sequence[str] | None = None, threads: int = 2) -> Manifest:
    """Check everything: the manifest, the listing, and the bytes of each file.

    Args:
        directory: the checkpoint.
        files: the ones to hash and look into, by default all; ranks divide the work by it.
        threads: files that are hashed at once.

    Raises:
        CheckpointError: `DIRECTORY: what is wrong with which file or tensor`, one line.
    """
    manifest = read_manifest(directory)
    _verify(directory, manifest, sorted(manifest.files if files is None else files), threads)
    return manifest


def _verify(directory: Path, manifest: Manifest, files: Sequence[str], threads: int) -> None:
    check_listing(directory, manifest)
    contents = list_contents(directory, manifest)

    def check(names: Iterable[str]) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for name in names:
            _check_file(directory, manifest, contents, name, buffer)

    in_threads(check, files, threads)


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint that was verified: every byte of it has the sha256 that its manifest names, and a run can go on."""

    directory: Path
    manifest: Manifest
    state: Mapping[str, object]

    def parts(self) -> Mapping[str, Mapping[str, object]]:
        """The named parts of state.json."""
        return cast(Mapping[str, Mapping[str, object]], self.state["parts"])


def open_checkpoint(directory: Path, rank: int = 0, world_size: int = 1, threads: int = 2) -> VerifiedCheckpoint:
    """Verify `directory`, this rank its share of the files, and read what a run goes on from.

    Raises:
        CheckpointError: as `verify`; or state.json is not what a run has saved.
    """
    manifest = read_manifest(directory)
    _verify(directory, manifest, sorted(manifest.files)[rank::world_size], threads)
    state = read_state(directory)
    try:
        check_state(state, manifest)
    except JsonError as error:
        _damaged(directory, error.of(STATE))
    return VerifiedCheckpoint(directory, manifest, state)


def read_state(directory: Path) -> dict[str, object]:
    """The object in state.json, in which any name may hold any value: see `open_checkpoint`.

    Raises:
        CheckpointError: missing, larger than MAX_STATE_BYTES, or not a JSON object.
    """
    data = read_small(directory, STATE, MAX_STATE_BYTES)
    try:
        return parse_state(data)
    except JsonError as error:
        _damaged(directory, error.of(STATE))


def in_threads(work: Callable[[Iterable[T]], None], items: Sequence[T], threads: int) -> None:
    """Call `work` in up to `threads` threads that share out `items` as they go; the first exception ends them all."""
    waiting = iter(items)
    threads = min(threads, len(items))
    if threads <= 1:
        work(waiting)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            for ended in as_completed([pool.submit(work, waiting) for _ in range(threads)]):
                ended.result()
        except BaseException:
            list(waiting)  # the other threads find nothing left to do
            raise
