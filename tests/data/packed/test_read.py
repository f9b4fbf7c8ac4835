"""Packed images as they are read: the same bits as the folder, and every damage named."""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.packing import CHUNK, save, small_tree, varied_tree
from torch.utils.data import DataLoader

from distkit.data import ImageDataset
from distkit.data.packed import sources as pack_sources
from distkit.data.packed.format import DIGESTS, MAGIC, PREFIX_BYTES, START, VERSION, header_from_json
from distkit.data.packed.pack import pack, show, verify
from distkit.data.packed.read import PackedFile, PackedImages, open_packed
from distkit.data.sets.image_folder import load_folder
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
    assert "train.pack: 60 raw images 3x16x16, 2 classes" in said
    for split in ("train", "test"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            images = open_packed(tmp_path / "out", split)
        assert isinstance(images, ImageDataset)
        expected, class_names = load_folder(small, split, tmp_path, None)
        assert images.images.equal(expected["images"])
        assert images.labels.equal(expected["labels"])
        assert images.class_names == class_names == ("ant", "bée")
        batch, labels = images.fetch(torch.tensor([3, 0, 3]))
        assert batch.equal(expected["images"][[3, 0, 3]])
        assert labels.tolist() == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.pack", "train.pack"]
    sample, label = PackedImages(tmp_path / "out" / "train.pack")[31]
    assert sample.equal(images_of(small / "train")[31])
    assert label == 1


def images_of(folder):
    return [decoded(path) for path in sorted(folder.rglob("*.*"))]


def test_nothing_is_read_when_a_raw_file_is_opened(small, tmp_path):
    pack(str(small), tmp_path)
    before = open_packed(tmp_path, "train").images
    assert before.data_ptr() % 4096 == 0
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "train.pack") in mapped


def test_encoded_images_keep_their_bytes(varied, tmp_path):
    assert "train.pack: 40 encoded images, 2 classes" in pack(str(varied), tmp_path / "out", chunk_bytes=CHUNK)
    images = open_packed(tmp_path / "out", "train")
    assert isinstance(images, PackedImages)
    files = sorted((path for path in varied.rglob("*.*")), key=str)
    assert len(images) == len(files) == 40
    for i, path in enumerate(files):
        assert images.file.sample_name(i) == str(path.relative_to(varied))
        assert images.file.read(*images.file.bounds(i)) == path.read_bytes()
        pixels, label = images[i]
        assert pixels.equal(decoded(path))
        assert label == (0 if i < 20 else 1)
    with pytest.raises(IndexError):
        images[40]
    assert verify(tmp_path / "out" / "train.pack").endswith("every byte as it was written")
    assert "classes: ant, sub" in show(tmp_path / "out" / "train.pack")


@pytest.mark.parametrize("form", ["raw", "encoded"])
def test_the_form_can_be_chosen(small, tmp_path, form):
    pack(str(small), tmp_path, form=form, splits=["test"])
    images = PackedImages(tmp_path / "test.pack")
    assert images.file.header.form == form
    for i, expected in enumerate(images_of(small / "test")):
        assert images[i][0].equal(expected)
    assert [path.name for path in tmp_path.glob("*.pack")] == ["test.pack"]


def test_images_of_one_large_size_stay_encoded(tmp_path):
    save(tmp_path / "in" / "a" / "0.png", size=(65, 20))
    assert "encoded" in pack(str(tmp_path / "in"), tmp_path / "out")
    save(tmp_path / "in" / "a" / "0.png", size=(64, 64))
    assert "raw images 3x64x64" in pack(str(tmp_path / "in"), tmp_path / "out", overwrite=True)


def test_worker_processes_get_the_same_images(varied, tmp_path):
    pack(str(varied), tmp_path)
    images = PackedImages(tmp_path / "train.pack", transform=torch.sum)
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
    monkeypatch.setattr(pack_sources, "torchvision_set", lambda *args: asked.append(args) or given)
    pack("mnist", tmp_path / "out", root=tmp_path / "root")
    assert asked == [("mnist", tmp_path / "root", "train"), ("mnist", tmp_path / "root", "test")]
    images = open_packed(tmp_path / "out", "test")
    assert images.images.equal(pixels)
    assert images.labels.equal(given.labels)
    assert (images.mean, images.std, images.class_names) == (given.mean, given.std, given.class_names)
    assert PackedFile(tmp_path / "out" / "test.pack").sample_name(7) == "mnist test 7"
    with pytest.raises(ConfigError, match="no image files"):
        pack("mnist", tmp_path / "out", form="encoded")


@pytest.fixture
def encoded_file(varied, tmp_path):
    pack(str(varied), tmp_path / "out", chunk_bytes=CHUNK)
    return tmp_path / "out" / "train.pack"


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_a_flipped_bit_in_any_section_is_found(encoded_file):
    header = PackedFile(encoded_file).header
    rng = np.random.default_rng(0)
    for name, place in header.sections.items():
        for byte in {0, place.num_bytes - 1, *rng.integers(place.num_bytes, size=3).tolist()}:
            flip(encoded_file, place.offset + byte)
            with pytest.raises(DistkitError) as caught:
                verify(encoded_file)
            assert caught.value.exit_code == 1
            wanted = f"chunk {byte // CHUNK} of {header.num_chunks} is damaged: images" if name == "images" else name
            assert wanted in str(caught.value)
            flip(encoded_file, place.offset + byte)
    verify(encoded_file)


