"""Fingerprints: the same data give the same one wherever they lie, other data another."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch
from PIL import Image
from support.packing import small_tree, varied_tree

from distkit.data import (
    ImageDataset,
    MapDataset,
    MaskDataset,
    PackedImages,
    TokenDataset,
    as_dataset,
    open_packed,
    synthetic,
)
from distkit.data.packed.pack import pack
from distkit.data.sets import fingerprint as module
from distkit.data.sets.fingerprint import fingerprint, fingerprint_of
from distkit.data.sources import folder
from distkit.errors import DataError


def images(pixels, labels):
    return ImageDataset(pixels, labels, class_names=("a", "b"), source="a test")


def test_a_pixel_a_label_a_shape_and_the_order_count():
    pixels = torch.arange(6 * 3 * 4 * 5).view(6, 3, 4, 5).remainder(251).to(torch.uint8)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    one = images(pixels, labels).fingerprint
    assert len(one) == 16
    changed = pixels.clone()
    changed[3, 1, 2, 0] += 1
    others = [
        images(changed, labels),
        images(pixels, 1 - labels),
        images(pixels.reshape(6, 3, 5, 4), labels),
        images(pixels[:5], labels[:5]),
        images(pixels.flip(0), labels.flip(0)),
    ]
    assert len({one, *(other.fingerprint for other in others)}) == 6
    assert images(pixels.clone(), labels.clone()).fingerprint == one
    assert images(pixels.contiguous(memory_format=torch.channels_last), labels).fingerprint == one


def test_masks_count():
    pixels, masks = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.uint8)
    one = MaskDataset(pixels, masks, class_names=("a", "b"), source="a test").fingerprint
    masks[1, 3, 3] = 1
    assert MaskDataset(pixels, masks, class_names=("a", "b"), source="a test").fingerprint != one


def test_a_folder_and_its_packed_copy_are_the_same_data(tmp_path):
    tree = small_tree(tmp_path)
    pack(str(tree), tmp_path / "out")
    assert folder(tree, "train", tmp_path, None).fingerprint == open_packed(tmp_path / "out", "train").fingerprint
    assert folder(tree, "train", tmp_path, None).fingerprint != open_packed(tmp_path / "out", "test").fingerprint


def test_encoded_images_packed_again_are_the_same_data(tmp_path):
    tree = tmp_path / "tree"
    for split in ("train", "test"):
        shutil.copytree(varied_tree(tmp_path), tree / split)
    pack(str(tree), tmp_path / "one")
    path = tree / "train" / "ant" / "00.jpg"
    os.utime(path, (time.time() + 60, time.time() + 60))
    pack(str(tree), tmp_path / "two")
    one, two = (as_dataset(open_packed(tmp_path / name, "train")) for name in ("one", "two"))
    assert isinstance(one, MapDataset)
    assert isinstance(one.samples, PackedImages)
    assert fingerprint_of(one) == fingerprint_of(two) is not None
    with Image.open(path) as image:
        image.rotate(180).save(path)
    pack(str(tree), tmp_path / "three")
    assert fingerprint_of(as_dataset(open_packed(tmp_path / "three", "train"))) != fingerprint_of(one)


def test_of_large_data_the_first_and_the_last_block_count(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    monkeypatch.setattr(module, "BLOCKS", 3)
    values = torch.zeros(1000, dtype=torch.uint8)

    def changed(place):
        other = values.clone()
        other[place] = 1
        return fingerprint(other)

    one = fingerprint(values)
    assert one not in {changed(0), changed(999)}
    assert one == changed(200)
    assert fingerprint(values[:0]) != one


def test_a_cifar_costs_a_fraction_of_a_second():
    dataset = synthetic("train", 0, num_train=1000)
    large = replace_images(dataset, 50_000)
    start = time.perf_counter()
    large.fingerprint  # noqa: B018  # it is a property, and its time is what counts
    assert time.perf_counter() - start < 2


def replace_images(dataset, count):
    pixels = dataset.images.repeat(count // len(dataset), 1, 1, 1)
    labels = dataset.labels.repeat(count // len(dataset))
    return ImageDataset(pixels, labels, class_names=dataset.class_names, source="a test")


def test_sets_that_say_nothing_and_sets_that_say_nonsense(tmp_path):
    class Own:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.zeros(2), index

    assert fingerprint_of(as_dataset(Own())) is None
    Own.fingerprint = "mine"
    assert fingerprint_of(as_dataset(Own())) == "mine"
    Own.fingerprint = 3
    with pytest.raises(DataError, match="fingerprint of Own is not a string"):
        fingerprint_of(as_dataset(Own()))
    (tmp_path / "t.bin").write_bytes(bytes(100))
    tokens = TokenDataset(tmp_path / "t.bin", 4)
    assert fingerprint_of(tokens) == tokens.fingerprint
