"""Image files decoded to pixels as a person sees them, on many threads, with every fault named.

Turned as EXIF says; transparent pixels laid on a ground; the first of several frames; 8 bits a channel.
"""

from __future__ import annotations

import contextlib
import errno
import io
import shlex
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from distkit.config.data import ground_color
from distkit.errors import DataError, DistkitError, printable

#: Endings of image files, and what of Pillow reads those that not every build of it reads.
ENDINGS: dict[str, str | None] = {
    ".jpg": None, ".jpeg": None, ".jpe": None, ".jfif": None, ".png": None, ".apng": None, ".bmp": None, ".dib": None,
    ".gif": None, ".ppm": None, ".pgm": None, ".pbm": None, ".pnm": None, ".tga": None, ".tif": None, ".tiff": None,
    ".webp": "webp", ".avif": "avif", ".jp2": "jpg_2000",
}  # fmt: skip
#: The endings that are read here, in lower case.
SUFFIXES = tuple(
    ending
    for ending, needs in ENDINGS.items()
    if needs is None or (needs in features.modules.keys() | features.codecs.keys() and features.check(needs))
)
#: Pillow's modes that fit into 8 bits a channel; 16-bit grey would silently turn white.
GREY_MODES = ("1", "L", "LA", "La")
MODES = (*GREY_MODES, "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
TRANSPARENT_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
#: EXIF's tag 0x0112 and how its values 2 to 8 are undone.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: The file is as it was, but this process cannot read it.
UNREADABLE = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)

Mode = Literal["L", "RGB"]
A = TypeVar("A")
B = TypeVar("B")


class Oddities:
    """What is unusual about images that are being decoded: counted by any number of threads, said once at the end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: Literal["transparent", "alpha", "frames"], name: str) -> None:
        """Count an image of this kind."""
        with self._lock:
            self._counts[kind] += 1
            self._first[kind] = min(name, self._first.get(kind, name))

    def notes(self, background: str) -> tuple[str, ...]:
        """A sentence for each kind that there was; `background` is the name of the ground."""
        words = {
            "transparent": f"with transparent pixels, laid on {background}",
            "alpha": f"with an alpha channel: what is transparent is laid on {background}",
            "frames": "of several frames, of which the first is used",
        }
        return tuple(
            f"{count:,} image{'s' if count > 1 else ''} {words[kind]} ({printable(self._first[kind])})"
            for kind, count in sorted(self._counts.items(), reverse=True)
        )


@contextlib.contextmanager
def opened(source: Path | BinaryIO, name: str | None = None, fix: str | None = None) -> Iterator[Image.Image]:
    """The image in `source`; whatever Pillow raises, also while it is decoded, becomes a DataError.

    Args:
        source: the file, or its bytes.
        name: what to call it in a message; None: its path.
        fix: what to type against a damaged one; None: to delete it.
    """
    try:
        with Image.open(source) as image:
            yield image
    except (DistkitError, MemoryError):
        raise
    except Exception as error:  # a damaged file may raise anything: struct.error, KeyError, SyntaxError, …
        file = None if isinstance(source, io.BufferedIOBase) else shlex.quote(str(source))
        if isinstance(error, OSError) and error.errno in UNREADABLE:
            denied = isinstance(error, PermissionError)
            raise DataError(f"the image {name or source} cannot be read", expected="a file that this user may read",
                            got=error, fix=f"chmod u+r {file}" if denied and file else fix) from error  # fmt: skip
        empty = file is not None and Path(str(source)).stat().st_size == 0
        raise DataError(
            f"the image {name or source} cannot be decoded",
            expected="a whole image file",
            got="an empty file" if empty else str(error) or type(error).__name__,
            fix=fix or f"rm {file}",
        ) from error


def head(path: Path) -> tuple[str, tuple[int, int]]:
    """Mode, and (height, width) once it is upright; the pixels are decoded only where those depend on it."""
    with opened(path) as image:
        mode = image.mode
        # in a PNG the orientation may come after the pixels
        if image.width != image.height and orientation(image) > 4:
            image = upright(image)
        return mode, (image.height, image.width)


def orientation(image: Image.Image) -> int:
    """How EXIF says that the image is turned: 1, upright, to 8; 1 where EXIF is missing or damaged."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # anything that Pillow stumbles over in there
        return 1
    return value if value in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """The image, decoded and turned as EXIF says."""
    image.load()  # Pillow turns TIFF by itself here, and a PNG's EXIF may come after its pixels
    turned = orientation(image)
    return image if turned == 1 else image.transpose(TURNS[turned])


def open_image(
    source: Path | str | BinaryIO,
    mode: Mode | None = "RGB",
    background: str = "white",
    *,
    name: str | None = None,
    fix: str | None = None,
    oddities: Oddities | None = None,
) -> Image.Image:
    """An image file as a person sees it: for torchvision's sets as their `loader`, which itself ignores EXIF.

    Args:
        source: the file, or its bytes.
        mode: Pillow's L or RGB; None: L where the image is grey, else RGB.
        background: what transparent pixels are laid on: white, grey, black or #rrggbb.
        name, fix: see `opened`.
        oddities: told of what is unusual about the image.

    Raises:
        DataError: it is damaged or no image, or has more than 8 bits a channel; see `opened`.
    """
    source = Path(source) if isinstance(source, str) else source
    called, noted = name or str(source), oddities or Oddities()
    with opened(source, name, fix) as image:
        check_depth(image, called, fix)
        if has_frames(image):
            noted.add("frames", called)
        return flattened(image, mode, background, lambda: noted.add("transparent", called))


def flattened(
    image: Image.Image, mode: Mode | None, background: str, on_transparent: Callable[[], object] = lambda: None
) -> Image.Image:
    """`image` upright, without transparency and in `mode`; calls `on_transparent` where a pixel was transparent."""
    if mode is None:
        mode = "L" if image.mode in GREY_MODES else "RGB"
    image = upright(image)
    if is_transparent(image):
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, ground_color(background))
        image.alpha_composite(layer)
        if layer.getchannel("A").getextrema()[0] != 255:
            on_transparent()
    return image.convert(mode)


def is_transparent(image: Image.Image) -> bool:
    """Whether a pixel could be transparent: there is an alpha channel, or a colour that stands for it."""
    return image.mode in TRANSPARENT_MODES or "transparency" in image.info


def check_depth(image: Image.Image, name: object, fix: str | None = None) -> None:
    """Raise DataError where the image has more than 8 bits a channel: which of them matter is not known here."""
    if image.mode not in MODES:
        raise DataError(
            f"the image {name} has pixels of mode {image.mode}, which 8 bits cannot hold",
            expected=f"8 bits a channel: {', '.join(MODES)}",
            got=f"{image.mode}: scale them to 0 to 255 yourself, since their range is not known",
            fix=fix or f"rm {shlex.quote(str(name))}",
        )


def decode(
    source: Path | BinaryIO,
    mode: Mode = "RGB",
    background: str = "white",
    *,
    name: str | None = None,
    fix: str | None = None,
    oddities: Oddities | None = None,
) -> NDArray[np.uint8]:
    """An image file as `open_image` opens it: uint8 [H, W] for L, or [H, W, 3]."""
    return np.asarray(open_image(source, mode, background, name=name, fix=fix, oddities=oddities))


def planes(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W] -> [1, H, W]; [H, W, 3] -> [3, H, W]."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def has_frames(image: Image.Image) -> bool:
    """Whether there are more frames than one; a damaged second frame does not count."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:
        return False


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
