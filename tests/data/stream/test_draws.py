"""Keyed draws: pure in (seed, position, name, k), uniform, independent, and the same bits everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distkit.data import Draws
from distkit.data.stream.draws import FIRST_SEGMENT, SEGMENT_SHIFT, _quantiles
from distkit.errors import ConfigError

MASK = 2**64 - 1
POSITIONS = torch.arange(2**15)
GOLDEN_BITS = [-3634062263259020639, 9031464119636976179, -2169378783683895139]
GOLDEN_INTEGERS = [[3, 2], [0, 2], [3, 0]]
GOLDEN_UNIFORM = [476137.0, 8450177.0, 10263970.0]
GOLDEN_NORMAL = [-1.2861355543136597, -1.1885693073272705, 1.0424644947052002]
GOLDEN_BERNOULLI = [True, True, False]


def splitmix64(state):
    """Output function of the generator, in plain Python integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def even(values, cells):
    """Chi-square of integers in 0 .. cells - 1, within five standard deviations."""
    counts = np.bincount(values.flatten().numpy(), minlength=cells)
    assert counts.size == cells
    expected = counts.sum() / cells
    statistic = ((counts - expected) ** 2 / expected).sum()
    return abs(statistic - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1))


def independent(one, other):
    """Two integer draws in 0..31 fill the 1,024 pairs evenly."""
    return even(one * 32 + other, 1024)


def test_values_of_old_runs_never_change():
    draws = Draws(42, torch.tensor([0, 1, 2**40]))
    assert draws.bits("crop").tolist() == GOLDEN_BITS
    assert draws.integers("crop", -4, 5, count=2).tolist() == GOLDEN_INTEGERS
    assert draws.uniform("jitter").mul(2**24).tolist() == GOLDEN_UNIFORM
    assert draws.bernoulli("flip", 0.5).tolist() == GOLDEN_BERNOULLI


def test_bits_are_those_of_splitmix64():
    positions = torch.tensor([0, 1, 5, 2**31, 2**47 + 3])
    first = Draws(9, torch.tensor([0])).bits("x").item() & MASK
    start = invert_splitmix64(first)
    for position, bits in zip(positions.tolist(), Draws(9, positions).bits("x").tolist(), strict=True):
        assert bits & MASK == splitmix64((start + position * 0x9E3779B97F4A7C15) & MASK)


