"""Images with masks: paired by name, every fault named, changed at random alike."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distkit.data import Augments, Dataset, Draws, MaskDataset, as_dataset, mask_folder
from distkit.data.augment import PairGeometry
from distkit.data.sets.images import IGNORE
from distkit.data.sets.mask_folder import list_pairs, load_masks
from distkit.errors import ConfigError, DataError

ARCHIVE = Path(__file__).parents[4] / "shared" / "data" / "em-membrane.tar.xz"
VALUES = {0: 0, 255: 1}


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def grey(seed, size=(8, 10)):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@pytest.fixture
def tree(tmp_path):
    """Four grey pairs in train, one in test; masks are 255 where the image is bright."""
    for split, count in (("train", 4), ("test", 1)):
        for i in range(count):
            save(tmp_path / split / "images" / f"{i}.png", grey(i))
            save(tmp_path / split / "masks" / f"{i}.tif", np.where(grey(i) > 99, 255, 0).astype(np.uint8))
    return tmp_path


def test_pairs_are_read_in_the_order_of_their_names(tree):
    dataset = mask_folder(tree, "train", VALUES, ("dark", "bright"))
    assert dataset.images.dtype == dataset.masks.dtype == torch.uint8
    assert dataset.images.equal(torch.from_numpy(np.stack([grey(i)[None] for i in range(4)])))
    assert dataset.masks.equal((dataset.images[:, 0] > 99).to(torch.uint8))
    assert dataset.describe() == f"4 images 1x8x10 uint8 with masks, 2 classes, from folder {tree}"
    assert len(mask_folder(tree, "test", VALUES, ("dark", "bright"))) == 1


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from("abcdefg"), min_size=1), st.sets(st.sampled_from("abcdefg"), min_size=1))
def test_pairing_is_by_name(tmp_path_factory, images, masks):
    root = tmp_path_factory.mktemp("pairs")
    for kind, names, suffix in (("images", images, "jpg"), ("masks", masks, "png")):
        (root / "train" / kind).mkdir(parents=True)
        for name in names:
            (root / "train" / kind / f"{name}.{suffix}").touch()
    lone = sorted(images ^ masks)
    if not lone:
        expected = [(root / f"train/images/{name}.jpg", root / f"train/masks/{name}.png") for name in sorted(images)]
        assert list_pairs(root, "train") == expected
        return
    with pytest.raises(DataError) as caught:
        list_pairs(root, "train")
    here, there = ("images", "masks") if lone[0] in images else ("masks", "images")
    assert f"{root / 'train' / here / lone[0]}." in str(caught.value)
    assert f"{root / 'train' / there / lone[0]}.*" in str(caught.value)
    assert (f"{len(lone) - 1} more" in str(caught.value)) == (len(lone) > 1)


def test_one_colour_image_makes_all_of_them_rgb(tree):
    colours = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    save(tree / "train" / "images" / "2.png", colours)
    images, _ = load_masks(tree, "train", VALUES)
    assert images.shape == (4, 3, 8, 10)
    assert images[2].equal(torch.from_numpy(colours.transpose(2, 0, 1).copy()))
    assert images[1].equal(torch.from_numpy(grey(1)).expand(3, 8, 10))


def test_masks_by_palette_by_colour_and_of_one_bit(tree):
    ids = np.random.default_rng(3).integers(0, 3, (8, 10), np.uint8)
    palette = [0, 0, 0, 128, 0, 0, 0, 128, 0]
    indexed = Image.fromarray(ids).convert("P")
    indexed.putpalette(palette)
    folder = tree / "test" / "masks"
    (folder / "0.tif").unlink()
    indexed.save(folder / "0.png")
    assert load_masks(tree, "test", {0: 0, 1: 1, 2: IGNORE})[1][0].tolist() == np.where(ids == 2, 255, ids).tolist()
    by_colour = {(0, 0, 0): 0, (128, 0, 0): 1, (0, 128, 0): 2}
    assert load_masks(tree, "test", by_colour)[1][0].tolist() == ids.tolist()
    indexed.convert("RGB").save(folder / "0.png")
    assert load_masks(tree, "test", by_colour)[1][0].tolist() == ids.tolist()
    with pytest.raises(DataError, match="coloured"):
        load_masks(tree, "test", {0: 0})
    with pytest.raises(DataError, match=r"\(0, 128, 0\); "):
        load_masks(tree, "test", {(0, 0, 0): 0, (128, 0, 0): 1})
    Image.fromarray(ids > 0).save(folder / "0.png")
    assert load_masks(tree, "test", VALUES)[1][0].tolist() == (ids > 0).astype(int).tolist()
    save(folder / "0.png", np.repeat((ids * 40)[..., None], 3, 2))
    assert load_masks(tree, "test", {0: 0, 40: 1, 80: 2})[1][0].tolist() == ids.tolist()


def lone_image(root):
    (root / "train" / "masks" / "2.tif").unlink()
    return f"{root}/train/images/2.png has no partner\n  expected: {root}/train/masks/2.*"


def lone_mask(root):
    (root / "train" / "images" / "2.png").unlink()
    return f"{root}/train/masks/2.tif has no partner\n  expected: {root}/train/images/2.*"


def two_of_a_name(root):
    save(root / "train" / "images" / "1.bmp", grey(0))
    return "got:      1.bmp, 1.png"


def other_mask_size(root):
    save(root / "train" / "masks" / "1.tif", np.zeros((8, 9), np.uint8))
    return "masks/1.tif differs in size from its image", "images/1.png", "8x10 pixels", "8x9 pixels"


def other_pair_size(root):
    save(root / "train" / "images" / "3.png", grey(0, (4, 4)))
    save(root / "train" / "masks" / "3.tif", np.zeros((4, 4), np.uint8))
    return "images/3.png differs in size", "8x10 pixels, as", "4x4 pixels"


def undeclared(root):
    pixels = np.zeros((8, 10), np.uint8)
    pixels[3, 4] = pixels[3, 5] = 7
    save(root / "train" / "masks" / "1.tif", pixels)
    return "masks/1.tif has an undeclared value", "{0: 0, 255: 1}", "got:      7; 2 such pixels", "7: CLASS"


def truncated(root):
    path = root / "train" / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    return f"{path} cannot be decoded"


def not_an_image(root):
    (root / "train" / "masks" / "1.tif").write_text("hello")
    return f"{root}/train/masks/1.tif cannot be decoded"


def sixteen_bits(root):
    save(root / "train" / "images" / "1.png", grey(0).astype(np.uint16) * 200)
    return "images/1.png has pixels of another kind", "I;16"


def no_masks(root):
    shutil.rmtree(root / "train" / "masks")
    return f"there is no folder {root}/train/masks"


def empty(root):
    for path in root.glob("train/*/*"):
        path.unlink()
    return f"{root}/train/images has no image"


FAULTS = [lone_image, lone_mask, two_of_a_name, other_mask_size, other_pair_size, undeclared, truncated, not_an_image]


@pytest.mark.parametrize("spoil", [*FAULTS, sixteen_bits, no_masks, empty])
def test_faults_are_named(tree, spoil):
    words = spoil(tree)
    with pytest.raises(DataError) as caught:
        load_masks(tree, "train", VALUES)
    for word in [words] if isinstance(words, str) else words:
        assert word in str(caught.value)


@pytest.mark.parametrize("values", [{}, {0: 0, 255: -1}, {0: 256}])
def test_tables_that_map_to_nothing_are_refused(tree, values):
    with pytest.raises(ConfigError, match="values"):
        load_masks(tree, "train", values)


def random_set(height, width, count=12, channels=2, augmentation=None):
    rng = np.random.default_rng(height * 100 + width)
    images = torch.from_numpy(rng.integers(0, 256, (count, channels, height, width), np.uint8))
    masks = torch.from_numpy(rng.integers(0, 5, (count, height, width), np.uint8))
    return MaskDataset(images, masks, class_names=("a", "b", "c", "d", "e"), source="test", augmentation=augmentation)


def change_one(array, how, draws, i):
    """numpy [..., H, W]."""
    if how.crop_size:
        y = draws.integers("crop y", 0, array.shape[-2] - how.crop_size + 1)[i].item()
        x = draws.integers("crop x", 0, array.shape[-1] - how.crop_size + 1)[i].item()
        array = array[..., y : y + how.crop_size, x : x + how.crop_size]
    if how.flip and draws.bernoulli("flip", 0.5)[i]:
        array = array[..., ::-1]
    if how.flip_vertical and draws.bernoulli("flip vertical", 0.5)[i]:
        array = array[..., ::-1, :]
    if how.rotate:
        array = np.rot90(array, draws.integers("rotate", 0, 4)[i].item(), axes=(-2, -1))
    return array


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 12),
    wider=st.integers(0, 5),
    crop=st.none() | st.integers(1, 12),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**63 - 1),
    start=st.integers(0, 2**40),
)
def test_image_and_mask_are_changed_alike_one_by_one(size, wider, crop, flags, seed, start):
    crop = None if crop is None else min(crop, size)
    flip, flip_vertical, rotate = flags
    rotate = rotate and (crop is not None or wider == 0)
    how = PairGeometry(crop_size=crop, flip=flip, flip_vertical=flip_vertical, rotate=rotate)
    dataset = random_set(size, size + wider, augmentation=how)
    draws = Draws(seed, start + torch.arange(12))
    images, masks = dataset.augment(dataset.fetch(torch.arange(12)), draws)
    assert images.dtype == torch.float32
    assert masks.dtype == torch.int64
    raw = ((images * 0.5 + 0.5) * 255).round().to(torch.uint8)
    for i in range(12):
        assert (raw[i].numpy() == change_one(dataset.images[i].numpy(), how, draws, i)).all()
        assert (masks[i].numpy() == change_one(dataset.masks[i].numpy(), how, draws, i)).all()


def test_a_sample_does_not_depend_on_its_batch():
    how = PairGeometry(crop_size=4, flip=True, flip_vertical=True, rotate=True)
    dataset = random_set(9, 7, augmentation=how)
    whole = dataset.augment(dataset.fetch(torch.arange(12)), Draws(1, torch.arange(12)))
    part = dataset.augment(dataset.fetch(torch.arange(5, 8)), Draws(1, torch.arange(5, 8)))
    for one, other in zip(whole, part, strict=True):
        assert one[5:8].equal(other)


def test_without_augmentation_it_only_normalises():
    dataset = random_set(6, 5)
    before = dataset.images.clone()
    images, masks = dataset.augment(dataset.fetch(torch.tensor([3, 3, 0])), Draws(0, torch.arange(3)))
    torch.testing.assert_close(images, (dataset.images[[3, 3, 0]] / 255 - 0.5) / 0.5)
    assert masks.equal(dataset.masks[[3, 3, 0]].long())
    assert dataset.images.equal(before)
    other = dataset.augmented(PairGeometry(flip=True))
    assert other.images is dataset.images
    assert other.augmentation.flip
    assert dataset.to("cpu").device == torch.device("cpu")


def test_it_is_a_data_set():
    dataset = random_set(6, 6)
    assert as_dataset(dataset) is dataset
    assert isinstance(dataset, Dataset)
    assert isinstance(dataset, Augments)


def test_sets_that_do_not_fit_together_are_refused():
    images, masks = torch.zeros(2, 1, 4, 5, dtype=torch.uint8), torch.zeros(2, 4, 5, dtype=torch.uint8)
    names = {"class_names": ("a", "b"), "source": "test"}
    for bad in [(images, masks[:1]), (images, masks[:, :3]), (images.float(), masks), (images[:0], masks[:0])]:
        with pytest.raises(DataError, match="wrong form"):
            MaskDataset(*bad, **names)
    with pytest.raises(DataError, match=r"got: +2"):
        MaskDataset(images, masks + 2, **names)
    assert len(MaskDataset(images, masks + IGNORE, **names)) == 2
    with pytest.raises(DataError, match="channels"):
        MaskDataset(images, masks, mean=(0.5, 0.5), **names)
    with pytest.raises(ConfigError, match="1 to 4 pixels"):
        MaskDataset(images, masks, augmentation=PairGeometry(crop_size=5), **names)
    with pytest.raises(ConfigError, match="square"):
        MaskDataset(images, masks, augmentation=PairGeometry(rotate=True), **names)
    with pytest.raises(ConfigError, match="crop-size"):
        PairGeometry(crop_size=0)


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} is not here")
def test_electron_microscopy_membranes(tmp_path):
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    train = mask_folder(tmp_path / "em", "train", VALUES, ("membrane", "inside"))
    assert train.images.shape == (24, 1, 512, 512)
    assert mask_folder(tmp_path / "em", "test", VALUES, ("membrane", "inside")).masks.shape == (6, 512, 512)
    assert 0.7 < train.masks.float().mean() < 0.85
    # Membranes are darker than what they enclose.
    inside = train.masks.bool()
    assert train.images[:, 0][~inside].float().mean() < train.images[:, 0][inside].float().mean() - 20
    random = train.augmented(PairGeometry(crop_size=256, flip=True, flip_vertical=True, rotate=True))
    images, masks = random.augment(random.fetch(torch.arange(8)), Draws(0, torch.arange(8)))
    assert images.shape == (8, 1, 256, 256)
    assert images[:, 0][masks == 0].mean() < images[:, 0][masks == 1].mean() - 0.15
