"""Folders as people have them: classes without images, grey images, odd names, files that are no images."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.image_trees import make_tree, save_image

from distkit.commands import run
from distkit.config import DataConfig
from distkit.data import CIFAR10_MEAN, folder, image_facts, load_images, mask_folder, open_packed
from distkit.data.packed.pack import pack
from distkit.data.packed.read import PackedImages
from distkit.data.sets import decode as decoding
from distkit.data.sets.image_folder import list_images
from distkit.errors import ConfigError, DataError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree", ("ant", "cat", "dog"), counts={"train": 2, "test": 1}, size=8)


def no_test_folder(root):
    shutil.rmtree(root / "test" / "dog")


def empty_test_folder(root):
    no_test_folder(root)
    (root / "test" / "dog").mkdir()


def no_train_folder(root):
    shutil.rmtree(root / "train" / "dog")


def empty_train_folder(root):
    no_train_folder(root)
    (root / "train" / "dog").mkdir()


@pytest.mark.parametrize("spoil", [no_test_folder, empty_test_folder, no_train_folder, empty_train_folder])
def test_a_class_without_images_in_a_split_is_allowed_by_the_option_that_the_message_names(tree, tmp_path, spoil):
    spoil(tree)
    with pytest.raises(DataError, match="dog") as caught:
        [folder(tree, split, image_size=8) for split in ("train", "test")]
    assert "type:     --data.allow-empty-classes" in str(caught.value)
    data = DataConfig(source="folder", root=tree, allow_empty_classes=True)
    train, test = (load_images(data, split, seed=0, image_size=8) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("ant", "cat", "dog")
    emptied = train if "train" in spoil.__name__ else test
    assert set(emptied.labels.tolist()) == {0, 1}
    assert any(f"{'train' if emptied is train else 'test'}: no image of dog" in note for note in emptied.notes)
    assert image_facts(data).num_classes == 3

    with pytest.raises(DataError, match="dog") as caught:
        pack(str(tree), tmp_path / "out")
    assert "type:     --allow-empty-classes" in str(caught.value)
    assert run(["data", "pack", str(tree), str(tmp_path / "out"), "--allow-empty-classes"]) == 0
    assert open_packed(tmp_path / "out", "test").class_names == train.class_names


def test_a_class_that_is_spelled_otherwise_is_renamed(tree):
    (tree / "test" / "dog").rename(tree / "test" / "Dog's")
    with pytest.raises(DataError, match="different classes") as caught:
        list_images(tree, "train")
    assert "only in train: dog; only in test: Dog's" in str(caught.value)
    command = str(caught.value).split("type:     ")[1]
    assert shlex.split(command) == ["mv", str(tree / "test" / "Dog's"), str(tree / "test" / "dog")]
    subprocess.run(shlex.split(command), check=True)
    assert list_images(tree, "train").class_names == ("ant", "cat", "dog")


def test_a_split_without_any_image_is_refused_whatever_is_allowed(tree):
    for each in (tree / "test").iterdir():
        shutil.rmtree(each)
    (tree / "test" / "ant").mkdir()
    with pytest.raises(DataError, match=r"test has no image"):
        folder(tree, "test", image_size=8, allow_empty_classes=True)


def test_the_classes_of_a_packed_split_are_those_of_both_splits(tree, tmp_path):
    """Packed alone, a split without one of the classes would have other numbers for the rest."""
    shutil.rmtree(tree / "test" / "ant")
    with pytest.raises(DataError, match="different classes"):
        pack(str(tree), tmp_path / "out", splits=["test"])
    pack(str(tree), tmp_path / "out", splits=["test"], allow_empty_classes=True)
    assert open_packed(tmp_path / "out", "test").labels.tolist() == [1, 2]


@pytest.mark.parametrize("source", ["folder", "raw", "encoded"])
def test_a_grey_folder_stays_grey_unless_asked(tmp_path, source):
    root = make_tree(tmp_path / "in", ("a", "b"), counts={"train": 2, "test": 1}, mode="L", size=8)

    def channels(color, split="train"):
        if source == "folder":
            return folder(root, split, image_size=8, color=color).images.shape[1]
        out = tmp_path / f"{color}-{len(list(tmp_path.iterdir()))}"
        pack(str(root), out, form=source, color=color)
        return PackedImages(out / split)[0][0].shape[0]

    assert channels("auto") == channels("auto", "test") == channels("grey") == 1
    assert channels("rgb") == 3
    save_image(root / "test" / "a" / "colour.png", size=(8, 8))
    assert channels("auto", "test") == 1, "the training images decide for both"
    save_image(root / "train" / "b" / "colour.png", size=(8, 8))
    assert channels("auto") == channels("auto", "test") == 3
    assert channels("grey") == 1


def test_grey_pixels_are_those_of_the_files(tmp_path):
    root = make_tree(tmp_path / "in", ("a",), counts={"train": 2, "test": 1}, mode="L", size=8)
    images = folder(root, "train", image_size=8)
    with Image.open(root / "train" / "a" / "1.png") as image:
        assert np.array_equal(images.images[1, 0].numpy(), np.asarray(image))
    assert images.describe().startswith("2 images 1x8x8 uint8")
    assert images.mean == images.std == (0.5,)
    assert image_facts(DataConfig(source="folder", root=root)).channels == 1


def test_the_heads_of_grey_images_are_read_once_and_of_coloured_ones_hardly(tmp_path, monkeypatch):
    opened = []
    whole = decoding.opened
    monkeypatch.setattr(decoding, "opened", lambda source, *rest: opened.append(source) or whole(source, *rest))
    for mode, least, again in (("L", 40, 1), ("RGB", 0, 1)):
        root = make_tree(tmp_path / mode, ("a",), counts={"train": 40, "test": 1}, mode=mode, size=8)
        folder(root, "train", image_size=8)
        assert len(opened) >= 40 + least
        opened.clear()
        folder(root, "train", image_size=8)
        assert len(opened) == again
        opened.clear()


def test_files_that_are_not_read_are_counted_by_ending_and_said_once(tree, tmp_path, capsys):
    for name in ("a.heic", "b.HEIC", "notes.txt", "README", ".hidden", "Thumbs.db"):
        (tree / "train" / "cat" / name).write_text("x")
    save_image(tree / "train" / "lost.png")
    kinds = ".db (1), .heic (2), .txt (1), images in no class folder (1), no ending (1)"
    expected = f"{tree}/train: 6 files are left out: {kinds}"
    assert folder(tree, "train", image_size=8).notes[0] == expected
    assert not any("left out" in note for note in folder(tree, "test", image_size=8).notes)
    capsys.readouterr()
    pack(str(tree), tmp_path / "out")
    assert capsys.readouterr().err.count(expected) == 1
    for path in (tree / "train" / "dog").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"dog has no image(.|\n)*2 other files: \.heic"):
        folder(tree, "train", image_size=8)


def test_left_out_files_beside_masks_are_said(tmp_path):
    save_image(tmp_path / "train" / "images" / "a.png", mode="L")
    (tmp_path / "train" / "masks").mkdir()
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "train" / "masks" / "a.png")
    (tmp_path / "train" / "masks" / "b.npy").write_text("x")
    data = mask_folder(tmp_path, "train", {0: 0}, ("nothing",))
    assert data.notes == (f"{tmp_path}/train/masks: 1 file is left out: .npy (1)",)


def test_normalisation_with_other_images_numbers_is_said(tree, tmp_path):
    def says(images):
        return [note for note in images.notes if "normalised with CIFAR-10's mean and std" in note]

    images = folder(tree, "train", image_size=8)
    assert images.mean == CIFAR10_MEAN
    assert len(says(images)) == 1
    pack(str(tree), tmp_path / "out")
    assert len(says(open_packed(tmp_path / "out", "train"))) == 1
    own = DataConfig(source="folder", root=tree, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    images = load_images(own, "train", seed=0, image_size=8)
    assert not says(images)
    one = images.augment(images.fetch(images.labels[:1]), None)[0]
    expected = (images.images[:1] / 255 - images.images.new_tensor(0)).double()
    for c in range(3):
        assert one[0, c].double().sub((expected[0, c] - own.mean[c]) / own.std[c]).abs().max() < 1e-5
    packed = DataConfig(source="packed", root=tmp_path / "out", mean=own.mean, std=own.std)
    assert load_images(packed, "train", seed=0).std == own.std
    cifar = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert not says(folder(make_tree(tmp_path / "cifar", cifar, counts={"train": 1, "test": 1}), "train"))
    assert not load_images(DataConfig(source="synthetic"), "test", seed=0).notes


def test_as_many_numbers_as_channels(tree):
    with pytest.raises(DataError, match=r"differ in channels(.|\n)*3 numbers each"):
        load_images(DataConfig(source="folder", root=tree, mean=(0.1,), std=(0.4,)), "train", seed=0, image_size=8)
    for wrong in ({"mean": (0.5,)}, {"std": (0.5,)}, {"mean": (), "std": ()}, {"mean": (2.0,), "std": (1.0,)},
                  {"mean": (0.5,), "std": (0.0,)}, {"mean": (0.5,) * 3, "std": (0.5,)}, {"color": "gray"},
                  {"background": "pink"}):  # fmt: skip
        with pytest.raises(ConfigError, match=r"--data\.(mean|std|color|background)"):
            DataConfig(source="folder", **wrong)
    for unused in ({"color": "grey"}, {"background": "black"}, {"allow_empty_classes": True}):
        with pytest.raises(ConfigError, match=r"distkit data pack"):
            DataConfig(source="packed", **unused)


@pytest.mark.parametrize("name", [b"caf\xe9", "x" * 240, "né", "a b'c", "\x1b[31m"])
def test_any_name_of_a_class_and_of_an_image(tmp_path, capsys, name):
    """Latin-1, 244 bytes with the ending, spaces and quotes, an escape sequence."""
    name = os.fsdecode(name)
    root = make_tree(tmp_path / "in", (name, "other"), counts={"train": 2, "test": 1}, size=8)
    save_image(root / "train" / name / f"{name}.png", size=(8, 8))
    images = folder(root, "train", image_size=8)
    assert unicodedata.normalize("NFC", name) in images.class_names
    for form in ("raw", "encoded"):
        pack(str(root), tmp_path / form, form=form)
        packed = PackedImages(tmp_path / form / "train")
        names = [packed.split.sample_name(i) for i in range(len(packed))]
        assert f"{name}/{name}.png" in names
        packed[names.index(f"{name}/{name}.png")]
        assert run(["data", "show", str(tmp_path / form / "train")]) == 0
        out = capsys.readouterr().out
        out.encode()  # what a terminal is given can be encoded, and changes no colour
        assert "\x1b" not in out
    (root / "train" / name / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match="empty file"):
        folder(root, "train", image_size=8)


def test_one_class_in_two_spellings_is_one_class_or_named(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    root = make_tree(tmp_path / "in", ("a", decomposed), counts={"train": 2}, size=8)
    make_tree(root, ("a", composed), counts={"test": 1}, size=8)
    train, test = (folder(root, split, image_size=8) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("Café", "a") == (composed, "a")
    assert train.labels.tolist() == [0, 0, 1, 1]
    pack(str(root), tmp_path / "out")
    assert open_packed(tmp_path / "out", "train").class_names == (composed, "a")
    save_image(root / "train" / composed / "9.png", size=(8, 8))
    with pytest.raises(DataError, match=r"are one class, .* in two encodings \(NFC and NFD\)") as caught:
        folder(root, "train", image_size=8)
    assert "Cafe\\u0301" in str(caught.value)


def test_an_image_and_its_mask_may_spell_their_name_differently(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    save_image(tmp_path / "train" / "images" / f"{composed}.png", mode="L")
    path = tmp_path / "train" / "masks" / f"{decomposed}.png"
    path.parent.mkdir()
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    assert len(mask_folder(tmp_path, "train", {0: 0}, ("nothing",))) == 1