def test_a_flipped_bit_in_the_header_is_found(encoded_file):
    length = START.unpack_from(encoded_file.read_bytes())[2]
    for offset in (0, 9, 13, 17, 30, PREFIX_BYTES, PREFIX_BYTES + 7, PREFIX_BYTES + length - 1):
        flip(encoded_file, offset)
        with pytest.raises(DataError) as caught:
            PackedFile(encoded_file)
        assert "train.pack" in str(caught.value)
        with pytest.raises(DistkitError) as caught:
            verify(encoded_file)
        assert caught.value.exit_code == 1
        flip(encoded_file, offset)
    PackedFile(encoded_file)


def test_a_flipped_bit_is_found_when_its_image_is_read(encoded_file):
    images = PackedImages(encoded_file)
    start, stop = images.file.bounds(25)
    place = images.file.header.sections["images"]
    flip(encoded_file, place.offset + (start + stop) // 2)
    with pytest.raises(DataError, match=r"sub/deep/05.png in .*train.pack is damaged"):
        images[25]
    assert images[24][1] == images[26][1] == 1
    with pytest.raises(DistkitError, match=r"images 24 to 26, sub/deep/04.png to sub/deep/06.png"):
        verify(encoded_file)
    flip(encoded_file, place.offset + (start + stop) // 2)
    flip(encoded_file, images.file.header.sections["offsets"].offset + 8 * 25 + 6)
    with pytest.raises(DataError, match="is damaged"):
        images[25]


@pytest.mark.parametrize("keep", [0, 100, 200, 5000, -1])
def test_a_truncated_file_is_no_file(encoded_file, keep):
    data = encoded_file.read_bytes()
    encoded_file.write_bytes(data[:keep])
    with pytest.raises(DataError) as caught:
        PackedFile(encoded_file)
    assert "type: " in str(caught.value)
    encoded_file.write_bytes(data + b"x")
    with pytest.raises(DataError, match="grown"):
        PackedFile(encoded_file)


def test_other_files_are_told_apart(encoded_file, tmp_path):
    with pytest.raises(DataError, match="no packed file") as caught:
        open_packed(tmp_path / "nowhere", "train")
    assert f"distkit data pack FOLDER {tmp_path / 'nowhere'}" in str(caught.value)
    with pytest.raises(DataError, match=r"train\.pack"):
        open_packed(encoded_file.parent, "test")
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(DataError):
            PackedFile(path)
        with pytest.raises(DataError):
            verify(path)
    newer = bytearray(encoded_file.read_bytes())
    newer[8:12] = (VERSION + 1).to_bytes(4, "little")
    (tmp_path / "newer").write_bytes(newer)
    with pytest.raises(DataError, match="newer distkit") as caught:
        PackedFile(tmp_path / "newer")
    assert f"version {VERSION + 1}" in str(caught.value)
    (tmp_path / "jpeg").write_bytes(b"\xff\xd8" * 100)
    with pytest.raises(DataError, match="is no packed file"):
        PackedFile(tmp_path / "jpeg")


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
    assert not list(tmp_path.glob("*checked/*.pack"))


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
    with pytest.raises(DataError, match=r"07.png has another size"):
        pack(str(small), out, form="raw")
    assert "encoded" in pack(str(small), out / "auto", splits=["train"])
    shutil.rmtree(small / "test" / "ant")
    with pytest.raises(DataError, match="different classes"):
        pack(str(small), out)
    shutil.rmtree(small / "test")
    with pytest.raises(DataError, match=r"no folder .*test"):
        pack(str(small), out, splits=["test"])
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be made"):
        pack(str(small), tmp_path / "file" / "out")


def test_the_file_is_as_documented(encoded_file):
    """A reader of twenty lines, written from the description alone."""
    data = encoded_file.read_bytes()
    magic, version, length, size = START.unpack_from(data)
    assert (magic, version, size) == (MAGIC, 1, len(data))
    header = header_from_json(data[PREFIX_BYTES : PREFIX_BYTES + length])
    assert DIGESTS.unpack_from(data, START.size)[1:] == (header.plan_digest(), bytes(40))
    found = {}
    end = PREFIX_BYTES + length
    for name, place in header.sections.items():
        assert place.offset % 4096 == 0
        assert place.offset >= end
        assert not any(data[end : place.offset])
        end = place.offset + place.num_bytes
        found[name] = np.frombuffer(data[place.offset : end], place.dtype).reshape(place.shape)
    assert end == len(data)
    images, offsets = found["images"].tobytes(), found["offsets"]
    assert offsets[0] == 0
    assert offsets[-1] == len(images)
    assert Image.open(io.BytesIO(images[offsets[39] :])).size == (30, 39)
    paths, begin = found["paths"].tobytes(), found["path_offsets"]
    assert paths[begin[39] : begin[40]] == b"sub/deep/19.png"
    assert b"pickle" not in data
