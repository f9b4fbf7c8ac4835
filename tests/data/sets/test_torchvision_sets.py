"""torchvision's sets: by name, downloaded once and verified at every start, and any other as an object."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from distkit.data import CIFAR10_MEAN, as_dataset, cifar10
from distkit.data.sets.torchvision_sets import (
    FASHION_MNIST_STD,
    MNIST_MEAN,
    TORCHVISION_SETS,
    TensorSamples,
    TorchvisionSet,
    resident_images,
    torchvision_set,
)
from distkit.errors import DataError


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Says nothing."""


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A folder served over HTTP, and its address."""
    folder = tmp_path / "upstream"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def small_cifar(upstream, monkeypatch):
    """torchvision's CIFAR10 class, told of an archive with five images a file; returns the archive."""
    from torchvision.datasets import CIFAR10

    folder, address = upstream
    source = folder / CIFAR10.base_folder
    source.mkdir()
    rng = np.random.default_rng(0)
    lists = {"train_list": [f"data_batch_{i}" for i in range(1, 6)], "test_list": ["test_batch"]}
    for attribute, names in lists.items():
        for name in names:
            entry = {"data": rng.integers(0, 256, (5, 3072), np.uint8), "labels": [0, 1, 2, 3, 9]}
            (source / name).write_bytes(pickle.dumps(entry))
        monkeypatch.setattr(CIFAR10, attribute, [[name, md5(source / name)] for name in names])
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"name {i}" for i in range(10)]}))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(source / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    archive = folder / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    monkeypatch.setattr(CIFAR10, "url", f"{address}/{CIFAR10.filename}")
    return archive


def go_offline(monkeypatch):
    from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    for family in (MNIST, FashionMNIST):
        monkeypatch.setattr(family, "mirrors", ["http://127.0.0.1:9/"])


def test_cifar10_is_downloaded_once_and_then_read_offline(small_cifar, tmp_path, monkeypatch):
    root = tmp_path / "a" / "root"
    train = cifar10(root, "train")
    assert train.images.shape == (25, 3, 32, 32)
    assert train.class_names[9] == "name 9"
    assert train.mean == CIFAR10_MEAN
    raw = pickle.loads((root / "cifar-10-batches-py" / "data_batch_1").read_bytes())
    assert train.images[4].flatten().tolist() == raw["data"][4].tolist()
    assert train.labels[:5].tolist() == raw["labels"]
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]
    go_offline(monkeypatch)
    assert len(cifar10(root, "test")) == 5
    assert cifar10(root, "train").images.equal(train.images)


def test_an_archive_that_is_there_is_used_offline(small_cifar, tmp_path, monkeypatch):
    go_offline(monkeypatch)
    (tmp_path / "root").mkdir()
    small_cifar.rename(tmp_path / "root" / small_cifar.name)
    assert len(cifar10(tmp_path / "root", "train")) == 25


def expect_help(root):
    with pytest.raises(DataError) as caught:
        cifar10(root, "train")
    assert caught.value.exit_code == 2
    assert "--data.source folder --data.root DIR" in str(caught.value)
    assert "--data.source synthetic" in str(caught.value)


def test_without_a_network_the_other_sources_are_named(small_cifar, tmp_path, monkeypatch):
    go_offline(monkeypatch)
    expect_help(tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_half_an_archive_is_not_taken(small_cifar, tmp_path):
    small_cifar.write_bytes(small_cifar.read_bytes()[:1000])
    expect_help(tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []
    root = tmp_path / "root"
    (root / small_cifar.name).write_bytes(b"half")
    expect_help(root)
    assert (root / small_cifar.name).read_bytes() == b"half"


def test_a_damaged_copy_is_downloaded_again(small_cifar, tmp_path, monkeypatch):
    root = tmp_path / "root"
    expected = cifar10(root, "train").images
    batch = root / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1] + b"!")
    assert cifar10(root, "train").images.equal(expected)
    batch.unlink()
    go_offline(monkeypatch)
    expect_help(root)


def test_a_root_that_is_a_file_is_refused(small_cifar, tmp_path):
    (tmp_path / "root").write_text("")
    expect_help(tmp_path / "root")


