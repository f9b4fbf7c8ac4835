"""The keyed permutation: a bijection at every length, uniform, independent between epochs and seeds, never changing."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from distkit.data.stream import permutation
from distkit.data.stream.permutation import MAX_LENGTH, invert, permute
from distkit.errors import ConfigError, DataError


def whole(seed, epoch, n):
    return permute(seed, epoch, n, np.arange(n))


def chi_square_ok(counts, expected):
    """Chi-square with cells - 1 degrees of freedom, within five standard deviations either way."""
    cells = counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    return abs(statistic - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1))


GOLDEN = {
    (0, 0, 1): [0],
    (0, 0, 2): [1, 0],
    (0, 0, 10): [1, 3, 4, 2, 9, 5, 6, 8, 7, 0],
    (0, 1, 10): [8, 6, 5, 9, 2, 1, 0, 3, 4, 7],
    (1, 0, 10): [2, 0, 9, 5, 7, 1, 4, 6, 3, 8],
    (2**63 - 1, 7, 50_000): [30449, 5206, 18493, 38982, 15421, 23552, 38383, 43655, 33548, 12808],
    (42, 3, 10**12): [836760254999, 790869216900, 420019417826, 320930102956],
    (42, 3, 2**48): [77298341991211, 236168682608875, 223283371593265, 169835004082890],
}


@pytest.mark.parametrize(("seed", "epoch", "n"), GOLDEN)
def test_the_stream_of_old_runs_never_changes(seed, epoch, n):
    expected = GOLDEN[seed, epoch, n]
    assert permute(seed, epoch, n, np.arange(len(expected))).tolist() == expected


def test_bijection_for_every_length_up_to_2000():
    for n in range(1, 2001):
        seen = np.zeros(n, bool)
        seen[whole(n, 3, n)] = True
        assert seen.all(), n


@pytest.mark.parametrize("n", [2**12, 2**12 + 1, 2**16 - 1, 50_000, 2**17 + 1, 999_983, 2**20])
def test_bijection_of_whole_epochs(n):
    out = whole(1, 0, n)
    assert out.dtype == np.int64
    assert (np.bincount(out, minlength=n) == 1).all()


@pytest.mark.parametrize("n", [1, 2, 3, 17, 2**31 - 1, 2**31 + 1, 2**40 + 12_345, 10**12, 2**47 + 1, 2**48 - 1, 2**48])
def test_the_inverse_undoes_it_at_any_length(n):
    places = np.random.default_rng(n).integers(0, n, 20_000)
    places[:2] = 0, n - 1
    indices = permute(5, 9, n, places)
    assert indices.min() >= 0
    assert indices.max() < n
    assert (invert(5, 9, n, indices) == places).all()
    assert (permute(5, 9, n, invert(5, 9, n, places)) == places).all()


@pytest.mark.parametrize("n", [3, 10, 64, 1000])
def test_every_index_is_as_likely_at_every_place(n):
    counts = np.zeros((min(n, 6), n), int)
    epochs = max(2000, 40 * n)
    for place in range(len(counts)):
        counts[place] = np.bincount(permute(7, np.arange(epochs), n, np.full(epochs, place)), minlength=n)
    assert chi_square_ok(counts, epochs / n)


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_every_order_is_as_likely(n):
    epochs = 40_000
    orders = permute(11, np.repeat(np.arange(epochs), n), n, np.tile(np.arange(n), epochs)).reshape(epochs, n)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    total = int(np.prod(np.arange(1, n + 1)))
    assert len(counts) == total
    assert chi_square_ok(counts, epochs / total)


@pytest.mark.parametrize("n", [10**12, 2**40 + 1])
def test_large_lengths_fill_their_range_evenly(n):
    cells = np.bincount(permute(1, 2, n, np.arange(2**17)) * 256 // n, minlength=256)
    assert chi_square_ok(cells, 2**17 / 256)
    cells = np.bincount(permute(1, 2, n, np.arange(2**17)) % 256, minlength=256)
    assert chi_square_ok(cells, 2**17 / 256)


@pytest.mark.parametrize(("one", "other"), [((3, 0), (3, 1)), ((3, 0), (4, 0)), ((0, 1), (1, 0))])
def test_epochs_and_seeds_are_independent(one, other):
    n = 2**16 - 3
    a, b = whole(*one, n), whole(*other, n)
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
    assert (a == b).sum() < 12  # Poisson with mean 1
    cells = np.bincount((a * 32 // n) * 32 + b * 32 // n, minlength=1024)
    assert chi_square_ok(cells, n / 1024)


@pytest.mark.parametrize("n", [9, 33, 100, 5000, 50_000])
@pytest.mark.parametrize("distance", [1, 2, 4])
def test_two_places_are_independent_over_epochs(n, distance):
    epochs = np.arange(30_000)
    one = permute(13, epochs, n, np.full(epochs.size, 0))
    other = permute(13, epochs, n, np.full(epochs.size, distance))
    steps = (one - other) % n
    assert steps.min() > 0
    cells = min(n - 1, 64)
    assert chi_square_ok(
        np.bincount((steps - 1) * cells // (n - 1), minlength=cells), even_cells(n - 1, cells) * epochs.size
    )


def even_cells(n, cells):
    """Share of 0..n-1 that falls into each of `cells` cells."""
    return np.bincount(np.arange(n) * cells // n, minlength=cells) / n


def test_neighbouring_places_are_independent():
    n = 2**16 - 3
    a = whole(8, 0, n)
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 5 / np.sqrt(n)
    assert (np.diff(a) == 1).sum() < 12


def test_one_epoch_for_each_place():
    n = 37
    epochs = np.array([4, 0, 4, 9, 0])
    places = np.array([1, 1, 36, 0, 5])
    expected = [int(whole(2, epoch, n)[place]) for epoch, place in zip(epochs, places, strict=True)]
    assert permute(2, epochs, n, places).tolist() == expected
    assert invert(2, epochs, n, np.array(expected)).tolist() == places.tolist()


def test_no_places_give_no_indices():
    assert permute(0, 0, 5, np.arange(0)).shape == (0,)
    assert permute(0, np.arange(0), 5, np.arange(0)).shape == (0,)


def test_places_are_not_changed():
    places = np.arange(100)
    permute(0, 0, 100, places)
    assert (places == np.arange(100)).all()


@pytest.mark.parametrize("n", [0, -1, MAX_LENGTH + 1])
def test_impossible_lengths_are_refused(n):
    with pytest.raises(DataError, match="length"):
        permute(0, 0, n, np.arange(1))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(ConfigError, match="--seed"):
        permute(seed, 0, 10, np.arange(1))


@pytest.mark.parametrize("place", [-1, 10])
def test_places_outside_are_refused(place):
    with pytest.raises(IndexError, match=str(place)):
        permute(0, 0, 10, np.array([place]))


def test_a_batch_of_a_trillion_samples_is_cheap():
    places = np.random.default_rng(0).integers(0, 10**12, 4096)
    permute(0, 0, 10**12, places)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        permute(0, 0, 10**12, places)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2e-3


def test_memory_does_not_grow_with_the_length():
    peaks = []
    for n in (10**4, 10**12):
        places = np.arange(4096)
        permute(0, 0, n, places)
        tracemalloc.start()
        permute(0, 0, n, places)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 48 * 4096


def test_it_does_not_import_torch():
    # the package around it may: this file is pure numpy
    assert "torch" not in Path(permutation.__file__).read_text()
