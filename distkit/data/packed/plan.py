"""What is packed: a folder of images or a torchvision set, as a plan that knows every size before it reads an image."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from distkit.config import Color, Split
from distkit.data.packed.format import BLANK, Index, ShardEntry, shard_name
from distkit.data.sets.decode import (
    GREY_MODES,
    Mode,
    Oddities,
    check_depth,
    decode,
    has_frames,
    head,
    in_order,
    is_transparent,
    opened,
    planes,
    shape_words,
)
from distkit.data.sets.image_folder import Listing
from distkit.data.sets.images import ImageDataset, default_normalization
from distkit.errors import DataError

SHARD_BYTES = 1 << 30
#: What is grey of itself; images of 16 bits are, too, and are refused later.
GREY = (*GREY_MODES, "I;16", "I;16B", "I;16L", "I", "F")
#: Largest side in pixels of the images that are stored raw unless the user asks for it.
SMALL = 64
#: Samples and bytes that a thread reads at a time.
BLOCK_SAMPLES, BLOCK_BYTES = 256, 1 << 20


@dataclass(frozen=True)
class Plan:
    """One split to be packed.

    Args:
        index: complete but for the checksums of the shards.
        labels: int64 [N].
        paths: the path of each sample below the split's folder; None: the samples had no files.
        offsets: int64 [N + 1], bytes of all samples before each one, and of all.
        starts: the first sample of every shard, and N.
        read: the bytes of a sample; it raises DataError with the path.
        oddities: what `read` found unusual.
    """

    index: Index
    labels: NDArray[np.int64]
    paths: Sequence[bytes] | None
    offsets: NDArray[np.int64]
    starts: tuple[int, ...]
    read: Callable[[int], bytes]
    oddities: Oddities

    def samples(self, shard: int) -> range:
        """The samples of a shard."""
        return range(self.starts[shard], self.starts[shard + 1])

    def head(self, shard: int, plan_digest: str) -> bytes:
        """Everything in a shard's file before its images."""
        samples = self.samples(shard)
        offsets = self.offsets[samples.start : samples.stop + 1] - self.offsets[samples.start]
        tables: dict[str, NDArray[np.generic]] = {"labels": self.labels[samples.start : samples.stop]}
        if self.paths is not None:
            paths = self.paths[samples.start : samples.stop]
            tables["path_offsets"] = _offsets([len(path) for path in paths])
        if self.index.form == "encoded":
            tables["offsets"] = offsets
        if self.paths is not None:
            tables["paths"] = np.frombuffer(b"".join(paths), np.uint8)
        images = (len(samples), *self.index.sample_shape) if self.index.sample_shape else (int(offsets[-1]),)
        types = {"int64": "I64", "uint8": "U8"}
        entries = [(name, types[table.dtype.name], table.shape, table.nbytes) for name, table in tables.items()]
        entries += [("images", "U8", images, int(offsets[-1])), ("crc", "U8", (len(samples), 4), 4 * len(samples))]
        header: dict[str, object] = {"__metadata__": {"plan": plan_digest}}
        end = 0
        for name, dtype, shape, num_bytes in entries:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + num_bytes)}
            end += num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        arrays = (table.astype(table.dtype.newbyteorder("<"), copy=False) for table in tables.values())
        return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays)

    def blocks(self, shard: int) -> Iterator[range]:
        """The samples of a shard in ranges, a thread's work each."""
        samples = self.samples(shard)
        first = samples.start
        while first < samples.stop:
            full = int(np.searchsorted(self.offsets, self.offsets[first] + BLOCK_BYTES))
            stop = min(max(full, first + 1), first + BLOCK_SAMPLES, samples.stop)
            yield range(first, stop)
            first = stop


def plan_set(name: str, split: Split, images: ImageDataset, *, shard_bytes: int = SHARD_BYTES) -> Plan:
    """The plan of a split that is in memory.

    Args:
        name: of the set, for people.
        split: which split it is.
        images: resident, on the CPU.
        shard_bytes: bytes of images in a file, >= 1; a larger image has a file of its own.
    """
    pixels, labels = images.images.narrow(0, 0, len(images)).contiguous().numpy(), images.labels.numpy()
    digest = hashlib.sha256(pixels.data)
    digest.update(np.ascontiguousarray(labels).data)
    return _plan(
        name=name,
        split=split,
        shape=pixels.shape[1:],
        class_names=images.class_names,
        mean=images.mean,
        std=images.std,
        source_sha256=digest.hexdigest(),
        labels=labels,
        sizes=[pixels[0].size] * len(labels),
        read=lambda index: pixels[index].tobytes(),
        shard_bytes=shard_bytes,
    )


