"""CIFAR-10, generated images, and the choice between the sources."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from distkit.config import DataConfig
from distkit.data import CIFAR10_MEAN, Augmentation, cifar10, load_images, synthetic
from distkit.data.synthetic import generate
from distkit.errors import DataError


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


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
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")


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


def test_synthetic_images_are_the_same_every_time():
    torch.manual_seed(1)
    np.random.seed(1)
    one = synthetic("train", 3, num_train=200)
    torch.manual_seed(2)
    other = synthetic("train", 3, num_train=200)
    assert one.images.equal(other.images)
    assert one.labels.equal(other.labels)
    assert not one.images.equal(synthetic("train", 4, num_train=200).images)
    assert not one.images.equal(synthetic("test", 3, num_test=200).images)
    assert "synthetic" in one.describe()


def test_synthetic_classes_are_balanced_and_as_many_as_asked():
    dataset = synthetic("test", 2**63 - 1, num_test=1001, num_classes=7)
    assert dataset.num_classes == 7
    assert torch.bincount(dataset.labels).tolist() == [143] * 7
    assert len(synthetic("train", 0, num_train=1)) == 1
    images, labels = generate(0, "train", 5, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64


def test_both_synthetic_splits_have_one_distribution():
    train, test = synthetic("train", 0, num_train=2000), synthetic("test", 0, num_test=2000)
    for each in (train, test):
        assert abs(each.images.float().mean().item() - 128) < 1
    assert abs(train.images.float().std().item() - test.images.float().std().item()) < 1


def linear_accuracy(features, labels, new_features, new_labels):
    """Ridge regression on one-hot labels."""
    targets = torch.nn.functional.one_hot(labels, 10).double() - 0.1
    gram = features.T @ features
    weights = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram)), features.T @ targets)
    return ((new_features @ weights).argmax(1) == new_labels).double().mean().item()


def test_synthetic_images_need_more_than_a_linear_model():
    """Pixels hardly tell the classes apart; products of neighbouring pixels and channels do."""
    train, test = synthetic("train", 0, num_train=3000), synthetic("test", 0, num_test=1000)

    def pixels(dataset):
        return torch.nn.functional.avg_pool2d(dataset.images.double() - 128, 2).flatten(1) / 50

    def correlations(dataset):
        spectrum = torch.fft.fft2((dataset.images.double() - 128) / 50)[:, :, :, :5] / 32
        low = torch.cat([spectrum[:, :, :5], spectrum[:, :, -4:]], 2).flatten(2)
        product = torch.einsum("nik,njk->nijk", low, low.conj())
        return torch.cat([product.real.flatten(1), product.imag.abs().flatten(1)], 1)

    by_pixels = linear_accuracy(pixels(train), train.labels, pixels(test), test.labels)
    by_products = linear_accuracy(correlations(train), train.labels, correlations(test), test.labels)
    assert by_pixels < 0.4
    assert by_products > by_pixels + 0.3


def test_load_images_takes_the_source_that_is_asked_for(small_cifar, tmp_path):
    random = Augmentation(crop_padding=4, flip=True)
    generated = load_images(DataConfig(source="synthetic"), "train", seed=5, augmentation=random)
    assert generated.source == "synthetic (seed 5)"
    assert generated.augmentation == random
    assert len(generated) == 10_000
    test = load_images(DataConfig(source="synthetic"), "test", seed=5, augmentation=random)
    assert test.augmentation == Augmentation()
    assert len(test) == 2_000
    config = DataConfig(source="cifar10", root=tmp_path / "root")
    assert load_images(config, "train", seed=5).source == f"CIFAR-10 in {tmp_path / 'root'}"
    with pytest.raises(DataError, match="nowhere"):
        load_images(DataConfig(source="folder", root=tmp_path / "nowhere"), "train", seed=0)