@pytest.fixture
def small_cifar100(upstream, monkeypatch):
    from torchvision.datasets import CIFAR100

    folder, address = upstream
    source = folder / CIFAR100.base_folder
    source.mkdir()
    for attribute, name, count in (("train_list", "train", 6), ("test_list", "test", 3)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), np.uint8)
        (source / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": list(range(99, 99 - count, -1))}))
        monkeypatch.setattr(CIFAR100, attribute, [[name, md5(source / name)]])
    (source / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"name {i}" for i in range(100)]}))
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5(source / "meta")})
    archive = folder / CIFAR100.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, CIFAR100.base_folder)
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(archive))
    monkeypatch.setattr(CIFAR100, "url", f"{address}/{CIFAR100.filename}")
    return archive


def test_cifar100_has_its_fine_labels(small_cifar100, tmp_path):
    train = torchvision_set("cifar100", tmp_path / "root", "train")
    assert train.images.shape == (6, 3, 32, 32)
    assert train.labels.tolist() == [99, 98, 97, 96, 95, 94]
    assert train.num_classes == 100
    assert train.source.startswith("CIFAR-100 in ")
    assert len(torchvision_set("cifar100", tmp_path / "root", "test")) == 3


def idx(array):
    """The format of MNIST's files."""
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def serve_mnist(class_name, upstream, monkeypatch):
    """Tell a class of the MNIST family of four small files; returns the training pixels."""
    from torchvision import datasets

    opener = getattr(datasets, class_name)
    folder, address = upstream
    rng = np.random.default_rng(1)
    resources, kept = [], {}
    for prefix, count in (("train", 12), ("t10k", 7)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28), np.uint8)),
            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
        ):
            file = folder / f"{prefix}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(idx(array)))
            resources.append((file.name, md5(file)))
            kept[prefix, kind] = array
    monkeypatch.setattr(opener, "resources", resources)
    monkeypatch.setattr(opener, "mirrors", [f"{address}/"])
    return kept["train", "images-idx3"]


@pytest.mark.parametrize(("name", "class_name"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_the_mnist_family_is_downloaded_once_and_then_read_offline(name, class_name, upstream, tmp_path, monkeypatch):
    pixels = serve_mnist(class_name, upstream, monkeypatch)
    root = tmp_path / "a" / "root"
    train = torchvision_set(name, root, "train")
    assert train.images.equal(torch.from_numpy(pixels[:, None]))
    assert train.labels.tolist() == [*range(10), 0, 1]
    assert train.labels.dtype == torch.int64
    assert train.num_classes == 10
    assert [path.name for path in root.iterdir()] == [class_name]
    go_offline(monkeypatch)
    assert len(torchvision_set(name, root, "test")) == 7
    normal = train.augment(train.fetch(torch.arange(12)), None)[0]
    mean, std = TORCHVISION_SETS[name].mean, TORCHVISION_SETS[name].std
    torch.testing.assert_close(normal, (train.images / 255 - mean[0]) / std[0])
    assert (TORCHVISION_SETS["mnist"].mean, TORCHVISION_SETS["fashion_mnist"].std) == (MNIST_MEAN, FASHION_MNIST_STD)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def spoil_the_head(path):
    """Without its archive only the form of a file can be checked."""
    path.with_name(path.name + ".gz").rename(path.with_name("kept"))
    path.write_bytes(b"\0\0\x07\x03" + path.read_bytes()[4:])


def test_a_damaged_mnist_file_without_its_archive_is_downloaded_again(upstream, tmp_path, monkeypatch):
    pixels = serve_mnist("MNIST", upstream, monkeypatch)
    torchvision_set("mnist", tmp_path, "train")
    spoil_the_head(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte")
    assert torchvision_set("mnist", tmp_path, "train").images.equal(torch.from_numpy(pixels[:, None]))


@pytest.mark.parametrize("damage", [flip_a_bit, cut, lambda path: path.unlink()])
def test_damaged_mnist_files_are_made_again_from_the_archives(damage, upstream, tmp_path, monkeypatch):
    pixels = serve_mnist("MNIST", upstream, monkeypatch)
    torchvision_set("mnist", tmp_path, "train")
    go_offline(monkeypatch)
    raw = tmp_path / "MNIST" / "raw"
    damage(raw / "train-images-idx3-ubyte")
    assert torchvision_set("mnist", tmp_path, "train").images.equal(torch.from_numpy(pixels[:, None]))
    damage(raw / "train-labels-idx1-ubyte")
    flip_a_bit(raw / "train-labels-idx1-ubyte.gz")
    with pytest.raises(DataError, match="MNIST cannot be downloaded"):
        torchvision_set("mnist", tmp_path, "train")
    assert not list(tmp_path.glob(".download*"))


def test_mnist_without_a_network_names_the_other_sources(upstream, tmp_path, monkeypatch):
    serve_mnist("MNIST", upstream, monkeypatch)
    go_offline(monkeypatch)
    with pytest.raises(DataError, match=r"--data\.source folder --data\.root DIR, or --data\.source synthetic"):
        torchvision_set("mnist", tmp_path / "root", "train")
    assert list((tmp_path / "root").iterdir()) == []


def test_another_set_is_one_row(upstream, tmp_path, monkeypatch):
    serve_mnist("KMNIST", upstream, monkeypatch)
    row = TorchvisionSet("Kuzushiji-MNIST", "KMNIST", "KMNIST", (0.19,), (0.35,))
    monkeypatch.setitem(TORCHVISION_SETS, "kmnist", row)
    assert torchvision_set("kmnist", tmp_path, "train").class_names[0] == "o"


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(DataError, match=r"type: +fashion_mnist"):
        torchvision_set("fashion-mnist", None, "train")


class Pictures:
    """What a torchvision set without a transform gives."""

    def __init__(self, mode="RGB", sizes=((8, 6),) * 4, targets=(0, 1, 2, 1)):
        self.mode, self.sizes, self.targets = mode, sizes, targets

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 256, (*self.sizes[index][::-1], 3), np.uint8)
        return Image.fromarray(pixels).convert(self.mode), self.targets[index]


def test_fake_data_of_torchvision_is_collated():
    from torchvision.datasets import FakeData

    source = FakeData(6, (3, 10, 12), num_classes=4)
    images, labels = as_dataset(TensorSamples(source)).fetch(torch.tensor([4, 1, 4]))
    assert images.shape == (3, 3, 10, 12)
    assert images.dtype == torch.uint8
    assert images[1].permute(1, 2, 0).numpy().tobytes() == source[1][0].tobytes()
    assert labels.tolist() == [source[i][1] for i in (4, 1, 4)]


def test_a_set_with_a_transform_is_a_set_as_it_is():
    from torchvision.datasets import FakeData
    from torchvision.transforms import v2

    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    images, labels = as_dataset(FakeData(6, (3, 10, 12), transform=transform)).fetch(torch.tensor([0, 5]))
    assert images.shape == (2, 3, 10, 12)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("RGB", 3), ("P", 3), ("RGBA", 3)])
