"""Colour jitter against torchvision's adjustments, one image at a time."""

from __future__ import annotations

import math

import pytest
import torch
from support.augmenting import assert_split_changes_nothing, draws_of, images_of, smooth_images

from distkit.data.augment import (
    ColorJitter,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
)
from distkit.errors import ConfigError, DataError

ONE = 2**16
JITTER = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


def levels_apart(one, other):
    return (one.int() - other.int()).abs()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [images_of, smooth_images])
@pytest.mark.parametrize(
    ("mine", "name"),
    [(adjust_brightness, "brightness"), (adjust_contrast, "contrast"), (adjust_saturation, "saturation")],
)
def test_factors_are_those_of_torchvision(mine, name, make, channels):
    from torchvision.transforms.v2 import functional as tv

    plain = getattr(tv, f"adjust_{name}")
    factors = torch.tensor([0.0, 0.3, 0.77, 1.0, 1.25, 1.9, 5.0])
    images = make(len(factors), channels, 24, 31)
    got = mine(images, (factors * ONE).round().long())
    assert got.dtype == torch.uint8
    for i, factor in enumerate(factors.tolist()):
        expected = plain(images[i].float() / 255, factor) * 255
        # half a level is the rounding to one, the rest that of the grey; on uint8 torchvision cuts both off
        assert (got[i] - expected).abs().max() <= 0.51 + 0.53 * abs(1 - factor)
        assert levels_apart(got[i], plain(images[i], factor)).max() <= 1 + math.ceil(abs(1 - factor))
    assert got[3].equal(images[3])


@pytest.mark.parametrize("make", [images_of, smooth_images])
def test_hue_is_that_of_torchvision(make):
    from torchvision.transforms.v2 import functional as tv

    shifts = torch.tensor([-0.5, -0.31, -0.1, 0.0, 0.05, 0.2, 0.5])
    images = make(len(shifts), 3, 40, 31)
    images[:, :, 0] = images[:, :1, 0]  # grey pixels, whose hue is undefined
    got = adjust_hue(images, (shifts * 6 * ONE).round().long())
    for i, shift in enumerate(shifts.tolist()):
        assert levels_apart(got[i], tv.adjust_hue(images[i], shift)).max() <= 2
    assert got[3].equal(images[3])


def test_hue_of_every_colour_turns_by_a_third():
    axis = torch.arange(0, 256, 5, dtype=torch.uint8)
    colours = torch.cartesian_prod(axis, axis, axis).T.reshape(1, 3, -1, axis.numel())
    for thirds, order in ((1, [2, 0, 1]), (-1, [1, 2, 0])):
        turned = adjust_hue(colours, torch.tensor([2 * thirds * ONE]))
        assert levels_apart(turned, colours[:, order]).max() <= 1
    assert adjust_hue(colours, torch.tensor([0])).equal(colours)


def test_apply_draws_by_name_in_a_fixed_order():
    images, draws = smooth_images(8), draws_of(8)
    expected = images
    for name, adjust in (
        ("brightness", adjust_brightness),
        ("contrast", adjust_contrast),
        ("saturation", adjust_saturation),
    ):
        low, high = round(0.6 * ONE), round(1.4 * ONE)
        expected = adjust(expected, draws.integers(name, low, high + 1))
    most = round(0.6 * ONE)
    expected = adjust_hue(expected, draws.integers("hue", -most, most + 1))
    assert JITTER.apply(images, draws).equal(expected)
    assert ColorJitter().apply(images, draws).equal(images)


def test_the_strongest_factor_does_not_overflow():
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    images[:, :, 0] = 0
    strongest = torch.tensor([64 * ONE])
    assert adjust_brightness(images, strongest).equal(images)
    assert adjust_contrast(images, strongest).equal(images)
    assert adjust_saturation(images, strongest).equal(images)


def test_pixels_do_not_depend_on_the_split_of_the_batch():
    assert_split_changes_nothing(JITTER.apply, images_of(12, 3, 9, 11))


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="before normalising"):
        JITTER.apply(torch.zeros(1, 3, 8, 8), draws_of(1))
    with pytest.raises(DataError, match="1 or 3"):
        JITTER.apply(images_of(1, 4), draws_of(1))
    for wrong in ({"brightness": -0.1}, {"contrast": 64.0}, {"hue": 0.6}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ColorJitter(**wrong)
