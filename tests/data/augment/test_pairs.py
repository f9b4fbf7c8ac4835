"""Image and mask move together: every label stays on its pixel."""

from __future__ import annotations

import pytest
import torch
from support.augmenting import assert_split_changes_nothing, draws_of, images_of

from distkit.data.augment import PairGeometry, RandomResizedCrop
from distkit.data.augment.resample import resized_crop_nearest
from distkit.errors import ConfigError, DataError

MOVES = PairGeometry(crop_padding=3, flip=True, rotate=True)
EVERYTHING = PairGeometry(resized_crop=RandomResizedCrop(size=(20, 20)), crop_padding=3, flip=True, rotate=True)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_labels_stay_on_their_pixels(mode):
    images = images_of(40, 1, 16, 16).clamp(min=1)
    geometry = PairGeometry(crop_padding=3, padding_mode=mode, flip=True, rotate=True, ignore_label=0)
    got, masks = geometry.apply(images, images[:, 0].long(), draws_of(40))
    assert masks.shape == (40, 16, 16)
    assert masks.dtype == torch.int64
    assert got[:, 0].long().equal(masks)
    assert not got.equal(images)


def test_padding_of_masks_is_the_label_to_ignore():
    images, masks = torch.full((40, 3, 8, 8), 9, dtype=torch.uint8), torch.full((40, 8, 8), 4, dtype=torch.uint8)
    got, moved = MOVES.apply(images, masks, draws_of(40))
    assert set(moved.unique().tolist()) == {4, 255}
    assert (moved == 255).equal(got[:, 0] == 0)


def test_against_plain_calls_one_sample_at_a_time():
    images, masks, draws = images_of(12, 3, 18, 18), images_of(12, 1, 18, 18, seed=1)[:, 0], draws_of(12)
    got, moved = MOVES.apply(images, masks, draws)
    corners, mirrored = draws.integers("crop", 0, 7, count=2), draws.bernoulli("flip", 0.5)
    turns = draws.integers("rotate", 0, 4)
    for i, (y, x) in enumerate(corners.tolist()):
        for found, plain, fill in ((got[i], images[i], 0), (moved[i], masks[i], 255)):
            padded = torch.nn.functional.pad(plain, (3, 3, 3, 3), value=fill)[..., y : y + 18, x : x + 18]
            padded = padded.flip(-1) if mirrored[i] else padded
            assert found.equal(torch.rot90(padded, int(turns[i]), (-2, -1)))


def test_resized_crop_takes_the_same_box():
    geometry = PairGeometry(resized_crop=RandomResizedCrop(size=(20, 24)))
    ramp = torch.arange(40, dtype=torch.uint8).mul(6).expand(9, 1, 30, 40).contiguous()
    got, moved = geometry.apply(ramp, ramp, draws_of(9))
    assert moved.shape == (9, 1, 20, 24)
    assert moved.equal(resized_crop_nearest(ramp, geometry.resized_crop.boxes(draws_of(9), 30, 40), (20, 24)))
    assert (got.int() - moved.int()).abs().max() <= 6  # one pixel of the ramp: bilinear against nearest


def test_the_default_changes_nothing():
    images, masks = images_of(3), images_of(3, 1)[:, 0]
    got, moved = PairGeometry().apply(images, masks, draws_of(3))
    assert got.equal(images)
    assert moved.equal(masks)


@pytest.mark.parametrize("geometry", [MOVES, EVERYTHING])
def test_pixels_do_not_depend_on_the_split_of_the_batch(geometry):
    assert_split_changes_nothing(geometry.apply, images_of(12, 3, 24, 24), images_of(12, 1, 24, 24, seed=1)[:, 0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="fit together"):
        MOVES.apply(images_of(2), torch.zeros(2, 8, 8), draws_of(2))
    with pytest.raises(DataError, match="ignore_label"):
        PairGeometry(crop_padding=2, ignore_label=-100).apply(images_of(2), images_of(2)[:, 0], draws_of(2))
    with pytest.raises(DataError, match="square"):
        PairGeometry(rotate=True).apply(images_of(2, 3, 8, 9), images_of(2, 1, 8, 9), draws_of(2))
    with pytest.raises(ConfigError, match="crop-padding"):
        PairGeometry(crop_padding=-1)
    with pytest.raises(ConfigError, match="padding-mode"):
        PairGeometry(padding_mode="edge")
