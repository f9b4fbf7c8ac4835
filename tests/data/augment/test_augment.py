"""Crop, flip, rotation, cutout and normalisation against plain ones that handle one sample at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.augmenting import NO_CUDA

from distkit.data import Draws
from distkit.data.augment import (
    alternating_flip,
    crop_flip,
    cutout,
    flip,
    geometry,
    normalization,
    normalize,
    random_crop,
    rotate90,
)
from distkit.errors import DataError

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]


def images_of(batch=7, channels=3, height=32, width=32, dtype=torch.uint8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, channels, height, width), generator=generator).to(dtype)


def crop_one(image, y, x, padding, mode):
    """numpy [C, H, W]."""
    how = {"mode": "constant"} if mode == "zero" else {"mode": "reflect"}
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), **how)
    return padded[:, y : y + image.shape[1], x : x + image.shape[2]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize(
    ("shape", "padding", "dtype"),
    [
        ((81, 3, 32, 32), 4, torch.uint8),
        ((5, 1, 28, 28), 2, torch.uint8),
        ((6, 3, 5, 9), 4, torch.uint8),
        ((6, 2, 8, 6), 1, torch.float32),
        ((1, 1, 2, 2), 1, torch.int64),
    ],
)
def test_crop(shape, padding, dtype, mode, device):
    images = images_of(*shape, dtype=dtype)
    corners = torch.cartesian_prod(torch.arange(2 * padding + 1), torch.arange(2 * padding + 1))
    corners = corners.repeat(-(-len(images) // len(corners)), 1)[: len(images)]
    got = random_crop(images.to(device), corners[:, 0].to(device), corners[:, 1].to(device), padding, mode)
    assert got.dtype == dtype
    assert got.is_contiguous()
    for i, (y, x) in enumerate(corners.tolist()):
        assert (got[i].cpu().numpy() == crop_one(images[i].numpy(), y, x, padding, mode)).all()


def test_both_ways_to_cut_windows_agree():
    padded, corner = images_of(50, 3, 12, 14), torch.randint(0, 5, (50, 2), generator=torch.Generator().manual_seed(1))
    window = (padded, corner[:, 0], corner[:, 1], 8, 10)
    assert geometry._windows_by_row(*window).equal(geometry._windows_by_pixel(*window))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mode", "fill"), [("zero", 0), ("zero", 255), ("reflect", 0)])
@pytest.mark.parametrize(("shape", "padding"), [((90, 3, 32, 32), 4), ((60, 1, 5, 9), 3), ((50, 2, 300, 301), 9)])
def test_crop_and_flip_in_one_go(shape, padding, mode, fill, device):
    images, generator = images_of(*shape), torch.Generator().manual_seed(2)
    y, x = torch.randint(0, 2 * padding + 1, (2, shape[0]), generator=generator)
    mask = torch.randint(0, 2, (shape[0],), generator=generator).to(torch.bool)
    got = crop_flip(*(t.to(device) for t in (images, y, x, mask)), padding, mode, fill).cpu()
    for i in range(shape[0]):
        how = {"mode": "constant", "constant_values": fill} if mode == "zero" else {"mode": "reflect"}
        padded = np.pad(images[i].numpy(), ((0, 0), (padding, padding), (padding, padding)), **how)
        window = padded[:, y[i] : y[i] + shape[2], x[i] : x[i] + shape[3]]
        assert (got[i].numpy() == (window[:, :, ::-1] if mask[i] else window)).all()
    assert images.equal(images_of(*shape))


@pytest.mark.parametrize("padding", [0, 7, 20])
def test_crop_with_padding_larger_than_the_image_or_none(padding):
    images = images_of(9, 3, 6, 5)
    y = torch.arange(9) * padding // 4
    got = random_crop(images, y, y, padding)
    for i in range(9):
        assert (got[i].numpy() == crop_one(images[i].numpy(), int(y[i]), int(y[i]), padding, "zero")).all()


def test_no_images_are_no_images():
    none, no_number = images_of(0), torch.zeros(0, dtype=torch.int64)
    assert crop_flip(none, no_number, no_number, no_number.bool(), 4).shape == none.shape
    assert rotate90(none, no_number).shape == none.shape


@pytest.mark.parametrize("device", DEVICES)
def test_rotations_are_those_of_torch(device):
    images, turns = images_of(9, 2, 6, 6), torch.arange(9) % 4
    got = rotate90(images.to(device), turns.to(device)).cpu()
    for i in range(9):
        assert got[i].equal(torch.rot90(images[i], int(turns[i]), (1, 2)))
    with pytest.raises(DataError, match="square"):
        rotate90(images_of(1, 1, 5, 6), turns[:1])


@pytest.mark.parametrize("device", DEVICES)
def test_alternating_flip(device):
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).to(device)
    masks = [alternating_flip(Draws(4, indices), torch.full_like(indices, epoch)) for epoch in range(4)]
    assert masks[0].equal(~masks[1])
    assert masks[0].equal(masks[2])
    assert masks[1].equal(masks[3])
    assert 420 < int(masks[0].sum()) < 580
    order = indices.argsort()
    again = alternating_flip(Draws(4, indices[order]), torch.zeros_like(indices))
    assert again.equal(masks[0][order])  # of the sample, not of its position
    assert again.cpu().equal(alternating_flip(Draws(4, torch.arange(1000)), torch.zeros(1000, dtype=torch.int64)))


def test_crop_takes_images_in_any_layout():
    images = images_of(4).to(memory_format=torch.channels_last)
    offset = torch.tensor([0, 3, 8, 4])
    assert random_crop(images, offset, offset, 4).equal(random_crop(images.contiguous(), offset, offset, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_flip(device):
    images, mask = images_of(9, 3, 5, 6), torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0], dtype=torch.bool)
    before = images.clone()
    got = flip(images.to(device), mask.to(device)).cpu()
    for i in range(9):
        assert (got[i].numpy() == (images[i].numpy()[:, :, ::-1] if mask[i] else images[i].numpy())).all()
    assert images.equal(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 80])
def test_cutout(size, device):
    images = images_of(40, 2, 10, 12, torch.float32) + 1
    generator = torch.Generator().manual_seed(size)
    y, x = (torch.randint(0, n, (40,), generator=generator) for n in (10, 12))
    got = cutout(images.clone().to(device), y.to(device), x.to(device), size).cpu()
    for i in range(40):
        expected = images[i].clone()
        top, left = int(y[i]) - size // 2, int(x[i]) - size // 2
        expected[:, max(top, 0) : top + size, max(left, 0) : left + size] = 0
        assert got[i].equal(expected)


def test_normalize_is_that_of_torchvision():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    got = normalize(images, *normalization(mean, std))
    assert got.dtype == torch.float32
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
