"""A data worker that dies is named: which one, how it ended, and which sample it was reading (C6)."""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, SimpleNamespace

import psutil
import pytest
import torch
from support.harness import run_ranks
from torch import Tensor
from torch.utils.data import Dataset

from distkit.config import BatchSplit, DataConfig
from distkit.data.dataset import MapDataset
from distkit.data.reading import worker_process
from distkit.data.reading.fetchers import Batches
from distkit.data.reading.loader import Loader
from distkit.data.reading.placement import Reading, place
from distkit.data.reading.worker_process import in_words, waiting_for
from distkit.data.stream.requests import training_requests
from distkit.data.stream.stream import SampleStream
from distkit.errors import TrainingError

SIZE, SEED = 16, 5


class Fatal(Dataset[Tensor]):
    """Ends the worker that reads `victim`."""

    def __init__(self, end: Callable[[], object], victim: int = 3) -> None:
        self.end, self.victim = end, victim
        self.samples = [(f"images/{index}.jpg", 0) for index in range(SIZE)]

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Tensor:
        if index == self.victim and torch.utils.data.get_worker_info() is not None:
            self.end()
        return torch.tensor(index)


def no_end() -> None:
    """Here the worker lives on; a lambda could not be sent to one that is not forked."""


def signalled(number: int) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), number)


def open_loader(dataset: Dataset[Tensor], num_workers: int = 2) -> Loader:
    split = BatchSplit(global_batch_size=4, microbatch_size=4, world_size=1)
    reading = Reading(data=DataConfig(num_workers=num_workers), seed=SEED, device=torch.device("cpu"))
    return Loader(place(MapDataset(dataset), reading).fetcher, SampleStream(SEED, SIZE, 4), split, 0)


def read(loader: Loader, steps: range) -> None:
    for step in steps:
        loader.microbatch(step, 0)


def read_all(batches: Batches) -> None:
    for _ in range(100):
        batches.__next__()


ENDS: dict[str, tuple[Callable[[], object], str, str]] = {
    "SIGKILL": (signalled(signal.SIGKILL), "was killed by SIGKILL", "memory"),
    "SIGSEGV": (signalled(signal.SIGSEGV), "was killed by SIGSEGV", "PYTHONFAULTHANDLER"),
    "a signal without a name": (
        signalled(signal.SIGRTMIN + 5),
        f"was killed by signal {signal.SIGRTMIN + 5}",
        "signal",
    ),
    "os._exit": (lambda: os._exit(7), "ended with exit code 7", "os._exit"),
    "sys.exit": (lambda: sys.exit(4), "ended with exit code 4", "sys.exit"),
    "os._exit(0)": (lambda: os._exit(0), "ended with exit code 0", "os._exit"),
}


@pytest.mark.parametrize("way", ENDS)
def test_the_worker_its_sample_and_its_end_are_named(way: str) -> None:
    end, says, hint = ENDS[way]
    loader, sample = open_loader(Fatal(end)), r"while it read sample 3 \(images/3\.jpg\)"
    with pytest.raises(TrainingError, match=rf"worker \d of 2 \(process \d+\) {says} {sample}\n  check: .*{hint}"):
        read(loader, range(4))
    loader.close()


def busy(seconds: float) -> None:
    """Python code that a signal's handler may interrupt."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(100))


def test_a_death_interrupts_nothing_but_the_wait_for_a_batch() -> None:
    loader = open_loader(Fatal(no_end))
    loader.microbatch(0, 0)
    for worker in loader._batches._reads._workers:  # type: ignore[union-attr]
        worker.kill()
    busy(0.5)  # a step, a save
    with pytest.raises(TrainingError, match=r"worker 0 of 2 .* was killed by SIGKILL\n"):
        read(loader, range(1, 9))
    loader.close()


def test_other_handlers_of_the_signal_are_still_called(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def own(number: int, _frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGCHLD, own)
    monkeypatch.setattr(worker_process, "_on_child", worker_process._OnChild())
    try:
        loader = open_loader(Fatal(no_end))
        loader.microbatch(0, 0)
        loader.close()
        busy(0.1)
        assert seen
        assert set(seen) == {signal.SIGCHLD}
        ours = signal.getsignal(signal.SIGCHLD)
        assert callable(ours)

        def on_top(number: int, frame: FrameType | None) -> None:
            seen.clear()
            ours(number, frame)

        signal.signal(signal.SIGCHLD, on_top)
        for _ in range(2):
            again = open_loader(Fatal(no_end))
            again.microbatch(0, 0)
            again.close()
            busy(0.1)
            assert seen == [signal.SIGCHLD]
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("milliseconds", [0, 1, 3, 10, 30, 100])
def test_a_worker_that_is_killed_as_it_starts_is_noticed(milliseconds: int) -> None:
    loader = open_loader(Fatal(no_end), num_workers=1)
    known = {child.pid for child in psutil.Process().children()}
    opened = loader.fetcher.open(training_requests(loader.stream, loader.split, loader.rank, 0, 0))
    (worker,) = [child for child in psutil.Process().children() if child.pid not in known]
    time.sleep(milliseconds / 1000)
    worker.kill()
    with pytest.raises(TrainingError, match=r"worker 0 of 1 .* was killed by SIGKILL"):
        read_all(opened)
    opened.close()


def closes_with_a_lock_that_nobody_gives_back() -> bool:
    """A worker was killed while it looked at the event that tells all of them to end."""
    loader = open_loader(Fatal(no_end))
    loader.microbatch(0, 0)
    reads = loader._batches._reads  # type: ignore[union-attr]
    reads._workers_done_event._cond.acquire()
    reads._workers[0].kill()
    loader.close()
    return not any(worker.is_alive() for worker in reads._workers)


def test_a_lock_of_a_dead_worker_holds_nobody_up() -> None:
    assert run_ranks(closes_with_a_lock_that_nobody_gives_back, 1, timeout=60) == [True]


def test_errors_of_others_are_left_alone() -> None:
    assert in_words(RuntimeError("shapes do not fit"), None) is None
    told = in_words(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), None)
    assert "a data worker died: DataLoader worker (pid 7)" in str(told)


class Reads:
    """An iterator with one worker, which has ended with `exitcode`; None: it lives."""

    def __init__(self, exitcode: int | None) -> None:
        self._workers = [SimpleNamespace(exitcode=exitcode, pid=7)]


def lose_connection(reads: Reads) -> None:
    with waiting_for(reads):
        raise ConnectionResetError("by peer")


def test_a_connection_that_a_dying_worker_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is fetched from the worker that sent it, which may be gone by then."""
    with pytest.raises(TrainingError, match=r"a data worker died: worker 0 of 1 \(process 7\) was killed by SIGKILL"):
        lose_connection(Reads(-signal.SIGKILL))
    monkeypatch.setattr(worker_process, "DYING_SECONDS", 0.1)
    with pytest.raises(ConnectionResetError, match="by peer"):
        lose_connection(Reads(None))
