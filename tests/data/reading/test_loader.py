"""From the stream to a batch: the same samples and pixels for any cut, placement, number of workers and restart."""

import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distkit.config import BatchSplit, DataConfig, Placement
from distkit.data import Augmentation, Dataset, MapDataset, SampleStream, as_dataset, synthetic
from distkit.data.reading.loader import EvaluationLoader, Loader
from distkit.data.reading.placement import Reading, choose, place
from distkit.data.reading.workers import KeyedSamples, Read, packed_small, sample_name, untouched_generators
from distkit.errors import ConfigError, DataError, TrainingError
from distkit.runtime.process import available_cores

CPU = torch.device("cpu")
AUGMENTATION = Augmentation(crop_padding=4, flip=True, cutout=8)
IMAGES = synthetic("train", 0, num_train=200, num_test=10).augmented(AUGMENTATION)


class Numbers:
    """A map-style set whose samples depend on all three global generators, as random transforms do."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        noise = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)
        return index, noise


def open_loader(
    dataset: object, total: int, micro: int, world_size: int, rank: int, data: DataConfig, last: bool = False
) -> Loader:
    split = BatchSplit(global_batch_size=total, microbatch_size=micro, world_size=world_size)
    placed = place(as_dataset(dataset), Reading(data=data, seed=5, device=CPU, channels_last=last))
    return Loader(placed.fetcher, SampleStream(5, len(placed.dataset), total), split, rank)


def read(loader: Loader, steps: list[int]) -> list[tuple[Tensor, ...]]:
    with closing(loader):
        return [loader.microbatch(step, a) for step in steps for a in range(loader.split.accum_steps)]  # type: ignore[misc]


def global_batches(
    dataset: object, total: int, micro: int, world_size: int, steps: list[int], data: DataConfig
) -> list[tuple[Tensor, ...]]:
    """Each step's global batch, put together from what the ranks read."""
    ranks = [read(open_loader(dataset, total, micro, world_size, r, data), steps) for r in range(world_size)]
    accum_steps = total // micro // world_size
    batches = []
    for number in range(len(steps)):
        parts = [ranks[r][number * accum_steps + a] for a in range(accum_steps) for r in range(world_size)]
        batches.append(tuple(torch.cat(column) for column in zip(*parts, strict=True)))
    return batches


def assert_equal(mine: list[tuple[Tensor, ...]], theirs: list[tuple[Tensor, ...]]) -> None:
    assert len(mine) == len(theirs)
    for batch, other in zip(mine, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


@st.composite
def cuts(draw: st.DrawFn, most: int = 4) -> tuple[int, int, int, list[int]]:
    """(total, micro, world_size, steps): steps with jumps, as restarts make them."""
    world_size, accum_steps, micro = (draw(st.integers(1, most)) for _ in range(3))
    runs = draw(st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 4)), min_size=1, max_size=most - 1))
    return world_size * accum_steps * micro, micro, world_size, [s + i for s, count in runs for i in range(count)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cut=cuts(), size=st.integers(64, 200), placement=st.sampled_from(["device", "host"]))
def test_pixels_do_not_depend_on_cut_placement_or_restart(
    cut: tuple[int, int, int, list[int]], size: int, placement: Placement
) -> None:
    total, micro, world_size, steps = cut
    images = synthetic("train", 0, num_train=size, num_test=1).augmented(AUGMENTATION) if size != 200 else IMAGES
    reference = global_batches(images, total, total, 1, steps, DataConfig(placement="device"))
    assert_equal(global_batches(images, total, micro, world_size, steps, DataConfig(placement=placement)), reference)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cut=cuts(most=2), size=st.integers(64, 10**6), workers=st.integers(1, 3), depth=st.integers(1, 3))
@pytest.mark.slow
def test_random_transforms_in_workers_are_functions_of_the_position(
    cut: tuple[int, int, int, list[int]], size: int, workers: int, depth: int
) -> None:
    total, micro, world_size, steps = cut
    split = BatchSplit(global_batch_size=total, microbatch_size=total, world_size=1)
    alone = place(as_dataset(Numbers(size)), Reading(data=DataConfig(), seed=5, device=CPU, in_process=True))
    reference = read(Loader(alone.fetcher, SampleStream(5, size, total), split, 0), steps)
    data = DataConfig(num_workers=workers, prefetch_depth=depth)
    assert_equal(global_batches(Numbers(size), total, micro, world_size, steps, data), reference)
    stream = SampleStream(5, size, total)
    for step, (indices, noise) in zip(steps, reference, strict=True):
        assert indices.tolist() == stream.global_batch(step).tolist()
        assert len(noise.unique()) == noise.numel()


