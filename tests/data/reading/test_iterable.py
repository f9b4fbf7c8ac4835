"""Iterable data sets: in order, for ever, continued exactly, and only in the same world."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, get_worker_info

from distkit.config import BatchSplit
from distkit.data.reading.endless import EndlessSamples
from distkit.data.reading.iterable import IterableSource
from distkit.errors import ConfigError, DataError, TrainingError

CPU = torch.device("cpu")
pytest.importorskip("torchdata", reason="torchdata is not installed")


class Plain(IterableDataset):
    """Numbers of one share; without a state, so that a resume reads again."""

    def __init__(self, rank, world_size, total=23):
        self.numbers = list(range(rank, total, world_size))
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def mine(self):
        worker = get_worker_info()
        return self.numbers[worker.id :: worker.num_workers] if worker else self.numbers

    def __iter__(self):
        for number in self.mine():
            yield torch.tensor([number, self.epoch])


class Counted(Plain):
    """The place is state of the data set; one dictionary that changes, as careless code has it."""

    def __init__(self, rank, world_size, total=23):
        super().__init__(rank, world_size, total)
        self.state = {"place": 0}
        self.read = 0

    def __iter__(self):
        numbers = self.mine()
        while self.state["place"] < len(numbers):
            self.state["place"] += 1
            self.read += 1
            yield torch.tensor([numbers[self.state["place"] - 1], self.epoch])
        self.state["place"] = 0

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state.update(state)


class ByIterator(Plain):
    """The place is state of the iterator."""

    class Numbers:
        def __init__(self, samples):
            self.numbers, self.epoch, self.place = samples.mine(), samples.epoch, 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.place == len(self.numbers):
                raise StopIteration
            self.place += 1
            return torch.tensor([self.numbers[self.place - 1], self.epoch])

        def state_dict(self):
            return {"place": self.place}

        def load_state_dict(self, state):
            self.place = state["place"]

    def __iter__(self):
        return self.Numbers(self)


KINDS = [Plain, Counted, ByIterator]


def source(build, rank=0, world_size=1, microbatch_size=3, accum_steps=1, **options):
    total = microbatch_size * world_size * accum_steps
    split = BatchSplit(global_batch_size=total, microbatch_size=microbatch_size, world_size=world_size)
    return IterableSource(build=build, seed=1, split=split, rank=rank, device=CPU, **options)


def endless(numbers, count):
    """What a share must give: its numbers again and again, with the epoch."""
    return [[numbers[i % len(numbers)], i // len(numbers)] for i in range(count)]


def read(one, steps, accum_steps=1):
    found = [one.microbatch(step, i) for step in steps for i in range(accum_steps)]
    return torch.cat(found).tolist() if found else []


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_reads_its_share_for_ever(kind):
    for rank in range(2):
        one = source(kind, rank, world_size=2, accum_steps=2)
        assert read(one, range(6), accum_steps=2) == endless(list(range(rank, 23, 2)), 36)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    total=st.integers(1, 12),
    stops=st.lists(st.integers(0, 4), max_size=3),
    microbatch_size=st.integers(1, 5),
)
def test_a_resume_is_exact(kind, total, stops, microbatch_size):
    def build(rank, world_size):
        return kind(rank, world_size, total)

    found, step = [], 0
    one = source(build, microbatch_size=microbatch_size)
    for steps in [*stops, 3]:
        found += read(one, range(step, step + steps))
        step += steps
        state = json.loads(json.dumps(one.state_dict()))
        one.microbatch(step, 0)
        one = source(build, microbatch_size=microbatch_size)
        one.load_state_dict(state)
        assert one.state_dict() == state
    assert found == endless(list(range(total)), len(found))


@pytest.mark.parametrize("kind", KINDS)
def test_worker_processes_are_resumed_and_ended(kind):
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    whole = source(kind, num_workers=2)
    expected = read(whole, range(13))
    assert {number for number, epoch in expected if epoch == 0} == set(range(23))
    one = source(kind, num_workers=2)
    found = read(one, range(7))
    state = json.loads(json.dumps(one.state_dict()))
    one.close()
    assert one.state_dict() == state
    found += read(one, range(7, 9))
    other = source(kind, num_workers=2)
    other.load_state_dict(state)
    assert read(other, range(7, 13)) == expected[21:]
    assert found == expected[:27]
    for each in (whole, one, other):
        each.close()
    gc.collect()
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_a_set_with_a_state_is_not_read_again():
    built = []

    def build(rank, world_size):
        built.append(Counted(rank, world_size))
        return built[-1]

    one = source(build)
    read(one, range(5))
    other = source(build)
    other.load_state_dict(one.state_dict())
    read(other, [5])
    assert built[-1].read == 3


def test_reading_is_in_order_only():
    one = source(Plain, accum_steps=2)
    for step, accum_index in [(1, 0), (0, 1)]:
        with pytest.raises(ConfigError, match="only be read in order"):
            one.microbatch(step, accum_index)
    first = one.microbatch(0, 0)
    with pytest.raises(ConfigError, match="got: .*step 0, microbatch 0"):  # noqa: RUF043
        one.microbatch(0, 0)
    assert not one.microbatch(0, 1).equal(first)


@pytest.mark.parametrize(
    ("name", "now"),
    [
        ("world_size", {"world_size": 4}),
        ("rank", {"rank": 0}),
        ("microbatch_size", {"microbatch_size": 2}),
        ("accum_steps", {"accum_steps": 2}),
        ("num_workers", {"num_workers": 1}),
    ],
)
def test_another_world_is_refused(name, now):
    usual = {"rank": 1, "world_size": 2}
    one = source(Plain, **usual)
    read(one, range(2))
    with pytest.raises(ConfigError, match=f"a different {name}") as caught:
        source(Plain, **{**usual, **now}).load_state_dict(one.state_dict())
    assert caught.value.exit_code == 2
    assert f"start it with {name} " in str(caught.value)


def test_augmentation_is_keyed_by_position():
    seen = []

    def augment(batch, draws):
        seen.append(draws.positions.tolist())
        return batch + draws.integers("add", 100, 1000)[:, None]

    plain, one = source(Plain, 1, 2, accum_steps=2), source(Plain, 1, 2, accum_steps=2, augment=augment)
    before, after = torch.tensor(read(plain, range(2), 2)), torch.tensor(read(one, range(2), 2))
    assert seen == [[3, 4, 5], [9, 10, 11], [15, 16, 17], [21, 22, 23]]
    assert (after - before)[:, 0].min() >= 100
    again = source(Plain, 1, 2, accum_steps=2, augment=augment)
    assert read(again, range(2), 2) == after.tolist()


def test_one_shard_with_two_workers_says_what_to_type():
    one = source(lambda rank, world: Plain(rank, world, 1), microbatch_size=1, num_workers=2)
    with pytest.raises(DataError, match=r"worker 1 of 2(.|\n)*type: +--data\.num-workers 1"):
        read(one, range(4))
    one.close()
    one = source(lambda rank, world: Plain(rank, world, 1), microbatch_size=1, num_workers=1)
    assert read(one, range(3)) == endless([0], 3)
    one.close()


def test_empty_shares_are_named():
    with pytest.raises(DataError, match=r"no sample in epoch 0 at rank 3\n"):
        source(lambda rank, world: Plain(rank, world, 3), 3, 4).microbatch(0, 0)
    one = source(lambda rank, world: Plain(rank, world, 1), num_workers=2)
    with pytest.raises(DataError, match="rank 0, worker 1 of 2"):
        read(one, range(2))
    one.close()


def test_a_set_that_became_shorter_is_named():
    one = source(Plain)
    read(one, range(5))
    other = source(lambda rank, world: Plain(rank, world, 4))
    other.load_state_dict(one.state_dict())
    with pytest.raises(DataError, match=r"shorter at rank 0\n.*15 samples"):
        other.microbatch(5, 0)


@pytest.mark.parametrize("state", [{"a": torch.zeros(1)}, {"a": (1, 2)}, {1: 2}, {"a": b"b"}])
def test_a_state_that_a_checkpoint_cannot_hold_is_refused(state):
    class Odd(Plain):
        def state_dict(self):
            return state

        def load_state_dict(self, state):
            """Takes anything."""

    one = source(Odd)
    read(one, range(1))
    with pytest.raises(DataError, match="checkpoint cannot hold"):
        one.state_dict()


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    one = source(Plain, num_workers=1)
    read(one, range(2))
    one.close()
    assert torch.random.get_rng_state().equal(before)


def test_without_torchdata_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    with pytest.raises(ConfigError, match=r"pip install 'distkit\[streaming\]'"):
        source(Plain)


def test_impossible_numbers_are_refused():
    for bad in ({"num_workers": -1}, {"prefetch_depth": 0}):
        with pytest.raises(ConfigError, match="--data"):
            source(Plain, **bad)


def test_endless_samples_need_no_loader():
    samples = EndlessSamples(Plain, 0, 4)
    taken = [next(iter(samples)).tolist() for _ in range(8)]
    assert taken == endless([0, 4, 8, 12, 16, 20], 8)
    assert samples.state_dict() == {"epoch": 1, "given": 2, "samples": None, "iterator": None}


class Chance(Plain):
    """A random number for each sample."""

    def __iter__(self):
        for number in self.mine():
            yield torch.stack([torch.tensor(float(number)), torch.rand(())])


def test_ranks_and_resumes_draw_different_numbers():
    ranks = [source(Chance, rank=rank, world_size=2, num_workers=1) for rank in range(2)]
    drawn = [each.microbatch(0, 0)[:, 1].tolist() for each in ranks]
    assert not set(drawn[0]) & set(drawn[1])
    for each in ranks:
        each.close()


class Dies(Plain):
    def __iter__(self):
        yield torch.tensor([0, 0])
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_named():
    one = source(Dies, microbatch_size=1, num_workers=1)
    with pytest.raises(TrainingError, match="a data worker died"):
        read(one, range(9))
    one.close()


ORPHAN = """
import time, torch
from torch.utils.data import IterableDataset
from distkit.config import BatchSplit
from distkit.data.reading.iterable import IterableSource

class Stuck(IterableDataset):
    def __init__(self, rank, world_size): pass
    def __iter__(self):
        print("reading", flush=True)
        time.sleep(120)
        yield torch.tensor(0)

split = BatchSplit(global_batch_size=1, microbatch_size=1, world_size=1)
IterableSource(build=Stuck, seed=1, split=split, rank=0, device=torch.device("cpu"), num_workers=1).microbatch(0, 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stuck_worker_does_not_outlive_its_parent(how):
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "reading\n"
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert workers
    parent.send_signal(how)
    parent.communicate(timeout=30)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
