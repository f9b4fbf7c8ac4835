"""Packed images as they are read: the same bits as the folder, and every damage named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from support.packing import SHARD, save, small_tree, varied_tree
from torch.utils.data import DataLoader

from distkit.data import ImageDataset
from distkit.data.packed import pack as packing
from distkit.data.packed.format import VERSION
from distkit.data.packed.pack import pack, show, verify
from distkit.data.packed.plan import plan_folder
from distkit.data.packed.read import PackedImages, PackedSplit, open_packed
from distkit.data.packed.write import write_packed
from distkit.data.sets.image_folder import class_folders, list_split
from distkit.data.sources import folder
from distkit.errors import ConfigError, DataError, DistkitError


@pytest.fixture
def small(tmp_path):
    return small_tree(tmp_path)


@pytest.fixture
def varied(tmp_path):
    return varied_tree(tmp_path)


def decoded(path):
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1).copy())


def test_raw_images_are_those_of_the_folder(small, tmp_path):
    said = pack(str(small), tmp_path / "out")
    assert "train: 60 raw images 3x16x16, 2 classes" in said
    for split in ("train", "test"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            images = open_packed(tmp_path / "out", split)
        assert isinstance(images, ImageDataset)
        expected = folder(small, split, tmp_path, None)
        assert images.images.equal(expected.images)
        assert images.labels.equal(expected.labels)
        assert images.class_names == expected.class_names == ("ant", "bée")
        batch, labels = images.fetch(torch.tensor([3, 0, 3]))
        assert batch.equal(expected.images[[3, 0, 3]])
        assert labels.tolist() == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "train"]
    sample, label = PackedImages(tmp_path / "out" / "train")[31]
    assert sample.equal(images_of(small / "train")[31])
    assert label == 1


def images_of(folder):
    return [decoded(path) for path in sorted(folder.rglob("*.*"))]


def test_nothing_is_read_when_a_raw_file_is_opened(small, tmp_path):
    pack(str(small), tmp_path)
    before = open_packed(tmp_path, "train").images
    assert before.shape == (60, 3, 16, 16)
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "train") in mapped


def test_encoded_images_keep_their_bytes(varied, tmp_path):
    assert "train: 40 encoded images, 2 classes" in pack(str(varied), tmp_path / "out", shard_bytes=SHARD)
    images = open_packed(tmp_path / "out", "train")
    assert isinstance(images, PackedImages)
    files = sorted((path for path in varied.rglob("*.*")), key=str)
    assert len(images) == len(files) == 40
    for i, path in enumerate(files):
        assert images.split.sample_name(i) == str(path.relative_to(varied))
        assert images.split.read(i) == path.read_bytes()
        pixels, label = images[i]
        assert pixels.equal(decoded(path))
        assert label == (0 if i < 20 else 1)
    with pytest.raises(IndexError):
        images[40]
    assert verify(tmp_path / "out" / "train").endswith("every byte as it was written")
    assert "classes: ant, sub" in show(tmp_path / "out" / "train")


@pytest.mark.parametrize("form", ["raw", "encoded"])
def test_the_form_can_be_chosen(small, tmp_path, form):
    pack(str(small), tmp_path, form=form, splits=["test"])
    images = PackedImages(tmp_path / "test")
    assert images.split.index.form == form
    for i, expected in enumerate(images_of(small / "test")):
        assert images[i][0].equal(expected)
    assert [path.parent.name for path in tmp_path.glob("*/index.json")] == ["test"]


def test_images_of_one_large_size_stay_encoded(tmp_path):
    save(tmp_path / "in" / "a" / "0.png", size=(65, 20))
    assert "encoded" in pack(str(tmp_path / "in"), tmp_path / "out")
    save(tmp_path / "in" / "a" / "0.png", size=(64, 64))
    assert "raw images 3x64x64" in pack(str(tmp_path / "in"), tmp_path / "out", overwrite=True)


def test_worker_processes_get_the_same_images(varied, tmp_path):
    pack(str(varied), tmp_path)
    images = PackedImages(tmp_path / "train", transform=torch.sum)
    expected = [int(images[i][0]) for i in range(len(images))]
    copy = pickle.loads(pickle.dumps(images))
    assert [int(value) for value, _ in copy] == expected
    assert len(pickle.dumps(images)) < 1000
    loader = DataLoader(images, 8, num_workers=1, multiprocessing_context="fork")
    assert [int(value) for values, _ in loader for value in values] == expected
    save(varied / "ant" / "00.jpg", 99)
    state = pickle.dumps(images)
    pack(str(varied), tmp_path, overwrite=True)
    with pytest.raises(DataError, match="replaced while"):
        pickle.loads(state)
    assert int(images[0][0]) == expected[0], "an open file keeps its bytes"


def test_a_set_by_name(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (50, 1, 28, 28), np.uint8))
    given = ImageDataset(pixels, torch.arange(50) % 10, class_names=tuple("0123456789"), source="x", mean=(0.1307,),
                         std=(0.3081,))  # fmt: skip
    asked = []
    monkeypatch.setattr(packing, "torchvision_set", lambda *args: asked.append(args) or given)
    pack("mnist", tmp_path / "out", root=tmp_path / "root")
    assert asked == [("mnist", tmp_path / "root", "train"), ("mnist", tmp_path / "root", "test")]
    images = open_packed(tmp_path / "out", "test")
    assert images.images.equal(pixels)
    assert images.labels.equal(given.labels)
    assert (images.mean, images.std, images.class_names) == (given.mean, given.std, given.class_names)
    assert PackedSplit(tmp_path / "out" / "test").sample_name(7) == "mnist test 7"
    with pytest.raises(ConfigError, match="no image files"):
        pack("mnist", tmp_path / "out", form="encoded")


@pytest.fixture
def encoded(varied, tmp_path):
    pack(str(varied), tmp_path / "out", shard_bytes=SHARD)
    return tmp_path / "out" / "train"


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_a_flipped_bit_anywhere_is_found(encoded):
    rng = np.random.default_rng(0)
    for path in sorted(encoded.glob("images-*"))[::3]:
        size = path.stat().st_size
        for byte in {0, 9, size - 1, *rng.integers(size, size=6).tolist()}:
            flip(path, byte)
            with pytest.raises(DistkitError, match=path.name.replace(".", "[.]") + "|labels") as caught:
                verify(encoded)
            assert caught.value.exit_code == 1
            flip(path, byte)
    verify(encoded)


def test_a_flipped_bit_in_the_index_is_found(encoded):
    index = encoded / "index.json"
    for offset in (0, 9, 30, 200, index.stat().st_size - 10):
        flip(index, offset)
        with pytest.raises(DataError, match=r"index\.json is damaged"):
            PackedSplit(encoded)
        with pytest.raises(DistkitError) as caught:
            verify(encoded)
        assert caught.value.exit_code == 1
        flip(index, offset)
    PackedSplit(encoded)


def test_a_flipped_bit_is_found_when_its_image_is_read(encoded):
    images = PackedImages(encoded)
    shard, row = images.split._locate(25)
    start, stop = shard.tensors["offsets"][row : row + 2].tolist()
    middle = shard._images + (start + stop) // 2
    flip(shard.path, middle)
    with pytest.raises(DataError, match=r"sub/deep/05.png in .*train.* is damaged"):
        images[25]
    assert images[24][1] == images[26][1] == 1
    with pytest.raises(DistkitError, match=r"is damaged: images sub/deep/05.png\n"):
        verify(encoded)
    flip(shard.path, middle)
    assert images[25][1] == 1


@pytest.mark.parametrize("keep", [0, 100, 200, 5000, -1])
def test_a_truncated_file_is_no_file(encoded, keep):
    path = max(encoded.glob("images-*"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(DataError) as caught:
        PackedSplit(encoded)
    assert "type: " in str(caught.value)
    path.write_bytes(data + b"x")
    with pytest.raises(DataError, match="grown"):
        PackedSplit(encoded)
    path.unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        PackedSplit(encoded)


def rewrite_index(folder, **changes):
    values = json.loads((folder / "index.json").read_text())
    del values["sha256"]
    values |= changes
    digest = hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()
    (folder / "index.json").write_text(json.dumps({**values, "sha256": digest}))
    return values


def test_a_hostile_index_is_refused(encoded):
    shards = rewrite_index(encoded)["shards"]
    escape = [{**shards[0], "file": "../../outside"}, *shards[1:]]
    huge = [{**shards[0], "num_samples": 1 << 60}, *shards[1:]]
    for changes in ({"shards": escape}, {"shards": huge}, {"shards": []}, {"num_samples": 41}, {"extra": 1},
                    {"form": "raw"}, {"sample_shape": [3, 1 << 40, 1]}, {"shards": 3}, {"background": "pink"},
                    {"background": 3}, {"channels": 2}, {"notes": [3]}):  # fmt: skip
        before = (encoded / "index.json").read_text()
        rewrite_index(encoded, **changes)
        with pytest.raises(DataError, match=r"index\.json is damaged"):
            PackedSplit(encoded)
        (encoded / "index.json").write_text(before)
    for text in ("[]", "3", "[" * 100_000, ""):
        (encoded / "index.json").write_text(text)
        with pytest.raises(DataError, match=r"index\.json is damaged"):
            PackedSplit(encoded)


def test_a_hostile_shard_is_refused(encoded):
    path = sorted(encoded.glob("images-*"))[0]
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    headers = [b"\xff" * 8 + whole[8:], (1 << 40).to_bytes(8, "little") + whole[8:]]
    for name, entry in (("labels", {"data_offsets": [0, 1 << 50]}), ("images", {"shape": [1 << 50]}),
                        ("crc", {"dtype": "F32"}), ("labels", {"dtype": "F64"})):  # fmt: skip
        changed = {**header, name: {**header[name], **entry}}
        text = json.dumps(changed, separators=(",", ":")).encode()
        headers.append((whole[:8] + text.ljust(size) + whole[8 + size :])[: len(whole)])
    for data in headers:
        path.write_bytes(data)
        with pytest.raises(DataError, match=path.name):
            PackedSplit(encoded)


def test_shards_of_another_pack_are_told_apart(encoded, varied, tmp_path):
    path = sorted(encoded.glob("images-*"))[0]
    os.utime(varied / "ant" / "00.jpg", ns=(1, 1))
    pack(str(varied), tmp_path / "other", shard_bytes=SHARD)
    path.write_bytes((tmp_path / "other" / "train" / path.name).read_bytes())
    with pytest.raises(DataError, match="does not belong to the index"):
        PackedSplit(encoded)


def test_several_shards_are_read_as_one_tensor(small, tmp_path):
    pack(str(small), tmp_path / "one")
    pack(str(small), tmp_path / "many", shard_bytes=SHARD)
    one, many = (open_packed(tmp_path / name, "train") for name in ("one", "many"))
    assert len(list((tmp_path / "many" / "train").glob("images-*"))) == 12
    for indices in (torch.arange(60), torch.randperm(60), torch.tensor([59, 0, 0, 31]), torch.tensor([], dtype=int)):
        assert all(a.equal(b) for a, b in zip(one.fetch(indices), many.fetch(indices), strict=True))
    assert one.fingerprint == many.fingerprint
    assert one.nbytes == many.nbytes
    assert many.images.narrow(0, 3, 9).equal(one.images[3:12])
    assert one.normalized(range(70)).equal(many.normalized(range(70)))
    assert many.to("cpu").images is many.images
    assert many.images.to("meta").shape == one.images.shape
    for wrong in (60, -1):
        with pytest.raises(IndexError):
            many.fetch(torch.tensor([wrong]))


def test_other_folders_are_told_apart(encoded, tmp_path):
    with pytest.raises(DataError, match="no packed split") as caught:
        open_packed(tmp_path / "nowhere", "train")
    assert f"distkit data pack FOLDER {tmp_path / 'nowhere'}" in str(caught.value)
    with pytest.raises(DataError, match=r"out/train"):
        open_packed(encoded.parent, "test")
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(DataError):
            PackedSplit(path)
        with pytest.raises(DataError):
            verify(path)
    rewrite_index(encoded, version=VERSION + 1)
    with pytest.raises(DataError, match="newer distkit") as caught:
        PackedSplit(encoded)
    assert f"version {VERSION + 1}" in str(caught.value)
    (encoded / "index.json").unlink()
    with pytest.raises(DataError, match="files of an unfinished pack"):
        open_packed(encoded.parent, "train")


def test_an_image_that_was_never_whole_has_its_path(varied, tmp_path):
    path = varied / "ant" / "03.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    pack(str(varied), tmp_path / "out")
    images = open_packed(tmp_path / "out", "train")
    with pytest.raises(DataError, match=r"ant/03.jpg in .* cannot be decoded"):
        images[3]
    with pytest.raises(DataError, match=r"ant/03.jpg cannot be decoded"):
        pack(str(varied), tmp_path / "checked", check=True)
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"ant/03.jpg cannot be decoded"):
        pack(str(varied), tmp_path / "unchecked")
    assert not list(tmp_path.glob("*checked/*/*"))


def test_the_source_must_be_as_it_should(small, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no folder") as caught:
        pack("cifar11", out)
    assert "cifar10" in str(caught.value)
    with pytest.raises(ConfigError, match="taken for a class"):
        pack(str(small / "train"), small / "train" / "out")
    with pytest.raises(DataError, match="one split"):
        pack(str(small / "train"), out, splits=["train", "test"])
    with pytest.raises(ConfigError, match="--workers"):
        pack(str(small), out, num_workers=0)
    save(small / "train" / "ant" / "07.png", size=(9, 9))
    with pytest.raises(DataError, match=r"07.png differs in size"):
        pack(str(small), out, form="raw")
    assert "encoded" in pack(str(small), out / "auto", splits=["train"])
    shutil.rmtree(small / "test" / "ant")
    with pytest.raises(DataError, match="different classes"):
        pack(str(small), out)
    shutil.rmtree(small / "test")
    with pytest.raises(DataError, match=r"no folder .*test"):
        pack(str(small), out, splits=["test"])
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        pack(str(small), tmp_path / "file" / "out")


def test_the_files_are_as_documented(encoded):
    """A reader of a few lines, written from the description alone."""
    index, count = json.loads((encoded / "index.json").read_text()), 0
    for entry in index["shards"]:
        tensors = load_file(encoded / entry["file"])
        images, offsets, begin = tensors["images"].tobytes(), tensors["offsets"], tensors["path_offsets"]
        assert offsets[0] == 0
        assert offsets[-1] == len(images)
        for row in range(entry["num_samples"]):
            data = images[offsets[row] : offsets[row + 1]]
            assert zlib.crc32(data) == int.from_bytes(tensors["crc"][row].tobytes(), "little")
            path = tensors["paths"].tobytes()[begin[row] : begin[row + 1]]
            count += 1
        assert b"pickle" not in (encoded / entry["file"]).read_bytes()
    assert count == index["num_samples"] == 40
    assert path == b"sub/deep/19.png"
    assert Image.open(io.BytesIO(data)).size == (30, 39)


@pytest.mark.parametrize("form", ["raw", "encoded"])
def test_a_split_of_the_first_version_is_read(small, tmp_path, form):
    listing = list_split(small / "train", class_folders(small / "train"))
    plan = plan_folder(listing, "train", (3, 16, 16) if form == "raw" else None)
    plan = replace(plan, index=replace(plan.index, version=1))
    write_packed(tmp_path / "train", plan, num_workers=1)
    written = json.loads((tmp_path / "train" / "index.json").read_text())
    assert not {"color", "channels", "background", "notes"} & written.keys()
    images = PackedImages(tmp_path / "train")
    assert images[31][0].equal(images_of(small / "train")[31])
    assert images.notes == ()
    assert verify(tmp_path / "train").endswith("every byte as it was written")