def test_pictures_of_every_mode(mode, channels):
    image, target = TensorSamples(Pictures(mode))[2]
    assert image.shape == (channels, 6, 8)
    assert image.dtype == torch.uint8
    assert target == 2


def test_masks_in_targets_keep_their_ids():
    mask = Image.fromarray(np.array([[0, 7], [255, 1]], np.uint8)).convert("P")
    mask.putpalette([i % 256 for i in range(768)])
    view = TensorSamples([(Image.new("L", (2, 2)), (mask, 3))])
    image, (ids, number) = view[0]
    assert image.tolist() == [[[0, 0], [0, 0]]]
    assert ids.tolist() == np.asarray(mask).tolist()
    assert ids.dtype == torch.int64
    assert number == 3
    assert TensorSamples([Image.new("RGB", (2, 3))])[0].shape == (3, 3, 2)


def test_any_set_becomes_resident():
    pictures = Pictures()
    images = resident_images(pictures, source="pictures", mean=(0.5,) * 3, std=(0.25,) * 3)
    assert images.images.shape == (4, 3, 6, 8)
    assert images.images[3].permute(1, 2, 0).numpy().tobytes() == pictures[3][0].tobytes()
    assert images.labels.tolist() == [0, 1, 2, 1]
    assert images.class_names == ("0", "1", "2")
    pictures.classes = ["a", "b", "c", "d"]
    assert resident_images(pictures, source="", mean=(0.5,) * 3, std=(0.25,) * 3).class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        (
            Pictures(sizes=((8, 6), (8, 6), (8, 5))),
            r"image 2 of pictures differs in size.*\n.*\[3, 6, 8\].*\n.*\[3, 5, 8\]",
        ),
        (Pictures(targets=(0, "a", 1, 1)), "sample 1 of pictures has the wrong form"),
        ([(torch.rand(3, 4, 4), 1)], "sample 0"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8)], "got: +Tensor"),
        ([], "pictures is empty"),
    ],
)
def test_sets_that_cannot_be_resident_are_refused(pictures, words):
    with pytest.raises(DataError, match=words):
        resident_images(pictures, source="pictures", mean=(0.5,) * 3, std=(0.25,) * 3)