def test_reading_in_process_leaves_the_global_generators_alone() -> None:
    placed = place(as_dataset(Numbers(9)), Reading(data=DataConfig(), seed=5, device=CPU, in_process=True))
    split = BatchSplit(global_batch_size=3, microbatch_size=3, world_size=1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index,union-attr]
    read(Loader(placed.fetcher, SampleStream(5, 9, 3), split, 0), [0, 1])
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    assert torch.equal(states[2], torch.get_rng_state())
    with untouched_generators():
        random.random()
    assert states[0] == random.getstate()


def test_worker_loaders_do_not_consume_the_global_generator() -> None:
    before = torch.get_rng_state()
    read(open_loader(Numbers(20), 4, 4, 1, 0, DataConfig(num_workers=1)), [0])
    assert torch.equal(before, torch.get_rng_state())


def test_channels_last_changes_the_layout_only() -> None:
    for placement in ("device", "host"):
        data = DataConfig(placement=placement)  # type: ignore[arg-type]
        (plain,), (last,) = (read(open_loader(IMAGES, 24, 24, 1, 0, data, flag), [3]) for flag in (False, True))
        assert torch.equal(plain[0], last[0])
        assert last[0].is_contiguous(memory_format=torch.channels_last)
        assert not plain[0].is_contiguous(memory_format=torch.channels_last)


def test_evaluation_reads_every_sample_once_and_in_order() -> None:
    for dataset in (IMAGES.augmented(Augmentation()), Numbers(200)):
        for num_workers in (None, 2):
            data = DataConfig(num_workers=num_workers if isinstance(dataset, Numbers) else None)
            placed = place(as_dataset(dataset), Reading(data=data, seed=5, device=CPU))
            loader = EvaluationLoader(placed.fetcher, len(placed.dataset))
            with closing(loader.open(range(31, 200), 17)) as batches:
                seen = list(iter(lambda: next(batches, None), None))  # used at once
            sizes = [len(batch[0]) for batch in seen]
            assert sizes == [17] * 9 + [16]
            if isinstance(dataset, Numbers):
                assert torch.cat([batch[0] for batch in seen]).tolist() == list(range(31, 200))
            else:
                assert torch.equal(torch.cat([batch[1] for batch in seen]), IMAGES.labels[31:])


def live_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "distkit-prefetch"]


