"""Random erasing against a plain loop, and its boxes against torchvision's."""

from __future__ import annotations

import pytest
import torch
from support.augmenting import assert_split_changes_nothing, draws_of, images_of

from distkit.data.augment import RandomErasing, erase, inside, noise
from distkit.errors import ConfigError, DataError

NOISE = RandomErasing(fill="noise")


def test_erase_replaces_the_box():
    images, boxes = (
        images_of(5, 3, 10, 12),
        torch.tensor([[0, 0, 10, 12], [2, 3, 4, 5], [9, 11, 1, 1], [0] * 4, [5, 5, 9, 9]]),
    )
    mean, levels = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None], images_of(5, 3, 10, 12, seed=1)
    for fill in (7, mean, levels):
        got = erase(images, boxes, fill)
        for i, (top, left, height, width) in enumerate(boxes.tolist()):
            expected = images[i].clone()
            source = torch.as_tensor(fill, dtype=torch.uint8).expand(5, 3, 10, 12)[i]
            window = (slice(None), slice(top, top + height), slice(left, left + width))
            expected[window] = source[window]
            assert got[i].equal(expected)


def test_noise_is_uniform_and_its_own_for_every_pixel():
    levels = noise(draws_of(50), "n", (3, 31, 33))
    assert levels.shape == (50, 3, 31, 33)
    assert levels.dtype == torch.uint8
    counts = levels.flatten().long().bincount(minlength=256).double()
    expected = levels.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 340  # chi-square, 255 degrees of freedom, p about 0.0003
    assert abs(torch.corrcoef(levels.flatten(1)[:, :200].T.double()).triu(1).mean()) < 0.01


def test_apply_draws_by_name():
    images, draws = images_of(60), draws_of(60)
    boxes = NOISE.boxes(draws, 32, 32)
    got = NOISE.apply(images, draws)
    hidden = inside(boxes, 32, 32).expand_as(images)
    assert got[hidden].equal(noise(draws, "erase noise", (3, 32, 32))[hidden])
    assert got[~hidden].equal(images[~hidden])
    floats = images.float()
    assert RandomErasing().apply(floats, draws).equal(floats.masked_fill(hidden, 0))


def test_boxes_are_distributed_as_those_of_torchvision():
    from torchvision.transforms import RandomErasing as Plain

    boxes = RandomErasing(p=1.0).boxes(draws_of(3000), 40, 60)
    top, left, height, width = boxes.unbind(1)
    assert (top + height <= 40).all()
    assert (left + width <= 60).all()
    torch.manual_seed(0)
    empty = torch.zeros(3, 40, 60)
    found = torch.tensor([Plain.get_params(empty, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(3000)])
    for mine, theirs in zip((top, left, height, width), found.unbind(1), strict=True):
        for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
            assert abs(mine.double().quantile(quantile) - theirs.double().quantile(quantile)) <= 2
    erased = RandomErasing(p=0.25).boxes(draws_of(3000), 40, 60)[:, 2] > 0
    assert 0.22 < erased.double().mean() < 0.28


@pytest.mark.parametrize("erasing", [NOISE, RandomErasing()])
def test_pixels_do_not_depend_on_the_split_of_the_batch(erasing):
    assert_split_changes_nothing(erasing.apply, images_of(12, 3, 9, 11))


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="before normalising"):
        NOISE.apply(torch.zeros(1, 3, 8, 8), draws_of(1))
    for wrong in ({"p": 2.0}, {"scale": (0.5, 0.1)}, {"fill": "pink"}):
        with pytest.raises(ConfigError):
            RandomErasing(**wrong)
