"""Small image folders for the tests of packing."""

from __future__ import annotations

import numpy as np
from PIL import Image

#: Bytes of images in a file, so that a small tree becomes several.
SHARD = 4096


def save(path, seed=0, size=(16, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def small_tree(tmp_path):
    """Two splits, two classes, 60 + 20 PNG images of 16x16."""
    root = tmp_path / "small"
    for i in range(30):
        for k, name in enumerate(("ant", "bée")):
            save(root / "train" / name / f"{i:02}.png", 100 * k + i)
            if i < 10:
                save(root / "test" / name / f"{i:02}.png", 1000 + 100 * k + i)
    return root


def varied_tree(tmp_path):
    """One split of 40 images of many sizes and formats."""
    root = tmp_path / "varied"
    for i in range(20):
        save(root / "ant" / f"{i:02}.jpg", i, (20 + 5 * i, 90))
        save(root / "sub" / "deep" / f"{i:02}.png", 50 + i, (30, 20 + i))
    return root
