"""Mean and standard deviation of the channels of many images, of any sizes: the work of `distkit data stats`.

Pixels are counted by value, so that the sums are exact however many images there are; float64 comes last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distkit.config import Color, Split
from distkit.config.check import require, require_number
from distkit.config.data import ground_color
from distkit.data.packed.format import INDEX
from distkit.data.packed.pack import progress, report
from distkit.data.packed.plan import channels_of
from distkit.data.packed.read import PackedImages
from distkit.data.sets.decode import Oddities, decode, in_order, planes
from distkit.data.sets.image_folder import Listing, entries, image_files, left_out_note
from distkit.errors import DataError
from distkit.runtime.process import available_cores

#: Images that a thread reads at a time: few, so that progress is seen on large ones.
BLOCK = 16
Counts = NDArray[np.int64]
"""How often each value occurs in each channel, int64 [C, 256]."""


@dataclass(frozen=True)
class Stats:
    """Statistics of the images of one split.

    Args:
        source: the folder that was read.
        num_images: images in it.
        counts: how often each value occurs in each channel.
    """

    source: Path
    num_images: int
    counts: Counts

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel, in [0, 1]."""
        return tuple((self.counts @ np.arange(256) / self.counts.sum(1) / 255).tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel over all its pixels, on the same scale."""
        values = np.arange(256) / 255
        deviations = (values[None] - np.array(self.mean)[:, None]) ** 2
        return tuple(np.sqrt((self.counts * deviations).sum(1) / self.counts.sum(1)).tolist())

    def describe(self) -> str:
        """The numbers, and what to type for them."""
        mean, std = (" ".join(f"{value:.8f}" for value in each) for each in (self.mean, self.std))
        channels = f"{len(self.counts)} channel" + ("s" if len(self.counts) > 1 else "")
        pixels = int(self.counts[0].sum())
        return "\n".join(
            [
                f"{self.source}: {self.num_images:,} images, {channels}, {pixels:,} pixels",
                f"  mean: {mean}",
                f"  std:  {std}",
                f"  type: --data.mean {mean} --data.std {std}",
            ]
        )


def image_stats(
    folder: Path,
    *,
    split: Split | None = None,
    color: Color = "auto",
    background: str = "white",
    num_workers: int | None = None,
) -> Stats:
    """Statistics of a folder of images or of a packed split; every image is read, a few at a time.

    Args:
        folder: ROOT, of which ROOT/train is taken, or any folder with images in it or below; packed ones, too. Where
            there are folders `images` and `masks`, it is the images.
        split: which split; None: train where there are splits.
        color: rgb, grey, or auto: grey where every image is grey, else rgb.
        background: what transparent pixels are laid on: white, grey, black or #rrggbb.
        num_workers: threads that read images, >= 1; None: one a core.

    Raises:
        DataError: there is no such folder, no image in it, or one that cannot be read; the message names it.
        ConfigError: an option does not fit.
    """
    require_number("workers", num_workers, least=1, example="4")
    ground_color(background, "background")
    folder = _split_folder(folder, split)
    if (folder / INDEX).is_file():
        what = "unset: packed images have it already"
        require(color == "auto", "color", what, color, "auto")
        require(background == "white", "background", what, background, "white")
        return _packed_stats(folder, num_workers or available_cores())
    inner = folder / "images"
    folder = inner if entries(inner) is not None and entries(folder / "masks") is not None else folder
    return _folder_stats(folder, color, background, num_workers or available_cores())


def _split_folder(folder: Path, split: Split | None) -> Path:
    inside = entries(folder)
    if inside is None:
        raise DataError(f"there is no folder {folder}", expected="a folder of images", fix="distkit data stats FOLDER")
    present = {entry.name for entry in inside if entry.is_dir()}
    if split is not None and split not in present:
        raise DataError(f"there is no folder {folder / split}", expected="train/ or test/ in it",
                        got=", ".join(sorted(present)[:10]) or "no folder",
                        fix=f"distkit data stats {folder}")  # fmt: skip
    chosen = split or ("train" if "train" in present else None)
    return folder if chosen is None else folder / chosen


def _folder_stats(folder: Path, color: Color, background: str, num_workers: int) -> Stats:
    left_out: Counter[str] = Counter()
    found = sorted(image_files(folder, ".", left_out))
    if not found:
        raise DataError(f"the folder {folder} has no image", expected="a folder of images",
                        got=", ".join(sorted(left_out)) or "no file")  # fmt: skip
    for note in left_out_note(folder, left_out):
        report(note)
    files = tuple(file.removeprefix("./") for file, _, _ in found)
    channels = channels_of(Listing(folder, (), files, (), (), ""), color, num_workers)
    oddities = Oddities()

    def count(block: Sequence[tuple[str, int, int]]) -> tuple[Counts, int]:
        counts = np.zeros((channels, 256), np.int64)
        for file, _, _ in block:
            pixels = decode(folder / file, "L" if channels == 1 else "RGB", background, oddities=oddities)
            counts += _count(planes(pixels))
        return counts, sum(size for _, size, _ in block)

    blocks = (found[i : i + BLOCK] for i in range(0, len(found), BLOCK))
    with progress(f"stats {folder}", sum(size for _, size, _ in found)) as advance:
        counts = _added(in_order(count, blocks, num_workers), advance)
    for note in oddities.notes(background):
        report(f"{folder}: {note}")
    return Stats(folder, len(found), counts)


def _packed_stats(folder: Path, num_workers: int) -> Stats:
    images = PackedImages(folder)
    num_bytes = images.split.index.num_bytes
    blocks = [range(i, min(i + BLOCK, len(images))) for i in range(0, len(images), BLOCK)]

    def count(samples: range) -> tuple[Counts, int]:
        counts = np.sum([_count(images.pixels(i).numpy()) for i in samples], axis=0)
        return counts, num_bytes * len(samples) // len(images)

    with progress(f"stats {folder}", num_bytes) as advance:
        return Stats(folder, len(images), _added(in_order(count, blocks, num_workers), advance))


def _count(pixels: NDArray[np.uint8]) -> Counts:
    """uint8 [C, H, W] -> how often each value occurs in each channel."""
    return np.stack([np.bincount(plane.reshape(-1), minlength=256) for plane in pixels])


def _added(parts: Iterator[tuple[Counts, int]], advance: Callable[[int], None]) -> Counts:
    counts, num_bytes = next(parts)
    advance(num_bytes)
    for more, num_bytes in parts:
        counts += more
        advance(num_bytes)
    return counts
