"""Mixup and CutMix: partners by position, shares from a table, images against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.augmenting import assert_split_changes_nothing, draws_of, images_of

from distkit.data.augment import CutMix, MixUp, beta_table, cutmix, mixup, partner_draws, partners
from distkit.errors import ConfigError, DataError

PROBABILITIES = (np.arange(65_536) + 0.5) / 65_536


@pytest.mark.parametrize(
    ("alpha", "distribution"),
    [(1.0, lambda x: x), (0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x))), (2.0, lambda x: 3 * x**2 - 2 * x**3)],
)
def test_the_table_is_the_inverse_of_known_distribution_functions(alpha, distribution):
    np.testing.assert_allclose(distribution(beta_table(alpha).numpy()), PROBABILITIES, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.2, 0.4, 1.7, 30.0, 1000.0])
def test_the_table_is_distributed_as_numpys_beta(alpha):
    table = beta_table(alpha).numpy()
    assert (np.diff(table) >= 0).all()
    assert table[0] >= 0
    assert table[-1] <= 1
    samples = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    inner = samples[(samples > 1e-6) & (samples < 1 - 1e-6)]  # alpha 0.01 piles up at the ends
    at = np.quantile(inner, np.linspace(0.01, 0.99, 99))
    mine = np.searchsorted(table, at) / len(table)
    theirs = np.searchsorted(np.sort(samples), at) / len(samples)
    assert np.abs(mine - theirs).max() < 0.005


@pytest.mark.parametrize("num_samples", [1, 7, 2**31, 2**48])
def test_partners_lie_in_the_data_set(num_samples):
    found = partners(draws_of(20_000), num_samples)
    assert found.dtype == torch.int64
    assert 0 <= int(found.min()) <= int(found.max()) < num_samples
    if num_samples == 7:
        assert (found.bincount() - 20_000 / 7).abs().max() < 250
    if num_samples > 7:
        assert abs(found.double().mean() / num_samples - 0.5) < 0.01


def test_partners_have_draws_of_their_own():
    draws = draws_of(1000)
    same = draws.bernoulli("flip", 0.5) == partner_draws(draws).bernoulli("flip", 0.5)
    assert 420 < int(same.sum()) < 580
    assert partner_draws(draws).positions is draws.positions


def test_mixup():
    images, others = images_of(6).float(), images_of(6, seed=1).float()
    share = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.1, 0.9])
    got = mixup(images, others, share)
    for i, part in enumerate(share.tolist()):
        torch.testing.assert_close(got[i], part * images[i] + (1 - part) * others[i], rtol=1e-6, atol=1e-4)
    assert got[0].equal(others[0])
    assert got[1].equal(images[1])
    with pytest.raises(DataError, match="normalised"):
        mixup(images_of(2), images_of(2), share[:2])


def test_cutmix():
    images, others = images_of(3, 2, 8, 10), images_of(3, 2, 8, 10, seed=1)
    boxes = torch.tensor([[0, 0, 8, 10], [2, 3, 4, 5], [0, 0, 0, 0]])
    got, share = cutmix(images, others, boxes)
    assert share.tolist() == [0.0, 0.75, 1.0]
    assert share.dtype == torch.float32
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        expected = images[i].clone()
        window = (slice(None), slice(top, top + height), slice(left, left + width))
        expected[window] = others[i][window]
        assert got[i].equal(expected)


def test_cutmix_boxes_are_those_of_the_paper():
    """Algorithm 1 of Yun et al. 2019, sample by sample with numpy."""
    height, width, count = 32, 48, 20_000
    boxes = CutMix(alpha=1.0).boxes(draws_of(count), height, width)
    top, left, h, w = boxes.unbind(1)
    assert (boxes >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    random = np.random.default_rng(0)
    side = np.sqrt(1 - random.beta(1.0, 1.0, count))
    areas = []
    for r, y, x in zip(side, random.integers(height, size=count), random.integers(width, size=count), strict=True):
        half_h, half_w = int(height * r) // 2, int(width * r) // 2
        areas.append((min(y + half_h, height) - max(y - half_h, 0)) * (min(x + half_w, width) - max(x - half_w, 0)))
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        mine = (h * w).double().quantile(quantile) / (height * width)
        assert abs(mine - np.quantile(areas, quantile) / (height * width)) < 0.02


@pytest.mark.parametrize("mix", [MixUp(alpha=0.2), CutMix()])
def test_pixels_do_not_depend_on_the_split_of_the_batch(mix):
    pool = images_of(30, seed=5).float()

    def from_pool(images, draws):
        other = partners(draws, len(pool))
        mixed, share = mix.apply(images, pool[other], draws)
        return mixed, share, other

    assert_split_changes_nothing(from_pool, images_of(12).float())


@pytest.mark.parametrize("make", [MixUp, CutMix])
def test_impossible_alphas_are_refused(make):
    for alpha in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(ConfigError, match="alpha"):
            make(alpha=alpha)