def plan_folder(
    listing: Listing,
    split: Split,
    shape: tuple[int, int, int] | None,
    *,
    channels: int = 3,
    color: Color = "rgb",
    background: str = "white",
    expected: str | None = None,
    fix: str | None = "--form encoded",
    check: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """The plan of a folder of images.

    Args:
        listing: its files.
        split: which split it is.
        shape: [C, H, W] of every image, stored raw; None: the files are stored as they are.
        channels: C, 1 or 3, also of those that are stored as they are, once they are decoded.
        color: what was asked for; see `channels_of`.
        background: what transparent pixels are laid on.
        expected: what to say of an image of another size was expected; None: the size, and the first image.
        fix: what to type against an image of another size.
        check: decode each file that is stored as it is.
        shard_bytes: as `plan_set`.
    """
    oddities = Oddities()
    mode: Mode = "L" if channels == 1 else "RGB"
    words = expected or (shape and f"{shape_words(shape[1:])}, as {listing.folder / listing.files[0]}")

    def pixels(index: int) -> bytes:
        path = listing.folder / listing.files[index]
        decoded = decode(path, mode, background, oddities=oddities)
        if shape is not None and decoded.shape[:2] != shape[1:]:
            what = f"the image {path} differs in size"
            raise DataError(what, expected=words, got=shape_words(decoded.shape), fix=fix)
        return planes(decoded).tobytes()

    mean, std = default_normalization(channels)
    return _plan(
        name=(listing.folder.parent if listing.folder.name == split else listing.folder).resolve().name,
        split=split,
        shape=shape,
        class_names=listing.class_names,
        mean=mean,
        std=std,
        source_sha256=listing.sha256,
        labels=np.array(listing.labels, np.int64),
        paths=[os.fsencode(file) for file in listing.files],
        sizes=listing.sizes if shape is None else [int(np.prod(shape))] * len(listing.files),
        read=pixels if shape else lambda index: _file(listing, index, check, oddities),
        shard_bytes=shard_bytes,
        color=color,
        channels=channels,
        background=background,
        oddities=oddities,
    )


def channels_of(listing: Listing, color: Color, num_workers: int) -> int:
    """1 or 3: what `color` says, and for auto 1 where every image is grey. Reads files until one is not."""
    if color != "auto":
        return 1 if color == "grey" else 3

    def all_grey(block: Sequence[str]) -> bool:
        return all(head(listing.folder / file)[0] in GREY for file in block)

    if not all_grey(listing.files[:1]):
        return 3
    with contextlib.closing(in_order(all_grey, _file_blocks(listing), num_workers)) as blocks:
        return 1 if all(blocks) else 3


def _file_blocks(listing: Listing) -> Iterator[Sequence[str]]:
    return (listing.files[i : i + BLOCK_SAMPLES] for i in range(0, len(listing.files), BLOCK_SAMPLES))


def common_shape(
    listing: Listing, form: Literal["auto", "raw", "encoded"], num_workers: int, channels: int = 3
) -> tuple[int, int, int] | None:
    """[C, H, W] of a folder's images if they are to be stored raw: if `form` says so, or all have one small size."""
    if form == "encoded":
        return None
    height, width = head(listing.folder / listing.files[0])[1]
    if form == "auto":
        if max(height, width) > SMALL:
            return None
        sizes_of = in_order(
            lambda block: {head(listing.folder / file)[1] for file in block}, _file_blocks(listing), num_workers
        )
        with contextlib.closing(sizes_of):
            if any(sizes != {(height, width)} for sizes in sizes_of):
                return None
    return channels, height, width


def _plan(
    *,
    name: str,
    split: Split,
    shape: tuple[int, ...] | None,
    class_names: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    source_sha256: str,
    labels: NDArray[np.int64],
    sizes: Sequence[int],
    read: Callable[[int], bytes],
    shard_bytes: int,
    paths: Sequence[bytes] | None = None,
    color: Color = "rgb",
    channels: int = 3,
    background: str = "white",
    oddities: Oddities | None = None,
) -> Plan:
    offsets = _offsets(sizes)
    starts = [0]
    while starts[-1] < len(sizes):
        full = int(np.searchsorted(offsets, offsets[starts[-1]] + shard_bytes, "right")) - 1
        starts.append(max(full, starts[-1] + 1))
    index = Index(
        name=name,
        split=split,
        form="raw" if shape else "encoded",
        sample_shape=shape,
        num_samples=len(sizes),
        class_names=class_names,
        mean=mean,
        std=std,
        source_sha256=source_sha256,
        labels_sha256=hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(),
        shards=(),
        color=color,
        channels=shape[0] if shape else channels,
        background=background,
    )
    plan = Plan(index, labels, paths, offsets, tuple(starts), read, oddities or Oddities())
    shards = []
    for number, (first, stop) in enumerate(itertools.pairwise(starts)):
        size = len(plan.head(number, BLANK)) + int(offsets[stop] - offsets[first]) + 4 * (stop - first)
        shards.append(ShardEntry(shard_name(number, len(starts) - 1), stop - first, size))
    return dataclasses.replace(plan, index=dataclasses.replace(index, shards=tuple(shards)))


def _offsets(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Where each of these ends, and 0 before: int64 [len(sizes) + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _file(listing: Listing, index: int, check: bool, oddities: Oddities) -> bytes:
    """An image file as it is, known to begin like an image, or decoded to be sure."""
    path = listing.folder / listing.files[index]
    try:
        data = path.read_bytes()
    except OSError as error:
        denied = isinstance(error, PermissionError)
        fix = f"{'chmod u+r' if denied else 'rm'} {shlex.quote(str(path))}"
        raise DataError(f"the image {path} cannot be read", got=error, fix=fix) from error
    if len(data) != listing.sizes[index]:
        raise DataError(
            f"the image {path} changed while it was packed",
            expected=f"{listing.sizes[index]} bytes",
            got=f"{len(data)} bytes",
            fix="the same command again",
        )
    fix = f"rm {shlex.quote(str(path))}"
    if check:
        decode(io.BytesIO(data), name=str(path), fix=fix, oddities=oddities)
        return data
    with opened(io.BytesIO(data), str(path), fix) as image:
        check_depth(image, path)
        if has_frames(image):
            oddities.add("frames", str(path))
        if is_transparent(image):
            oddities.add("alpha", str(path))
    return data
