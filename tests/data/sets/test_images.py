"""Resident images: gathered, augmented by keyed draws, normalised."""

from __future__ import annotations

import pytest
import torch

from distkit.data import CIFAR10_MEAN, CIFAR10_STD, Augmentation, Draws, ImageDataset
from distkit.data.augment import cutout, flip, normalization, normalize, random_crop
from distkit.errors import ConfigError, DataError

EVERYTHING = Augmentation(crop_padding=4, padding_mode="reflect", flip=True, cutout=6)


def dataset_of(count=200, augmentation=None, **changes):
    generator = torch.Generator().manual_seed(0)
    values = {
        "images": torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "labels": torch.randint(0, 5, (count,), generator=generator),
        "class_names": tuple("abcde"),
        "source": "a test",
        "augmentation": augmentation,
    } | changes
    return ImageDataset(values.pop("images"), values.pop("labels"), **values)


def test_fetch_gathers():
    dataset = dataset_of()
    indices = torch.tensor([3, 199, 3])
    images, labels = dataset.fetch(indices)
    assert images.dtype == torch.uint8
    assert images.equal(dataset.images[indices])
    assert labels.equal(dataset.labels[indices])
    assert len(dataset) == 200
    assert dataset.num_classes == 5


def test_without_augmentation_images_are_normalised():
    dataset = dataset_of()
    images, labels = batch = dataset.fetch(torch.arange(10))
    got, same = dataset.augment(batch, Draws(0, torch.arange(10)))
    expected = torch.stack([(images[:, c] / 255 - CIFAR10_MEAN[c]) / CIFAR10_STD[c] for c in range(3)], 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert same.equal(labels)
    assert dataset.normalized(range(10)).equal(got)
    assert dataset.normalized(range(195, 5000)).shape == (5, 3, 32, 32)


def test_augment_applies_the_draws_in_order():
    dataset = dataset_of(augmentation=EVERYTHING)
    images, labels = dataset.fetch(torch.arange(50))
    draws = Draws(5, torch.arange(1000, 1050))
    corner = draws.integers("crop", 0, 9, count=2)
    expected = random_crop(images, corner[:, 0], corner[:, 1], 4, "reflect")
    expected = flip(expected, draws.bernoulli("flip", 0.5))
    expected = normalize(expected, *normalization(CIFAR10_MEAN, CIFAR10_STD))
    expected = cutout(expected, draws.integers("cutout y", 0, 32), draws.integers("cutout x", 0, 32), 6)
    before = images.clone()
    assert dataset.augment((images, labels), draws)[0].equal(expected)
    assert images.equal(before)


@pytest.mark.parametrize("augmentation", [EVERYTHING, Augmentation(crop_padding=4, flip=True)])
def test_pixels_do_not_depend_on_the_split_of_the_batch(augmentation):
    dataset = dataset_of(augmentation=augmentation)
    indices, positions = torch.arange(199, 100, -1), torch.arange(500, 599)
    whole, _ = dataset.augment(dataset.fetch(indices), Draws(1, positions))
    for size in (1, 8, 33):
        parts = [
            dataset.augment(dataset.fetch(i), Draws(1, p))[0]
            for i, p in zip(indices.split(size), positions.split(size), strict=True)
        ]
        assert torch.cat(parts).equal(whole)


def test_the_same_sample_looks_different_at_another_position():
    dataset = dataset_of(augmentation=EVERYTHING)
    batch = dataset.fetch(torch.zeros(64, dtype=torch.int64))
    images, _ = dataset.augment(batch, Draws(1, torch.arange(64)))
    assert len({image.numpy().tobytes() for image in images}) > 50


def test_describe_and_augmented():
    dataset = dataset_of(12_345 // 5)
    assert dataset.describe() == "2,469 images 3x32x32 uint8, 5 classes, from a test"
    other = dataset.augmented(EVERYTHING)
    assert other.augmentation == EVERYTHING
    assert dataset.augmentation == Augmentation()
    assert other.images is dataset.images
    assert other.to("cpu").images is dataset.images
    assert other.to("cpu").augmentation == EVERYTHING
    assert dataset.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": torch.zeros(200, 3, 4, 4)}, "uint8"),
        ({"images": torch.zeros(200, 4, 4, dtype=torch.uint8)}, "wrong form"),
        ({"labels": torch.zeros(200)}, "int64"),
        ({"labels": torch.zeros(199, dtype=torch.int64)}, "199 labels"),
        ({"labels": torch.full((200,), 5)}, "0 to 4"),
        ({"labels": torch.full((200,), -1)}, "0 to 4"),
        ({"mean": (0.5,)}, "3 numbers"),
        (
            {"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.int64)},
            "at least one",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, words):
    with pytest.raises(DataError, match=words):
        dataset_of(**changes)


@pytest.mark.parametrize("values", [{"crop_padding": -1}, {"cutout": -1}, {"padding_mode": "edge"}])
def test_impossible_augmentations_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values)).replace("_", "-")):
        Augmentation(**values)


def test_mirrored_padding_must_fit_the_image():
    with pytest.raises(ConfigError, match="less than 32"):
        dataset_of(augmentation=Augmentation(crop_padding=32, padding_mode="reflect"))


def test_a_step_builds_no_python_number_from_a_tensor():
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoScalars(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(function)
            assert "nonzero" not in str(function)
            return function(*args, **(kwargs or {}))

    dataset = dataset_of(augmentation=EVERYTHING)
    with NoScalars():
        dataset.augment(dataset.fetch(torch.arange(8)), Draws(0, torch.arange(8)))
