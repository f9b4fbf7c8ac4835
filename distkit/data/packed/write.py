"""Writes a packed split so that a kill costs at most the shard in hand, and two writers never mix.

A shard appears under its name when it is complete, the index when all shards are. A shard that is there and has the
bytes of the plan is kept, so that an interrupted run continues with the first one that is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from distkit.data.packed.format import INDEX, Index, read_index
from distkit.data.packed.plan import Plan
from distkit.data.packed.read import PackedSplit
from distkit.data.sets.decode import in_order
from distkit.errors import DataError, printable
from distkit.files import atomic_file, locked, remove_temporaries, write_json

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]
#: Shows a title and a number of bytes; its context is called with the number of bytes done.
Progress = Callable[[str, int], contextlib.AbstractContextManager[Advance]]


@contextlib.contextmanager
def no_progress(_title: str, _total: int) -> Iterator[Advance]:
    """Shows nothing."""
    yield lambda _: None


def write_packed(
    folder: Path,
    plan: Plan,
    *,
    num_workers: int,
    overwrite: bool = False,
    report: Callable[[str], None] = logger.info,
    progress: Progress = no_progress,
) -> bool:
    """Write `plan` to `folder`; False where that has been done already.

    Args:
        folder: the packed split, made when missing; the folder around it exists.
        plan: what to write.
        num_workers: threads that read images.
        overwrite: replace whatever else is there, damaged shards too.
        report: called with anything unusual, a line at a time.
        progress: shows the bytes that are written.

    Raises:
        DataError: `folder` holds something else, or an image cannot be read.
        OSError: the folder cannot be written, or the disk is full.
    """
    if _is_done(folder, plan, overwrite):
        return False
    lock = folder.with_name(f".{folder.name.lstrip('.')}.lock")
    with locked(lock, lambda: report(f"waiting for another process, which is writing {folder}")) as exclusive:
        if _is_done(folder, plan, overwrite):
            return False
        folder.mkdir(exist_ok=True)
        try:
            if exclusive:
                remove_temporaries(folder)
            _write(folder, plan, num_workers, overwrite, report, progress)
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing was written
    return True


def _is_done(folder: Path, plan: Plan, overwrite: bool) -> bool:
    """Whether `folder` holds what `plan` would write; DataError where it holds something else and may not be replaced.

    What is to be overwritten is done only if every byte is right.
    """
    if not (folder / INDEX).exists():
        return False
    try:
        index = read_index(folder)[0]
        same = index.plan_digest() == plan.index.plan_digest()
        if overwrite:
            damage = list(PackedSplit(folder).damage()) if same else ["it holds something else"]
            if damage:
                logger.warning("%s is rewritten: %s", printable(str(folder)), printable(damage[0]))
            return not damage
        PackedSplit(folder)
    except DataError as error:
        if overwrite:
            logger.warning("%s is rewritten: %s", printable(str(folder)), error)
            return False
        raise DataError(
            f"{folder} exists and is damaged", expected="no folder, or the same data set", got=error, fix="--overwrite"
        ) from error
    if not same:
        raise DataError(
            f"{folder} exists and holds something else",
            expected=f"no folder, or the same {_words(plan.index)}, unchanged",
            got=_words(index),
            fix="--overwrite",
        )
    return True


def _words(index: Index) -> str:
    how = f"{index.form}, {index.color} on {index.background}, format {index.version}"
    return f"{index.num_samples:,} images of {index.name}, {how}"


def _write(
    folder: Path, plan: Plan, num_workers: int, overwrite: bool, report: Callable[[str], None], progress: Progress
) -> None:
    shards, digest = plan.index.shards, plan.index.plan_digest()
    (folder / INDEX).unlink(missing_ok=True)
    sha256 = _finished(folder, plan, digest, overwrite)
    done = sum(shards[number].num_bytes for number in sha256)
    missing, free = plan.index.num_bytes - done, shutil.disk_usage(folder).free
    if missing > free:
        raise OSError(f"the disk has {free:,} bytes free, but {missing:,} must be written")
    if sha256:
        report(f"{folder}: {len(sha256)} of {len(shards)} files are complete already; continuing with the others")
    with progress(str(folder), plan.index.num_bytes) as advance:
        for number in sorted(set(range(len(shards))) - set(sha256)):
            sha256[number] = _write_shard(folder, plan, number, digest, num_workers, advance)
    entries = tuple(dataclasses.replace(shard, sha256=sha256[number]) for number, shard in enumerate(shards))
    notes = plan.oddities.notes(plan.index.background)
    write_json(folder / INDEX, dataclasses.replace(plan.index, shards=entries, notes=notes).to_json())


def _finished(folder: Path, plan: Plan, digest: str, overwrite: bool) -> dict[int, str]:
    """Number and sha256 of the shards that are complete. Damaged ones are removed, those of another plan refused."""
    numbers = {shard.file: number for number, shard in enumerate(plan.index.shards)}
    sha256 = {}
    for path in sorted(folder.glob("images-*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                other = (file.metadata() or {}).get("plan") != digest
        except (OSError, SafetensorError):
            other = False
            logger.warning("%s is damaged and is rewritten", printable(str(path)))
        if other and not overwrite:
            raise DataError(
                f"{folder} holds the files of another, unfinished pack",
                expected="no folder, or files of the same images, unchanged, packed with the same options",
                got=path.name,
                fix="--overwrite",
            )
        whole = None if other or path.name not in numbers else _sha256_if_whole(path, plan, numbers[path.name], digest)
        if whole is None:
            path.unlink()
        else:
            sha256[numbers[path.name]] = whole
    return sha256


def _sha256_if_whole(path: Path, plan: Plan, number: int, digest: str) -> str | None:
    """sha256 of a shard, or None unless every byte is what the plan says, or fits its checksum."""
    head, samples = plan.head(number, digest), plan.samples(number)
    total, crc = hashlib.sha256(head), []
    with path.open("rb") as file:
        if path.stat().st_size != plan.index.shards[number].num_bytes or file.read(len(head)) != head:
            return None
        for index in samples:
            sample = file.read(int(plan.offsets[index + 1] - plan.offsets[index]))
            total.update(sample)
            crc.append(zlib.crc32(sample))
        rest = file.read()
    total.update(rest)
    return total.hexdigest() if rest == np.array(crc, "<u4").tobytes() else None


def _write_shard(folder: Path, plan: Plan, number: int, digest: str, num_workers: int, advance: Advance) -> str:
    """Write one shard and return its sha256."""
    total, crc = hashlib.sha256(), []

    def work(samples: range) -> list[bytes]:
        return [plan.read(index) for index in samples]

    with atomic_file(folder / plan.index.shards[number].file) as file:

        def write(data: bytes) -> None:
            total.update(data)
            file.write(data)

        write(plan.head(number, digest))
        with contextlib.closing(in_order(work, plan.blocks(number), num_workers)) as blocks:
            for block in blocks:
                crc += [zlib.crc32(sample) for sample in block]
                write(b"".join(block))
                advance(sum(map(len, block)))
        write(np.array(crc, "<u4").tobytes())
    return total.hexdigest()
