"""Small folders of images by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = {"train": 6, "test": 2}


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> None:
    """Noise of (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], *([] if mode == "L" else [3]))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(path)


def make_tree(
    root: Path, classes: Sequence[str], *, counts: Mapping[str, int] = COUNTS, mode: str = "RGB", size: int = 32
) -> Path:
    """ROOT/SPLIT/CLASS/*.png, as many of each class as `counts` says; returns `root`."""
    for split, count in counts.items():
        for number, name in enumerate(classes):
            for i in range(count):
                save_image(root / split / name / f"{i}.png", 100 * number + i, (size, size), mode)
    return root
