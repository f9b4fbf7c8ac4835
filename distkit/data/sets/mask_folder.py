"""Folders of images and masks, ROOT/SPLIT/images/NAME.* and ROOT/SPLIT/masks/NAME.*: paired, checked, decoded."""

from __future__ import annotations

import shlex
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distkit.config import Split
from distkit.config.check import require
from distkit.data.sets.decode import (
    GREY_MODES,
    MODES,
    SUFFIXES,
    Oddities,
    decode,
    head,
    in_order,
    opened,
    planes,
    shape_words,
    upright,
)
from distkit.data.sets.image_folder import entries, left_out_note
from distkit.data.sets.images import MaskDataset
from distkit.errors import DataError
from distkit.runtime.process import available_cores

LAYOUT = "ROOT/SPLIT/images/NAME.png and ROOT/SPLIT/masks/NAME.png (or .tif, …)"

Colour: TypeAlias = tuple[int, int, int]
ClassIds: TypeAlias = Mapping[int, int] | Mapping[Colour, int]
"""Value of a pixel in the mask files -> class id: {0: 0, 255: 1}, or by colour {(128, 0, 0): 1}."""
Pair: TypeAlias = tuple[Path, Path]


def mask_folder(
    root: Path, split: Split, values: ClassIds, class_names: tuple[str, ...], *, background: str = "white"
) -> MaskDataset:
    """ROOT/SPLIT/images/NAME.* and ROOT/SPLIT/masks/NAME.* in memory; arguments and errors as `load_masks`."""
    oddities = Oddities()
    images, masks = load_masks(root, split, values, background=background, oddities=oddities)
    dataset = MaskDataset(images, masks, class_names=class_names, source=f"folder {root}")
    left_out = (note for kind in ("images", "masks") for note in left_out_note(*_others(root / split / kind)))
    dataset.file_notes = (*left_out, *(f"{root / split / 'images'}: {note}" for note in oddities.notes(background)))
    return dataset


