"""Contract C1: the content of a global batch depends on seed, length, batch size and step only."""

from __future__ import annotations

import time

import numpy as np
import pytest

from distkit.config import BatchSplit
from distkit.data import SampleStream, microbatch_start
from distkit.data.stream.permutation import permute
from distkit.data.stream.stream import BLOCK
from distkit.errors import ConfigError, DataError


def reference(seed, n, start, count):
    return [int(permute(seed, p // n, n, np.array([p % n]))[0]) for p in range(start, start + count)]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 10**12])
def test_indices_follow_the_definition(n):
    stream = SampleStream(4, n, 8)
    for start, count in [(0, 8), (8, 8), (16, 8), (5, 20), (3 * n - 1, 2), (2 * n, 5), (16, 8), (24, 8), (24, 8)]:
        got = stream.indices(start, count)
        assert got.dtype == np.int64
        assert got.tolist() == reference(4, n, start, count)


def test_every_epoch_has_every_sample_once():
    n, size = 101, 8
    stream = SampleStream(0, n, size)
    steps = 3 * n
    seen = np.concatenate([stream.global_batch(step) for step in range(steps)]).reshape(-1, n)
    assert (np.sort(seen, axis=1) == np.arange(n)).all()
    assert len(np.unique(seen, axis=0)) == len(seen)


def test_sequential_strided_and_random_access_agree():
    n, count = 1000, 24
    plain = np.concatenate([SampleStream(1, n, 24).indices(start, 1000) for start in range(0, 120_000, 1000)])
    rng = np.random.default_rng(0)
    for stride in (24, 48, 24 * 13):
        stream = SampleStream(1, n, 24)
        for start in range(0, 119_000, stride):
            assert (stream.indices(start, count) == plain[start : start + count]).all()
        for start in rng.integers(0, 119_000, 200).tolist():
            assert (stream.indices(start, count) == plain[start : start + count]).all()


def test_a_change_of_count_or_direction_is_not_served_from_the_block():
    stream = SampleStream(1, 1000, 10)
    for start in range(0, 100, 10):
        stream.indices(start, 10)
    assert stream.indices(100, 9).tolist() == reference(1, 1000, 100, 9)
    assert stream.indices(20, 10).tolist() == reference(1, 1000, 20, 10)
    assert stream.indices(13, 10).tolist() == reference(1, 1000, 13, 10)


def test_answers_belong_to_the_caller():
    stream = SampleStream(1, 1000, 10)
    for start in range(0, 50, 10):
        stream.indices(start, 10)[:] = -1
    assert stream.indices(40, 10).tolist() == reference(1, 1000, 40, 10)


def test_batches_larger_than_the_block():
    stream = SampleStream(1, 10**9, BLOCK * 2)
    for step in range(4):
        got = stream.global_batch(step)
        some = np.arange(0, 2 * BLOCK, 5000)
        positions = some + step * 2 * BLOCK
        assert (got[some] == permute(1, 0, 10**9, positions)).all()


@pytest.mark.parametrize(("world_size", "microbatch_size"), [(1, 48), (1, 6), (2, 6), (3, 16), (4, 1), (8, 2), (16, 3)])
def test_the_global_batch_does_not_depend_on_how_it_is_split(world_size, microbatch_size):
    n, total = 50, 48
    split = BatchSplit(global_batch_size=total, microbatch_size=microbatch_size, world_size=world_size)
    expected = SampleStream(3, n, total)
    streams = [SampleStream(3, n, total) for _ in range(world_size)]
    for step in range(12):
        batch = np.full(total, -1)
        for rank in range(world_size):
            for accum_index in range(split.accum_steps):
                start = microbatch_start(step, split, rank, accum_index)
                offset = start - step * total
                assert (batch[offset : offset + microbatch_size] == -1).all()
                batch[offset : offset + microbatch_size] = streams[rank].indices(start, microbatch_size)
        assert (batch == expected.global_batch(step)).all()


def test_a_rank_among_many_reads_only_its_share_of_a_huge_set():
    split = BatchSplit(global_batch_size=16_384 * 64, microbatch_size=64, world_size=16_384)
    stream = SampleStream(0, 10**12, split.global_batch_size)
    begin = time.perf_counter()
    for step in range(200):
        start = microbatch_start(step, split, 12_345, 0)
        got = stream.indices(start, 64)
    seconds = time.perf_counter() - begin
    assert (got == permute(0, 0, 10**12, start + np.arange(64))).all()
    assert seconds < 1.0


def test_a_step_costs_next_to_nothing():
    stream = SampleStream(0, 50_000, 128)
    begin = time.perf_counter()
    for step in range(2000):
        stream.global_batch(step)
    assert (time.perf_counter() - begin) / 2000 < 100e-6


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((-1, 5, 5), ConfigError), ((0, 5, 0), ConfigError), ((0, 0, 5), DataError), ((0, 2**48 + 1, 5), DataError)],
)
def test_impossible_streams_are_refused(arguments, error):
    with pytest.raises(error):
        SampleStream(*arguments)
