"""Contract C1: the content of a global batch depends on seed, length, batch size and step only."""

from __future__ import annotations

import tracemalloc
from itertools import islice

import numpy as np
import pytest

from distkit.config import BatchSplit
from distkit.data import SampleStream, microbatch_start
from distkit.data.stream.permutation import permute
from distkit.data.stream.requests import BLOCK, training_requests
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


def test_requests_in_blocks_give_what_the_positions_say():
    n, size = 1000, 24
    for world_size, accum_steps in ((1, 1), (2, 1), (2, 6), (12, 2)):
        split = BatchSplit(
            global_batch_size=size, microbatch_size=size // world_size // accum_steps, world_size=world_size
        )
        stream = SampleStream(1, n, size)
        for rank, step, accum_index in ((0, 0, 0), (world_size - 1, 7, accum_steps - 1)):
            requests = training_requests(stream, split, rank, step, accum_index)
            number = step * accum_steps + accum_index
            # over the end of an epoch, and of the first block
            for count, request in enumerate(islice(requests, 2 * BLOCK // split.microbatch_size)):
                where = divmod(number + count, accum_steps)
                assert request.start == microbatch_start(where[0], split, rank, where[1])
                if count % 97 < 3:
                    assert (request.indices == stream.indices(request.start, split.microbatch_size)).all()


def test_indices_of_a_request_belong_to_the_caller():
    stream, split = SampleStream(1, 1000, 10), BatchSplit(global_batch_size=10, microbatch_size=10, world_size=1)
    for request in islice(training_requests(stream, split, 0, 0, 0), 200):
        assert request.indices.tolist() == stream.indices(request.start, 10).tolist()
        request.indices[:] = -1


def test_batches_larger_than_the_block():
    size = 2 * BLOCK
    stream, split = SampleStream(1, 10**9, size), BatchSplit(global_batch_size=size, microbatch_size=size, world_size=1)
    for step, request in enumerate(islice(training_requests(stream, split, 0, 0, 0), 4)):
        some = np.arange(0, size, 5000)
        assert (request.indices[some] == permute(1, 0, 10**9, some + step * size)).all()


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
    tracemalloc.start()
    for request in islice(training_requests(stream, split, 12_345, 0, 0), 200):
        assert (request.indices == permute(0, 0, 10**12, request.start + np.arange(64))).all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 8 * BLOCK // 2


def test_positions_are_computed_once_a_block(monkeypatch):
    calls = []
    stream, split = SampleStream(0, 50_000, 128), BatchSplit(global_batch_size=128, microbatch_size=128, world_size=1)
    real = stream.indices_at
    monkeypatch.setattr(stream, "indices_at", lambda positions: calls.append(positions.size) or real(positions))
    list(islice(training_requests(stream, split, 0, 0, 0), 1 + 2 * BLOCK // 128))
    assert calls == [128, BLOCK, BLOCK]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((-1, 5, 5), ConfigError), ((0, 5, 0), ConfigError), ((0, 0, 5), DataError), ((0, 2**48 + 1, 5), DataError)],
)
def test_impossible_streams_are_refused(arguments, error):
    with pytest.raises(error):
        SampleStream(*arguments)
