"""Mean and standard deviation of many images, against numpy over all pixels at once."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.image_trees import make_tree, save_image

from distkit.commands import run
from distkit.data.packed import pack as packing
from distkit.data.packed.pack import pack
from distkit.data.stats import image_stats
from distkit.errors import ConfigError, DataError


def by_numpy(files, mode="RGB"):
    """Mean and std over all pixels of all files, in float64."""
    arrays = []
    for file in files:
        with Image.open(file) as image:
            arrays.append(np.asarray(image.convert(mode), np.float64).reshape(-1, len(mode) if mode == "RGB" else 1))
    pixels = np.concatenate(arrays) / 255
    return pixels.mean(0), pixels.std(0)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = make_tree(tmp_path / "tree", ("a", "b"), counts={"train": 30, "test": 3}, size=16)
    save_image(root / "train" / "b" / "large.png", 7, (301, 200))
    save_image(root / "train" / "b" / "deeper" / "grey.png", 8, (50, 20), "L")
    Image.new("RGB", (64, 64), (255, 0, 3)).save(root / "train" / "a" / "flat.png")
    return root


@pytest.mark.parametrize("num_workers", [1, 3])
def test_they_are_those_of_all_pixels(tree, num_workers):
    stats = image_stats(tree, num_workers=num_workers)
    files = list((tree / "train").rglob("*.png"))
    mean, std = by_numpy(files)
    assert stats.num_images == len(files) == 63
    assert np.abs(np.array(stats.mean) - mean).max() < 1e-12
    assert np.abs(np.array(stats.std) - std).max() < 1e-12
    test = image_stats(tree, split="test")
    assert np.abs(np.array(test.mean) - by_numpy((tree / "test").rglob("*.png"))[0]).max() < 1e-12


@pytest.mark.parametrize("form", ["raw", "encoded"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_of_packed_images_as_well(tmp_path, form, mode):
    root = make_tree(tmp_path / "in", ("a", "b"), counts={"train": 30, "test": 2}, mode=mode, size=8)
    pack(str(root), tmp_path / "out", form=form, shard_bytes=2_000)
    mean, std = by_numpy((root / "train").rglob("*.png"), mode)
    for place in (root, root / "train", tmp_path / "out", tmp_path / "out" / "train"):
        stats = image_stats(place)
        assert (len(stats.mean), stats.num_images) == (len(mode), 60)
        assert np.abs(np.array(stats.mean) - mean).max() < 1e-12
        assert np.abs(np.array(stats.std) - std).max() < 1e-12
    with pytest.raises(ConfigError, match="--background"):
        image_stats(tmp_path / "out", background="black")


def test_any_folder_of_images_will_do(tmp_path):
    for i in range(3):
        save_image(tmp_path / "flat" / f"{i}.png", i)
        save_image(tmp_path / "pairs" / "train" / "images" / f"{i}.png", i)
        save_image(tmp_path / "pairs" / "train" / "masks" / f"{i}.png", 50 + i)
    assert image_stats(tmp_path / "flat").mean == image_stats(tmp_path / "pairs").mean
    assert image_stats(tmp_path / "pairs").num_images == 3


def test_what_it_prints_is_accepted_and_progress_is_shown(tree, capsys, monkeypatch):
    (tree / "train" / "a" / "x.heic").write_text("x")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tree / "train" / "a" / "clear.png")
    ticks = iter(range(0, 10_000, 10))
    monkeypatch.setattr(packing.time, "monotonic", lambda: next(ticks))
    assert run(["data", "stats", str(tree), "--background", "#000000"]) == 0
    out, err = capsys.readouterr()
    mean, std = by_numpy(path for path in (tree / "train").rglob("*.png") if path.name != "clear.png")
    typed = re.search(r"type: --data\.mean ([0-9. ]+) --data\.std ([0-9. ]+)\n", out)
    given = [np.array(numbers.split(), float) for numbers in typed.groups()]
    assert np.abs(given[0] - mean).max() < 2e-3  # 64 black pixels more
    assert np.abs(given[1] - std).max() < 2e-3
    assert "%" in err
    assert "1 file is left out: .heic (1)" in err
    assert "1 image with transparent pixels, laid on #000000" in err


def test_faults_are_named(tree, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        image_stats(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no image"):
        image_stats(tmp_path / "none")
    with pytest.raises(ConfigError, match="workers"):
        image_stats(tree, num_workers=0)
    shutil.rmtree(tree / "test")
    with pytest.raises(DataError, match="test"):
        image_stats(tree, split="test")
    (tree / "train" / "b" / "large.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"large\.png cannot be decoded"):
        image_stats(tree)
    done = subprocess.run([sys.executable, "-m", "distkit", "data", "stats", str(tree)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
