"""What is packed: a folder of images or a torchvision set, as a plan that knows every size before it reads an image."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distkit.config import Split
from distkit.data.packed.format import Form, Header, lay_out
from distkit.data.sets.image_folder import (
    LAYOUT,
    SPLITS,
    Listing,
    check_same_classes,
    class_folders,
    decode_image,
    explained,
    list_split,
)
from distkit.data.sets.images import CIFAR10_MEAN, CIFAR10_STD
from distkit.data.sets.torchvision_sets import TORCHVISION_SETS, torchvision_set
from distkit.errors import ConfigError, DataError

PACK = "distkit data pack FOLDER OUT"
#: Largest side in pixels of the images that are stored raw unless the user asks for it.
SMALL = 64
#: Samples and bytes that a thread reads at a time.
BLOCK_SAMPLES, BLOCK_BYTES = 256, 1 << 20

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Plan:
    """One split to be packed.

    Args:
        header: with its sections laid out and their digests blank.
        tables: the sections that are known before an image is read.
        offsets: int64 [N + 1], where each sample begins in the images.
        read: the bytes of a sample; it raises DataError with the path.
    """

    header: Header
    tables: dict[str, NDArray[np.generic]]
    offsets: NDArray[np.int64]
    read: Callable[[int], bytes]


@dataclass(frozen=True)
class Request:
    """What was typed: a folder or the name of a set, and how to store it."""

    source: str
    root: Path
    splits: tuple[Split, ...] | None
    form: Literal["auto", "raw", "encoded"]
    check: bool
    num_workers: int
    chunk_bytes: int


def plans(request: Request, out: Path) -> Iterator[Plan]:
    """One plan a split, made when it is its turn.

    Raises:
        DataError: the folder or an image in it is not as it should be, or the set cannot be had.
        ConfigError: the options do not fit the source.
    """
    if request.source in TORCHVISION_SETS:
        if request.form == "encoded" or request.check:
            raise ConfigError(f"{request.source} has no image files", expected="--form raw, without --check",
                              fix=f"distkit data pack {request.source} {out}")  # fmt: skip
        for split in request.splits or SPLITS:
            yield _plan_set(request, split)
    else:
        folders = _split_folders(Path(request.source), request.splits, out)
        names = {split: class_folders(folder, PACK) for split, folder in folders.items()}
        check_same_classes(Path(request.source), names)
        for split, folder in folders.items():
            yield _plan_folder(request, split, list_split(folder, names[split], "pack 1"))


def _split_folders(root: Path, splits: tuple[Split, ...] | None, out: Path) -> dict[Split, Path]:
    if not root.is_dir():
        raise DataError(f"there is no folder {root}", expected=f"{LAYOUT}, or one of {', '.join(TORCHVISION_SETS)}",
                        fix=PACK)  # fmt: skip
    found: dict[Split, Path] = {split: root / split for split in SPLITS if (root / split).is_dir()}
    if found:
        missing = [split for split in splits or () if split not in found]
        if missing:
            raise DataError(
                f"there is no folder {root / missing[0]}", expected=LAYOUT, fix=f"--split {next(iter(found))}"
            )
        return {split: found[split] for split in splits or found}
    if len(splits or ()) > 1:
        raise DataError(
            f"{root} has neither train/ nor test/, so it is one split", expected=LAYOUT, fix="--split train"
        )
    if out.resolve().parent == root.resolve():
        raise ConfigError(f"{out} would be taken for a class of {root}", expected="a folder elsewhere",
                          fix=f"distkit data pack {root} {root}-packed")  # fmt: skip
    return {(splits or SPLITS)[0]: root}


def _plan_set(request: Request, split: Split) -> Plan:
    images = torchvision_set(request.source, request.root, split)
    pixels, labels = images.images.numpy(), images.labels.numpy()
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data)
    digest.update(np.ascontiguousarray(labels).data)
    header = Header(
        name=request.source,
        split=split,
        form="raw",
        sample_shape=pixels.shape[1:],
        num_samples=len(labels),
        class_names=images.class_names,
        mean=images.mean,
        std=images.std,
        source_sha256=digest.hexdigest(),
        chunk_bytes=request.chunk_bytes,
        sections={},
    )
    offsets = np.arange(len(labels) + 1) * pixels[0].size
    return _laid_out(header, {"labels": labels}, offsets, lambda index: pixels[index].tobytes())


def _plan_folder(request: Request, split: Split, listing: Listing) -> Plan:
    shape = _common_shape(request, listing)
    form: Form = "encoded" if shape is None else "raw"
    header = Header(
        name=(listing.folder.parent if listing.folder.name == split else listing.folder).resolve().name,
        split=split,
        form=form,
        sample_shape=shape,
        num_samples=len(listing.files),
        class_names=listing.class_names,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        source_sha256=listing.fingerprint,
        chunk_bytes=request.chunk_bytes,
        sections={},
    )
    paths = [os.fsencode(file) for file in listing.files]
    tables: dict[str, NDArray[np.generic]] = {
        "labels": np.array(listing.labels, np.int64),
        "path_offsets": _ends([len(path) for path in paths]),
        "paths": np.frombuffer(b"".join(paths), np.uint8),
    }
    if shape is None:
        offsets = _ends(listing.sizes)
        return _laid_out(header, {**tables, "offsets": offsets}, offsets, lambda i: _file(listing, i, request.check))
    offsets = np.arange(len(paths) + 1) * int(np.prod(shape))
    return _laid_out(header, tables, offsets, lambda index: _pixels(listing, index, shape))


def _laid_out(
    header: Header, tables: dict[str, NDArray[np.generic]], offsets: NDArray[np.int64], read: Callable[[int], bytes]
) -> Plan:
    tables = {name: table.astype(table.dtype.newbyteorder("<"), copy=False) for name, table in tables.items()}
    shapes = {name: (table.dtype.str, table.shape) for name, table in tables.items()}
    num_bytes = int(offsets[-1])
    if header.sample_shape is None:
        shapes["crc"] = ("<u4", (header.num_samples,))
    shapes["digests"] = ("|u1", (-(-num_bytes // header.chunk_bytes), 32))
    shape = (num_bytes,) if header.sample_shape is None else (header.num_samples, *header.sample_shape)
    return Plan(lay_out(header, {**shapes, "images": ("|u1", shape)}), tables, offsets, read)


def _ends(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Where each of these ends, and 0 before: int64 [len(sizes) + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _common_shape(request: Request, listing: Listing) -> tuple[int, int, int] | None:
    """[3, H, W] of the images if they are to be stored raw."""
    if request.form == "encoded":
        return None
    width, height = _size(listing.folder / listing.files[0])
    if request.form == "auto":
        if max(width, height) > SMALL:
            return None
        blocks = (listing.files[i : i + BLOCK_SAMPLES] for i in range(0, len(listing.files), BLOCK_SAMPLES))
        with contextlib.closing(in_order(lambda block: {_size(listing.folder / file) for file in block}, blocks,
                                         request.num_workers)) as found:  # fmt: skip
            if any(sizes != {(width, height)} for sizes in found):
                return None
    return 3, height, width


def _size(path: Path) -> tuple[int, int]:
    with explained(str(path), f"rm {path}"), Image.open(path) as image:
        return image.size


def _file(listing: Listing, index: int, check: bool) -> bytes:
    """An image file as it is, known to begin like an image, or decoded to be sure."""
    path = listing.folder / listing.files[index]
    with explained(str(path), f"rm {path}"):
        data = path.read_bytes()
    if len(data) != listing.sizes[index]:
        raise DataError(f"the image {path} changed while it was packed", expected=f"{listing.sizes[index]} bytes",
                        got=f"{len(data)} bytes", fix="the same command again")  # fmt: skip
    if check:
        decode_image(io.BytesIO(data), str(path), f"rm {path}")
    else:
        with explained(str(path), f"rm {path}"):
            Image.open(io.BytesIO(data)).close()
    return data


def _pixels(listing: Listing, index: int, shape: tuple[int, int, int]) -> bytes:
    path = listing.folder / listing.files[index]
    pixels = decode_image(path, str(path), f"rm {path}")
    if pixels.shape[:2] != shape[1:]:
        raise DataError(
            f"the image {path} has another size",
            expected=f"{shape[1]}x{shape[2]} pixels, as {listing.folder / listing.files[0]}",
            got=f"{pixels.shape[0]}x{pixels.shape[1]} pixels",
            fix="--form encoded",
        )
    return pixels.transpose(2, 0, 1).tobytes()


def blocks(offsets: NDArray[np.int64], first: int) -> Iterator[range]:
    """Ranges of samples from `first` on, a thread's work each."""
    num_samples = len(offsets) - 1
    while first < num_samples:
        full = int(np.searchsorted(offsets, offsets[first] + BLOCK_BYTES))
        stop = min(max(full, first + 1), first + BLOCK_SAMPLES, num_samples)
        yield range(first, stop)
        first = stop


def in_order(function: Callable[[A], B], items: Iterable[A], num_workers: int) -> Generator[B, None, None]:
    """`map(function, items)` by threads that work a little ahead; close it to stop them."""
    pool = ThreadPoolExecutor(num_workers)
    pending: deque[Future[B]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
