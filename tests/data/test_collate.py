"""Samples that make no batch: the real reason is named, and a data set's own `collate` makes one."""

from __future__ import annotations

from collections import namedtuple
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_trees import save_image
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset, default_collate
from torchvision.datasets import ImageFolder

from distkit.config import BatchSplit, DataConfig
from distkit.data import TensorSamples, as_dataset
from distkit.data.collate import collate_of, why_no_batch
from distkit.data.reading.iterable import IterableData
from distkit.data.reading.placement import Reading, open_training, place
from distkit.errors import DataError, DistkitError, TrainingError

CPU = torch.device("cpu")
Point = namedtuple("Point", "x y")


class Ragged(TorchDataset):
    """Sequences of 1 to 5 tokens with a label."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((1 + index % 5,), index), index


class Padded(Ragged):
    """The same, padded with -1."""

    def collate(self, samples):
        tokens = torch.nn.utils.rnn.pad_sequence([each for each, _ in samples], batch_first=True, padding_value=-1)
        lengths = torch.tensor([len(each) for each, _ in samples])
        return {"tokens": tokens, "lengths": lengths, "labels": torch.tensor([label for _, label in samples])}


def batches(dataset, num_workers: int, count: int = 2):
    """The first microbatches of 4, read as in training."""
    data = DataConfig(placement="workers", num_workers=num_workers or None)
    reading = Reading(data=data, seed=0, device=CPU, in_process=num_workers == 0)
    split = BatchSplit(global_batch_size=4, microbatch_size=4, world_size=1)
    source = open_training(dataset, reading, split, 0)
    try:
        return [source.loader.microbatch(step, 0) for step in range(count)]
    finally:
        source.loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_of_different_shapes_are_named_with_the_two_shapes(num_workers):
    with pytest.raises(DataError) as caught:
        batches(as_dataset(Ragged()), num_workers)
    text = str(caught.value)
    assert "samples do not make a batch: [0] is of shape [" in text
    assert " in sample " in text
    assert "a method collate(samples)" in text
    assert "PIL" not in text
    assert "TensorSamples" not in text


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Subset(s, range(3, 20)), TensorSamples])
def test_a_data_set_pads_in_its_collate(num_workers, wrap):
    for batch in batches(as_dataset(wrap(Padded())), num_workers):
        assert batch["tokens"].shape == (4, int(batch["lengths"].max()))
        for tokens, length, label in zip(batch["tokens"], batch["lengths"], batch["labels"], strict=True):
            assert (tokens[:length] == label).all()
            assert (tokens[length:] == -1).all()


def test_fetch_and_evaluation_collate_alike():
    data = as_dataset(Padded())
    expected = Padded().collate([Padded()[i] for i in (4, 0)])
    assert data.fetch(torch.tensor([4, 0]))["tokens"].equal(expected["tokens"])
    placed = place(data, Reading(data=DataConfig(), seed=0, device=CPU, in_process=True))
    assert placed.placement == "workers"


class Broken(Ragged):
    def collate(self, samples):
        return {}["missing"]


def test_an_error_in_collate_is_named_with_its_line():
    with pytest.raises(TrainingError, match=r"collate of Broken failed: KeyError(.|\n)*missing"):
        batches(as_dataset(Broken()), 2)


class Shares(torch.utils.data.IterableDataset):
    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def __iter__(self):
        return (Ragged()[i] for i in range(self.rank, 20, self.world_size))


def test_an_iterable_data_set_has_a_collate_too():
    pytest.importorskip("torchdata")
    data = IterableData(build=Shares, samples_per_epoch=20, collate=Padded().collate)
    (batch,) = batches(data, 1, count=1)
    assert batch["tokens"].shape == (4, 4)


def test_files_of_different_sizes_are_named_by_path(tmp_path):
    save_image(tmp_path / "a" / "0.png", size=(8, 8))
    save_image(tmp_path / "a" / "1.png", size=(8, 9))
    with pytest.raises(DistkitError) as caught:
        batches(as_dataset(Subset(TensorSamples(ImageFolder(tmp_path)), [0, 1] * 4)), 1)
    assert "[0] is of shape [3, " in str(caught.value)
    assert f"in {tmp_path}/a/0.png" in str(caught.value)
    assert f"in {tmp_path}/a/1.png" in str(caught.value)


def test_pil_images_and_other_objects_are_told_apart(tmp_path):
    save_image(tmp_path / "a" / "0.png")
    with pytest.raises(DataError, match=r"\[0\] is a PIL\.Image\.Image(.|\n)*TensorSamples"):
        batches(as_dataset(Subset(ImageFolder(tmp_path), [0] * 8)), 1)


NAMES = ["first", "second"]
SAME: Literal["same"] = "same"


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ([torch.zeros(2), torch.zeros(2)], None),
        ([torch.zeros(2), torch.zeros(3)], "the sample is of shape [2] in first, and of shape [3] in second"),
        ([np.zeros((2, 1)), np.zeros(2)], "the sample is of shape [2, 1] in first, and of shape [2] in second"),
        ([(1, torch.zeros(2)), (2, torch.zeros(1))], "[1] is of shape [2] in first, and of shape [1] in second"),
        ([{"x": [torch.zeros(1)]}, {"x": [torch.zeros(2)]}], "['x'][0] is of shape [1] in first, and of shape [2] in"),
        ([{"x": 1}, {"y": 1}], "the sample is a dict of ['x'] in first, and a dict of ['y'] in second"),
        ([(1, 2), (1,)], "the sample is of length 2 in first, and of length 1 in second"),
        ([Point(1, [1]), Point(2, [1, 2])], "[1] is of length 1 in first, and of length 2 in second"),
        ([torch.zeros(1), None], "the sample is a Tensor in first, and a NoneType in second"),
        ([(1, None), (1, None)], "[1] is a builtins.NoneType, of which torch makes no tensor (first)"),
        ([1, 2.0], None),
        (["a", "b"], None),
        ([object(), object()], "the sample is a builtins.object, of which torch makes no tensor (first)"),
    ],
)
def test_what_differs_is_named(samples, reason):
    said = why_no_batch(samples, NAMES)
    assert said is None if reason is None else said.startswith(reason)
    if reason is None:
        default_collate(samples)
    else:
        with pytest.raises((RuntimeError, TypeError, KeyError, AttributeError)):
            default_collate(samples)


def test_the_own_collate_comes_first():
    assert collate_of(Ragged()) is default_collate
    padded = Padded()
    assert collate_of(Subset(Subset(padded, [0]), [0])) == padded.collate
    looped = Subset(padded, [0])
    looped.dataset = looped
    assert collate_of(looped) is default_collate
    with Image.new("L", (1, 1)) as image:
        assert collate_of([image]) is default_collate
