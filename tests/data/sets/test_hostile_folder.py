"""Trees that are not what they seem: named at once, never a hang or a silent change."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distkit.data import folder
from distkit.data.packed.pack import pack
from distkit.errors import DataError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        place = tmp_path / "tree" / split / "a"
        place.mkdir(parents=True)
        Image.new("RGB", (32, 32), (9, 8, 7)).save(place / "0.png")
    return tmp_path / "tree"


def fifo(place: Path) -> None:
    os.mkfifo(place / "z.jpg")


def broken_link(place: Path) -> None:
    (place / "z.jpg").symlink_to("nowhere.jpg")


def circle(place: Path) -> None:
    (place / "up").symlink_to("..", target_is_directory=True)


def sixteen_bits(place: Path) -> None:
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(place / "z.png")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (fifo, "z.jpg is not a regular file"),
        (broken_link, "z.jpg cannot be read"),
        (circle, "leads back"),
        (sixteen_bits, "mode I;16"),
    ],
)
def test_it_is_named(tree: Path, tmp_path: Path, spoil: object, says: str) -> None:
    spoil(tree / "train" / "a")  # type: ignore[operator]
    with pytest.raises(DataError, match=says):
        folder(tree, "train")
    with pytest.raises(DataError, match=says):
        pack(str(tree), tmp_path / "out")


def test_a_link_in_place_of_the_lock_or_a_file_is_not_followed(tree: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".train.lock").symlink_to(precious)
    with pytest.raises(DataError, match="cannot be written"):
        pack(str(tree), out)
    assert precious.read_text() == "mine"
    (out / ".train.lock").unlink()
    (out / "train").mkdir()
    (out / "train" / "images-00000-of-00001.safetensors").symlink_to(precious)
    (out / "train" / ".tmp-index.json").symlink_to(precious)
    pack(str(tree), out)
    assert precious.read_text() == "mine"
    assert not any(path.is_symlink() for path in (out / "train").iterdir())