def invert_splitmix64(out):
    def unshift(x, k):
        y = x
        for _ in range(64 // k):
            y = x ^ (y >> k)
        return y

    out = unshift(out, 31) * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    out = unshift(out, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    return unshift(out, 30)


def test_a_draw_depends_on_the_position_only():
    whole = Draws(1, POSITIONS[:1000])
    pieces = [Draws(1, part) for part in POSITIONS[:1000].split(77)]
    assert torch.cat([d.bits("a") for d in pieces]).equal(whole.bits("a"))
    assert torch.cat([d.uniform("b", 3) for d in pieces]).equal(whole.uniform("b", 3))
    order = torch.randperm(1000)
    assert Draws(1, order).uniform("b", 3).equal(whole.uniform("b", 3)[order])


def test_asking_changes_nothing():
    positions = POSITIONS[:100].clone()
    draws = Draws(1, positions)
    first = draws.uniform("a")
    draws.bits("b")
    draws.integers("a", 0, 7, 2)
    assert draws.uniform("a").equal(first)
    assert positions.equal(POSITIONS[:100])


def test_draw_k_does_not_depend_on_the_count():
    draws = Draws(1, POSITIONS[:100])
    assert draws.bits("a", 5)[:, :2].equal(draws.bits("a", 2))
    assert draws.bits("a", 5)[:, 0].equal(draws.bits("a"))
    assert draws.integers("a", 0, 9, 1)[:, 0].equal(draws.integers("a", 0, 9))


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("first", [0, 10**12])
def test_draws_are_uniform(seed, first):
    draws = Draws(seed, POSITIONS + first)
    uniform = draws.uniform("u")
    assert uniform.dtype == torch.float32
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert even((uniform * 256).long(), 256)
    assert even((uniform * 2**24).long() % 256, 256)
    assert even(draws.integers("i", 0, 9), 9)
    assert even(draws.integers("i", -3, 1000) + 3, 1003)
    assert even(draws.bits("b") & 255, 256)
    assert even((draws.bits("b") >> 56) & 255, 256)
    assert even(draws.bernoulli("f", 0.5).long(), 2)


def test_draws_are_independent():
    draws = Draws(3, POSITIONS)

    def cell(name, position=0, seed=3, count=None):
        return Draws(seed, POSITIONS + position).integers(name, 0, 32, count)

    assert independent(cell("a"), cell("b"))
    assert independent(cell("a"), cell("a", seed=4))
    for distance in (1, 2, 128, 50_000):
        assert independent(cell("a"), cell("a", position=distance))
    several = cell("a", count=3)
    assert independent(several[:, 0], several[:, 1])
    assert independent(several[:, 1], several[:, 2])
    assert independent(several[1:, 0], several[:-1, 1])
    u = torch.stack([draws.uniform(name) for name in "abcdefgh"])
    correlation = torch.corrcoef(u).fill_diagonal_(0).abs().max()
    assert correlation < 5 / len(POSITIONS) ** 0.5


def test_every_bit_is_fair():
    bits = Draws(5, POSITIONS).bits("x")
    ones = torch.stack([((bits >> k) & 1).sum() for k in range(64)]).double()
    assert (ones - len(POSITIONS) / 2).abs().max() < 5 * len(POSITIONS) ** 0.5 / 2


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_bernoulli_has_its_probability(p):
    share = Draws(2, POSITIONS).bernoulli("f", p)
    assert share.dtype == torch.bool
    error = 5 * (p * (1 - p) / len(POSITIONS)) ** 0.5
    assert abs(share.double().mean().item() - p) <= error


def test_integers_reach_both_ends_of_a_wide_range():
    values = Draws(2, POSITIONS).integers("i", -(2**30), 2**30)
    assert values.min() < -(2**30) + 2**18
    assert 2**30 - 2**18 < values.max() < 2**30
    assert Draws(2, POSITIONS[:5]).integers("i", 7, 8).tolist() == [7] * 5


def test_impossible_draws_are_refused():
    draws = Draws(0, POSITIONS[:2])
    for low, high in [(0, 0), (5, 4), (0, 2**31 + 1)]:
        with pytest.raises(ConfigError, match="'i'"):
            draws.integers("i", low, high)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="'f'"):
            draws.bernoulli("f", p)


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    Draws(0, POSITIONS[:10]).uniform("x", 2)
    assert torch.random.get_rng_state().equal(before)


def test_normal_draws_are_normal_to_the_tails():
    drawn = Draws(3, torch.arange(2**20)).normal("noise")
    assert drawn.dtype == torch.float32
    assert Draws(3, POSITIONS).normal("noise", 3)[:, 0].equal(drawn[: len(POSITIONS)])
    moments = [(drawn.double() ** k).mean().item() for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.02)
    # the distribution function of what is drawn is uniform
    cells = (torch.special.ndtr(drawn.double()) * 1024).long()
    assert even(cells, 1024)
    assert independent(cells[: len(POSITIONS)] // 32, Draws(3, POSITIONS).integers("crop", 0, 32))


def test_quantiles_between_the_places_of_the_table():
    place = torch.cat([torch.arange(1, 4001, 2), 2 ** torch.arange(1, 41) + 1, 2**41 - 1 - 2 * torch.arange(4000)])
    quantiles, steps = _quantiles(torch.device("cpu"))
    bits = place.double().view(torch.int64)
    segment = (bits >> SEGMENT_SHIFT) - FIRST_SEGMENT
    got = quantiles[segment] + steps[segment] * (bits & ((1 << SEGMENT_SHIFT) - 1)).double() * 2.0**-SEGMENT_SHIFT
    torch.testing.assert_close(got, -torch.special.ndtri(place.double() * 2.0**-42), atol=1e-5, rtol=0)


def test_normal_values_of_old_runs_never_change():
    draws = Draws(42, torch.tensor([0, 1, 2**40]))
    assert draws.normal("noise").tolist() == GOLDEN_NORMAL
