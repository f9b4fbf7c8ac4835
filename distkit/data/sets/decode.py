"""Image files decoded to pixels, on many threads, with every fault named."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distkit.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
#: Pillow's modes that fit into 8 bits a channel; 16-bit grey would silently turn white.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")

A = TypeVar("A")
B = TypeVar("B")


@contextlib.contextmanager
def opened(source: Path | BinaryIO, name: str | None = None, fix: str | None = None) -> Iterator[Image.Image]:
    """The image in `source`; what Pillow raises, also while it is decoded, becomes a DataError.

    Args:
        source: the file, or its bytes.
        name: what to call it in a message; None: its path.
        fix: what to type against a damaged one; None: to delete it.
    """
    try:
        with Image.open(source) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"the image {name or source} cannot be decoded",
            expected="a whole image file",
            got=error,
            fix=fix or f"rm {source}",
        ) from error


def head(path: Path) -> tuple[str, tuple[int, int]]:
    """Mode, and (height, width), without decoding the pixels."""
    with opened(path) as image:
        return image.mode, (image.height, image.width)


def decode(
    source: Path | BinaryIO, mode: str = "RGB", name: str | None = None, fix: str | None = None
) -> NDArray[np.uint8]:
    """An image file in Pillow's `mode`, L or RGB: uint8 [H, W] or [H, W, 3].

    Raises:
        DataError: it is damaged or no image, or has more than 8 bits a channel; see `opened`.
    """
    with opened(source, name, fix) as image:
        if image.mode not in MODES:
            raise DataError(
                f"the image {name or source} has pixels of mode {image.mode}, which 8 bits cannot hold",
                expected=", ".join(MODES),
                fix=fix or f"rm {source}",
            )
        return np.asarray(image.convert(mode))


def shape_words(size: tuple[int, ...]) -> str:
    """How messages write (height, width): "32x48 pixels"."""
    return f"{size[0]}x{size[1]} pixels"


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
