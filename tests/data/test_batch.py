"""Batches of any structure: mapped, moved, counted."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distkit.data import batch_size, map_tensors, to_device
from distkit.errors import DataError

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Masked:
    image: Tensor
    mask: Tensor
    name: str = "x"


def structures():
    a, b = torch.zeros(4, 3), torch.ones(4)
    return [
        a,
        (a, b),
        [a, b],
        Pair(a, b),
        {"a": a, "b": (b, [a])},
        OrderedDict(a=a),
        UserDict(a=a, b=[b]),
        Masked(a, b),
        {"deep": Masked(a, b), "names": ["u", "v", "w", "z"], "none": None},
    ]


@pytest.mark.parametrize("batch", structures(), ids=lambda batch: type(batch).__name__)
def test_every_structure_is_mapped_and_counted(batch):
    assert batch_size(batch) == 4
    halves = map_tensors(lambda tensor: tensor[:2], batch)
    assert batch_size(halves) == 2
    assert batch_size(batch) == 4
    assert type(halves) is type(batch)
    moved = to_device(batch, torch.device("meta"))
    assert batch_size(moved) == 4


def test_what_is_not_a_tensor_is_kept():
    batch = {"deep": Masked(torch.zeros(2), torch.zeros(2), "name"), "names": ["u", "v"], "none": None}
    moved = to_device(batch, torch.device("meta"))
    assert moved["deep"].name == "name"
    assert moved["deep"].mask.device.type == "meta"
    assert moved["names"] == ["u", "v"]
    assert moved["none"] is None


def test_what_is_there_already_is_not_copied():
    images, labels = torch.zeros(2, 3, 4, 4), torch.zeros(2)
    moved = to_device((images, labels), torch.device("cpu"))
    assert moved[0] is images
    assert moved[1] is labels


def test_channels_last_lays_out_images_only():
    images, labels = torch.rand(2, 3, 4, 4), torch.rand(2, 3)
    moved = to_device((images, labels), torch.device("cpu"), channels_last=True)
    assert moved[0].is_contiguous(memory_format=torch.channels_last)
    assert moved[0].equal(images)
    assert moved[1].is_contiguous()


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.zeros(2, 3), torch.zeros(3)), r"batch\[0\] \[2, 3\], batch\[1\] \[3\]"),
        ({"a": torch.zeros(()), "b": torch.zeros(2)}, r"batch\['a'\] \[\]"),
        (torch.zeros(()), "first dim"),
        (["a", "b"], "no tensor in list"),
        (Masked(torch.zeros(2), torch.zeros(3)), r"batch\.image \[2\], batch\.mask \[3\]"),
    ],
)
def test_batches_without_a_size_are_named(batch, words):
    with pytest.raises(DataError, match=words):
        batch_size(batch)
