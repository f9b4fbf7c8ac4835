"""Random resized crop against torchvision, one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.augmenting import assert_split_changes_nothing, draws_of, images_of

from distkit.data.augment import RandomResizedCrop, resized_crop, resized_crop_nearest
from distkit.errors import ConfigError, DataError

CROP = RandomResizedCrop(size=(24, 20))


@pytest.mark.parametrize(("image", "size"), [((40, 50), (24, 20)), ((17, 9), (32, 33)), ((32, 32), (32, 32))])
def test_bilinear_is_that_of_torchvision(image, size):
    from torchvision.transforms.v2 import functional as tv

    images = images_of(40, 3, *image)
    boxes = RandomResizedCrop(size=size, scale=(0.05, 1)).boxes(draws_of(40), *image)
    got = resized_crop(images, boxes, size)
    assert got.dtype == torch.uint8
    differences = []
    for i, box in enumerate(boxes.tolist()):
        expected = tv.resized_crop(images[i].float(), *box, list(size), antialias=False)
        differences.append((got[i] - expected).abs())
    assert torch.stack(differences).max() <= 0.75  # half a level is the rounding to a level itself
    rounded = tv.resized_crop(images[0], *boxes[0].tolist(), list(size), antialias=False)
    assert (got[0].int() - rounded.int()).abs().max() <= 1


def test_nearest_is_that_of_torchvision():
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    masks = torch.arange(30 * 37 * 31).view(30, 1, 37, 31)
    boxes = RandomResizedCrop(size=(24, 20), scale=(0.05, 1)).boxes(draws_of(30), 37, 31)
    got = resized_crop_nearest(masks, boxes, (24, 20))
    for i, box in enumerate(boxes.tolist()):
        plain = tv.resized_crop(masks[i].double(), *box, [24, 20], interpolation=InterpolationMode.NEAREST_EXACT)
        assert got[i].equal(plain.long())


def test_the_whole_image_at_its_own_size_is_unchanged():
    images = images_of(3, 3, 13, 17)
    boxes = torch.tensor([[0, 0, 13, 17]] * 3)
    assert resized_crop(images, boxes, (13, 17)).equal(images)
    assert resized_crop_nearest(images, boxes, (13, 17)).equal(images)


@pytest.mark.parametrize("image", [(60, 80), (300, 30)])
def test_boxes_are_distributed_as_those_of_torchvision(image):
    from torchvision.transforms.v2 import RandomResizedCrop as Plain

    count = 4000
    boxes = RandomResizedCrop(size=(8, 8)).boxes(draws_of(count), *image)
    top, left, height, width = boxes.unbind(1)
    assert (boxes >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= image[0]).all()
    assert (left + width <= image[1]).all()
    torch.manual_seed(0)
    plain, empty = Plain(8), torch.empty(3, *image)
    found = [plain.make_params([empty]) for _ in range(count)]
    for name, mine in (("top", top), ("left", left), ("height", height), ("width", width)):
        theirs = np.sort([params[name] for params in found])
        grid = np.arange(max(image) + 1)
        cumulated = [np.searchsorted(np.sort(values), grid, "right") / count for values in (mine.numpy(), theirs)]
        assert np.abs(cumulated[0] - cumulated[1]).max() < 0.045, name  # two-sample KS, p about 0.0006


def test_where_no_box_fits_the_centre_is_taken():
    crop = RandomResizedCrop(size=(8, 8), scale=(1, 1), ratio=(3 / 4, 4 / 3))
    assert crop.boxes(draws_of(2), 30, 90).tolist() == [[0, 25, 30, 40]] * 2
    assert crop.boxes(draws_of(2), 90, 30).tolist() == [[25, 0, 40, 30]] * 2


def test_pixels_do_not_depend_on_the_split_of_the_batch():
    assert_split_changes_nothing(CROP.apply, images_of(12, 3, 40, 50))


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(DataError, match="before normalising"):
        CROP.apply(torch.zeros(1, 3, 8, 8), draws_of(1))
    for wrong in ({"size": (0, 4)}, {"size": (4, 4), "scale": (0.0, 1.0)}, {"size": (4, 4), "ratio": (2.0, 1.0)}):
        with pytest.raises(ConfigError):
            RandomResizedCrop(**wrong)