class Broken:
    """A vectorised set that fails at its third batch."""

    def __init__(self) -> None:
        self.calls = 0

    def __len__(self) -> int:
        return 40

    def fetch(self, indices: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise ValueError("the third batch")
        return indices


def test_an_error_in_the_thread_reaches_the_step_and_leaves_no_thread() -> None:
    loader = open_loader(Broken(), 4, 4, 1, 0, DataConfig(placement="host"))
    with pytest.raises(ValueError, match="the third batch"):
        read(loader, [0, 1, 2, 3])
    assert not live_threads()


def test_closing_early_leaves_no_thread_and_no_process() -> None:
    children = len(psutil.Process().children(recursive=True))
    for dataset, data in ((IMAGES, DataConfig(placement="host")), (Numbers(50), DataConfig(num_workers=2))):
        loader = open_loader(dataset, 4, 4, 1, 0, data)
        loader.microbatch(0, 0)
        start = time.monotonic()
        loader.close()
        loader.close()
        assert time.monotonic() - start < 5
        assert not live_threads()
        assert len(psutil.Process().children(recursive=True)) == children
        assert loader.microbatch(7, 0) is not None  # usable again
        loader.close()


class Dies(Numbers):
    """Kills its worker at one sample."""

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        import os

        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_killed_worker_is_named_quickly() -> None:
    loader = open_loader(Dies(8), 4, 4, 1, 0, DataConfig(num_workers=2))
    start = time.monotonic()
    with pytest.raises(TrainingError, match=r"worker died.*\n.*memory"):
        read(loader, [0, 1, 2])
    assert time.monotonic() - start < 15


def test_a_killed_worker_is_seen_when_its_signal_is_not() -> None:
    """As when SIGCHLD comes just before the main thread waits: another thread takes it, and the wait goes on."""
    loader, done, start = (
        open_loader(Dies(8), 4, 4, 1, 0, DataConfig(num_workers=1)),
        threading.Event(),
        time.monotonic(),
    )
    taker = threading.Thread(target=done.wait)
    taker.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        with pytest.raises(TrainingError, match=r"worker died.*\n.*memory"):
            read(loader, [0, 1, 2])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()
        taker.join()
    assert time.monotonic() - start < 15


class Hangs(Numbers):
    """Waits for ever at one sample."""

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        if index == 3:
            time.sleep(60)
        return super().__getitem__(index)

    def fetch(self, indices: Tensor) -> Tensor:
        if (indices == 3).any():
            time.sleep(3)
        return indices


def test_a_data_set_that_hangs_ends_the_run() -> None:
    split = BatchSplit(global_batch_size=4, microbatch_size=4, world_size=1)
    for dataset, data in (
        (MapDataset(Hangs(8)), DataConfig(num_workers=1)),
        (Hangs(8), DataConfig(placement="host")),
    ):
        placed = place(dataset, Reading(data=data, seed=5, device=CPU, timeout_seconds=1.0))
        loader = Loader(placed.fetcher, SampleStream(5, 8, 4), split, 0)
        start = time.monotonic()
        with pytest.raises(TrainingError, match="--timeout-seconds"):
            read(loader, [0, 1, 2])
        assert time.monotonic() - start < 15


class Damaged(Numbers):
    """Samples 2 and 5 cannot be decoded."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.samples = [(f"images/{index}.jpg", 0) for index in range(count)]

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        if index in (2, 5):
            raise OSError("image file is truncated (12 bytes not processed)")
        return super().__getitem__(index)


def test_a_damaged_sample_ends_the_run_and_is_named() -> None:
    with pytest.raises(DataError, match=r"images/[25]\.jpg: OSError: image file is truncated"):
        read(open_loader(Damaged(8), 8, 8, 1, 0, DataConfig(num_workers=1)), [0])


def test_damaged_samples_are_replaced_deterministically_and_capped(caplog: pytest.LogCaptureFixture) -> None:
    skip = DataConfig(num_workers=2, on_corrupt="skip")
    reference = global_batches(Damaged(8), 8, 8, 1, [0, 1, 2], skip)
    assert_equal(global_batches(Damaged(8), 8, 2, 2, [0, 1, 2], skip), reference)
    stream = SampleStream(5, 8, 8)
    for step, (indices, _) in enumerate(reference):
        wanted = stream.global_batch(step).tolist()
        assert [i for i, w in zip(indices.tolist(), wanted, strict=True) if w not in (2, 5)] == [
            w for w in wanted if w not in (2, 5)
        ]
        assert not {2, 5} & set(indices.tolist())
    assert "images/2.jpg" in caplog.text
    with pytest.raises(DataError, match=r"at most --data\.max-corrupt 3"):
        read(open_loader(Damaged(8), 8, 8, 1, 0, replace(skip, max_corrupt=3)), [0, 1, 2])


class AllDamaged(Numbers):
    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        raise OSError("gone")


def test_a_set_of_damaged_samples_only_is_an_error() -> None:
    with pytest.raises(DataError, match="replacements failed too"):
        read(open_loader(AllDamaged(8), 8, 8, 1, 0, DataConfig(num_workers=1, on_corrupt="skip")), [0])


class Buggy(Numbers):
    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        raise KeyError("a bug of the user")


def test_a_bug_in_a_data_set_is_not_taken_for_a_damaged_sample() -> None:
    with pytest.raises(TrainingError, match=r"sample \d: KeyError: 'a bug of the user'\n  at: .*raise KeyError"):
        read(open_loader(Buggy(8), 8, 8, 1, 0, DataConfig(num_workers=1, on_corrupt="skip")), [0])


class Modes(Numbers):
    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.tensor(torch.is_inference_mode_enabled())


def test_workers_are_in_inference_mode_and_their_batches_can_be_trained_on() -> None:
    ((indices, modes),) = read(open_loader(Modes(8), 4, 4, 1, 0, DataConfig(num_workers=1)), [0])
    assert modes.all()
    assert not indices.is_inference()
    (indices.float() * torch.ones(4, requires_grad=True)).sum().backward()  # type: ignore[no-untyped-call]


class Shapes(Numbers):
    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.zeros(index + 1)


def test_samples_that_do_not_make_a_batch_are_told_in_two_lines() -> None:
    with pytest.raises(DataError, match=r"samples do not make a batch: .*\n  expected: tensors of one shape"):
        read(open_loader(Shapes(8), 4, 4, 1, 0, DataConfig(num_workers=1)), [0])


class Packed(Numbers):
    """What packed files and torchvision.io raise."""

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        if index == 2:
            raise DataError("a damaged image")
        if index == 5:
            raise RuntimeError("image file is truncated")
        return super().__getitem__(index)


def test_other_kinds_of_damage_are_skipped_too() -> None:
    skip = DataConfig(num_workers=1, on_corrupt="skip")
    ((indices, _),) = read(open_loader(Packed(8), 8, 8, 1, 0, skip), [0])
    assert not {2, 5} & set(indices.tolist())
    with pytest.raises(DataError, match=r"sample [25]: (DataError|RuntimeError): "):
        read(open_loader(Packed(8), 8, 8, 1, 0, DataConfig(num_workers=1)), [0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_worker_batches_are_pinned() -> None:
    read_ = Read(packed_small((torch.ones(4), torch.ones(100_000))))
    pinned = read_.pin_memory().batch
    assert all(tensor.is_pinned() for tensor in pinned)  # type: ignore[union-attr]


def test_names_of_samples() -> None:
    damaged = Damaged(4)
    assert sample_name(damaged, 3) == "images/3.jpg"
    assert sample_name(torch.utils.data.Subset(damaged, [2, 1]), 1) == "images/1.jpg"  # type: ignore[arg-type]
    assert sample_name(Numbers(3), 2) == "sample 2"
    assert KeyedSamples(damaged, "skip").replacement(11) is not None


class Mapped:
    memory_mapped = True

    def __len__(self) -> int:
        return 10

    def fetch(self, indices: Tensor) -> Tensor:
        return indices


@pytest.mark.parametrize(
    ("dataset", "wish", "placement"),
    [
        (IMAGES, "auto", "device"),
        (IMAGES, "host", "host"),
        (Mapped(), "auto", "host"),
        (Mapped(), "device", "device"),
        (as_dataset(Numbers(4)), "auto", "workers"),
    ],
)
def test_choice_of_placement(dataset: Dataset, wish: Placement, placement: Placement) -> None:
    chosen, reason = choose(dataset, wish, CPU, 1)
    assert chosen == placement
    assert reason


@pytest.mark.parametrize(
    ("dataset", "data", "fix"),
    [
        (Numbers(4), DataConfig(placement="device"), "--data.placement workers"),
        (Numbers(4), DataConfig(placement="host"), "--data.placement workers"),
        (IMAGES, DataConfig(placement="workers"), "--data.placement auto"),
        (IMAGES, DataConfig(num_workers=2), "--data.num-workers None"),
    ],
)
def test_placements_that_do_not_fit_are_refused(dataset: object, data: DataConfig, fix: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(fix)):
        place(as_dataset(dataset), Reading(data=data, seed=0, device=CPU))


def test_default_number_of_workers() -> None:
    assert available_cores(10_000) == 1
    assert available_cores(1) >= 1


@pytest.fixture(autouse=True)
def quick_threads(tmp_path: Path) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("placement", ["device", "host"])
def test_pixels_are_the_same_on_cuda(placement: Placement) -> None:
    reference = global_batches(IMAGES, 24, 24, 1, [0, 1, 9], DataConfig())
    split = BatchSplit(global_batch_size=24, microbatch_size=24, world_size=1)
    reading = Reading(data=DataConfig(placement=placement), seed=5, device=torch.device("cuda", 0), channels_last=True)
    placed = place(IMAGES, reading)
    batches = read(Loader(placed.fetcher, SampleStream(5, len(IMAGES), 24), split, 0), [0, 1, 9])
    for mine, theirs in zip(batches, reference, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(mine, theirs, strict=True))
