"""What counts as a data set, and what is adapted."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import IterableDataset, Subset, TensorDataset

from distkit.data import Augments, Dataset, ImageDataset, MapDataset, as_dataset, synthetic
from distkit.errors import DataError


class Squares:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": torch.tensor([float(index), 1.0]), "y": index**2}


class Own:
    def __len__(self):
        return 3

    def fetch(self, indices):
        return indices * 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))

    def __len__(self):
        return 3


def test_a_map_style_set_is_adapted():
    dataset = as_dataset(Squares())
    assert isinstance(dataset, MapDataset)
    assert isinstance(dataset, Dataset)
    assert not isinstance(dataset, Augments)
    batch = dataset.fetch(torch.tensor([3, 0, 3]))
    assert batch["x"].tolist() == [[3, 1], [0, 1], [3, 1]]
    assert batch["y"].tolist() == [9, 0, 9]
    assert batch["y"].dtype == torch.int64


def test_torch_sets_are_adapted():
    whole = TensorDataset(torch.arange(10.0), torch.arange(10))
    x, y = as_dataset(Subset(whole, [5, 6, 7])).fetch(torch.tensor([2, 0]))
    assert x.tolist() == [7, 5]
    assert y.tolist() == [7, 5]


def test_lists_are_sets():
    assert as_dataset([(1, 2.0), (3, 4.0)]).fetch(torch.tensor([1]))[0].tolist() == [3]


def test_a_set_with_fetch_is_taken_as_it_is():
    own = Own()
    assert as_dataset(own) is own
    images = synthetic("test", 0, num_test=20)
    assert as_dataset(images) is images
    assert isinstance(images, ImageDataset | Augments)


@pytest.mark.parametrize("candidate", [Stream(), iter([1, 2]), 5, None, {"a": 1}, object()])
def test_anything_else_is_refused(candidate):
    with pytest.raises(DataError, match="fetch") as caught:
        as_dataset(candidate)
    assert type(candidate).__name__ in str(caught.value)


def test_empty_sets_are_refused():
    with pytest.raises(DataError, match="empty"):
        as_dataset([])
