"""Generated images, and the choice between the sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distkit.config import DataConfig
from distkit.data import Augmentation, sources, synthetic
from distkit.data.sets.synthetic import generate
from distkit.errors import DataError


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


def test_load_images_takes_the_source_that_is_asked_for(tmp_path):
    random = Augmentation(crop_padding=4, flip=True)
    generated = sources.load_images(DataConfig(source="synthetic"), "train", seed=5, augmentation=random)
    assert generated.source == "synthetic (seed 5)"
    assert generated.augmentation == random
    assert len(generated) == 10_000
    test = sources.load_images(DataConfig(source="synthetic"), "test", seed=5, augmentation=random)
    assert test.augmentation == Augmentation()
    assert len(test) == 2_000
    with pytest.raises(DataError, match="nowhere"):
        sources.load_images(DataConfig(source="folder", root=tmp_path / "nowhere"), "train", seed=0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_sets_are_opened_by_name(name, split, tmp_path, monkeypatch):
    small = synthetic("test", 0, num_test=20)
    asked = []
    monkeypatch.setattr(sources, "torchvision_set", lambda *args: asked.append(args) or small)
    images = sources.load_images(
        DataConfig(source=name, root=tmp_path), split, seed=5, augmentation=Augmentation(flip=True)
    )
    assert asked == [(name, tmp_path, split)]
    assert images.images is small.images
    assert images.augmentation.flip == (split == "train")