def load_masks(
    root: Path,
    split: Split,
    values: ClassIds,
    *,
    background: str = "white",
    oddities: Oddities | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode a split: images uint8 [N, C, H, W] and masks of class ids uint8 [N, H, W], in the order of the names.

    C is 1 where every image is grey, else 3. The masks' values are their grey levels or palette indices, or their
    colours where `values` has colours.

    Args:
        root: the folder that has train/ and test/.
        split: which of them.
        values: class id of every value that a mask may have, ids 0 to 254, or 255 for pixels that do not count.
        background: what transparent pixels of the images are laid on: white, grey, black or #rrggbb.
        oddities: told of what is unusual about the images.

    Raises:
        ConfigError: `values` is empty or has other ids.
        DataError: a folder or a partner is missing, a file is damaged or of another size, or a mask has a value that
            is not declared; the message names the file.
    """
    require(bool(values), "values", "a class id for every value of a mask", dict(values), "{0: 0, 255: 1}")
    require(all(0 <= i <= 255 for i in values.values()), "values", "class ids 0 to 255", dict(values), "{0: 0, 255: 1}")
    pairs = list_pairs(root, split)
    channels = max(_channels(image) for image, _ in pairs)
    height, width = head(pairs[0][0])[1]
    images = np.empty((len(pairs), channels, height, width), np.uint8)
    masks = np.empty((len(pairs), height, width), np.uint8)
    table = _Table(values)

    def work(i: int) -> None:
        pixels = decode(pairs[i][0], "L" if channels == 1 else "RGB", background, oddities=oddities)
        if pixels.shape[:2] != (height, width):
            raise DataError(
                f"the image {pairs[i][0]} differs in size",
                expected=f"{shape_words((height, width))}, as {pairs[0][0]}",
                got=shape_words(pixels.shape),
            )
        ids = table.class_ids(pairs[i][1])
        if ids.shape != (height, width):
            raise DataError(
                f"the mask {pairs[i][1]} differs in size from its image {pairs[i][0]}",
                expected=shape_words((height, width)),
                got=shape_words(ids.shape),
            )
        images[i], masks[i] = planes(pixels), ids

    for _ in in_order(work, range(len(pairs)), available_cores()):
        pass  # raises what a thread raised
    return torch.from_numpy(images), torch.from_numpy(masks)


def list_pairs(root: Path, split: Split) -> list[Pair]:
    """Image and mask of every name, ordered by name.

    Raises:
        DataError: a folder is missing or empty, a name occurs twice, or a partner is missing.
    """
    images, masks = (_by_name(root / split / kind) for kind in ("images", "masks"))
    lone = sorted(images.keys() ^ masks.keys())
    if lone:
        files, other = (images, "masks") if lone[0] in images else (masks, "images")
        more = f", and {len(lone) - 1} more like it" if len(lone) > 1 else ""
        raise DataError(
            f"{files[lone[0]]} has no partner",
            expected=f"{root / split / other / lone[0]}.* beside it",
            got=f"no such file{more}",
            fix=f"rm {shlex.quote(str(files[lone[0]]))}",
        )
    if not images:
        raise DataError(f"{root / split / 'images'} has no image", expected=LAYOUT)
    return [(images[name], masks[name]) for name in sorted(images)]


def _by_name(folder: Path) -> dict[str, Path]:
    inside = entries(folder)
    if inside is None:
        raise DataError(f"there is no folder {folder}", expected=LAYOUT, fix="--data.root DIR")
    paths: dict[str, Path] = {}
    for path in sorted(folder / entry.name for entry in inside):
        if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES:
            continue
        name = unicodedata.normalize("NFC", path.stem)
        if name in paths:
            raise DataError(
                f"two files in {folder} have the name {name}",
                expected="one of them",
                got=f"{paths[name].name}, {path.name}",
                fix=f"rm {shlex.quote(str(path))}",
            )
        paths[name] = path
    return paths


def _others(folder: Path) -> tuple[Path, Mapping[str, int]]:
    """The folder, and the endings of the files in it that are not read."""
    endings = (Path(entry.name).suffix.lower() or "no ending" for entry in entries(folder) or ()
               if entry.is_file() and not entry.name.startswith("."))  # fmt: skip
    return folder, Counter(ending for ending in endings if ending not in SUFFIXES)


def _channels(image: Path) -> int:
    """1 where the image is grey, 3 where it has colour."""
    mode = head(image)[0]
    if mode not in MODES:
        raise DataError(f"the image {image} has pixels of another kind", expected=f"8 bits: {', '.join(MODES)}",
                        got=mode)  # fmt: skip
    return 1 if mode in GREY_MODES else 3


class _Table:
    """Class ids by the values of pixels; colours are looked up as one number, red first."""

    def __init__(self, values: ClassIds) -> None:
        self.by_colour = any(isinstance(key, tuple) for key in values)
        codes = {self._code(key): number for key, number in values.items()}
        self.codes = np.array(sorted(codes), np.int64)
        self.ids = np.array([codes[code] for code in sorted(codes)], np.uint8)
        self.declared = ", ".join(f"{key}: {number}" for key, number in values.items())

    def _code(self, key: int | Colour) -> int:
        if isinstance(key, tuple):
            return key[0] << 16 | key[1] << 8 | key[2]
        return key * 0x10101 if self.by_colour else key

    def class_ids(self, path: Path) -> NDArray[np.uint8]:
        """The mask's class ids, uint8 [H, W]."""
        codes = self._read(path)
        positions = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        wrong = self.codes[positions] != codes
        if wrong.any():
            code, count = int(codes[wrong][0]), int(wrong.sum())
            value: int | Colour = (code >> 16, code >> 8 & 255, code & 255) if self.by_colour else code
            raise DataError(
                f"the mask {path} has an undeclared value",
                expected=f"one of values={{{self.declared}}}",
                got=f"{value}; {count} such pixels",
                fix=f"values={{{self.declared}, {value}: CLASS}}",
            )
        return self.ids[positions]

    def _read(self, path: Path) -> NDArray[np.int64]:
        with opened(path) as image:
            mode = image.mode
            # Black and white of one bit become 0 and 255, as in a grey image.
            read_as = "RGB" if self.by_colour else "L" if mode in ("1", "LA") else mode
            pixels: NDArray[np.int64] = np.asarray(upright(image).convert(read_as)).astype(np.int64)
        if self.by_colour:
            return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
        if pixels.ndim == 3 and (pixels[..., :3] == pixels[..., :1]).all():
            pixels = pixels[..., 0]
        if pixels.ndim == 3:
            raise DataError(
                f"the mask {path} is coloured",
                expected=f"one value a pixel, of values={{{self.declared}}}",
                got=f"mode {mode}",
                fix="values={(255, 0, 0): 1, …} for colours",
            )
        return pixels
