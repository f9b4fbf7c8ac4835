"""Worker processes themselves: how they start, that they never outlive their parent, and what their death means."""

from __future__ import annotations

import gc
import shutil
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from distkit.errors import TrainingError
from distkit.runtime.local_ranks import die_with_owner
from distkit.runtime.signals import ignore_stop_signals

T = TypeVar("T")
#: A mode ends when nothing refers to it any more.
_held_by_worker: list[torch.inference_mode] = []


def start_worker(owner: int, _worker_id: int) -> None:
    """Make a worker fast; the time saved pays for seeding three generators a sample (14 µs).

    Python's garbage collector leaves inherited objects alone: scanning them takes time and copies their pages. The
    whole process runs in inference mode, because transforms are many small operations, each of which autograd would
    track. A data set that needs gradients opens `torch.inference_mode(False)`.

    Args:
        owner: the process that the worker belongs to, and must not outlive.
    """
    die_with_owner(owner)
    ignore_stop_signals()
    gc.freeze()
    mode = torch.inference_mode()
    mode.__enter__()
    _held_by_worker.append(mode)


def iterator_of(loader: Iterable[T]) -> Iterator[T]:
    """`iter(loader)`; where a worker dies while torch starts them, the others are ended before the error is raised."""
    try:
        return iter(loader)
    except RuntimeError as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # torch's handler of SIGCHLD raises anywhere in its constructor, and nothing but the frames has it then
            end_workers(frame.f_locals.get("self"))
        raise


def end_workers(iterator: object) -> None:
    """End the worker processes of a DataLoader's iterator and wait for them; nothing where it has none.

    Dropping the iterator does the same, but a traceback may hold it for long, and torch would send SIGTERM to a worker
    that hangs, which ignores it.
    """
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()
        for worker in iterator._workers:  # type: ignore[attr-defined]
            if worker.is_alive():
                worker.kill()


@contextmanager
def worker_errors() -> Iterator[None]:
    """torch's message about a dead worker becomes one that says what usually kills it."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        died = "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text)
        shared_memory = "shared memory" in text or "No space left" in text or "Bus error" in text
        if "DataLoader timed out" in text:
            raise TrainingError(
                f"no data worker returned a batch: {text.strip()}\n"
                "  check: what the data set waits for (a network drive, a lock), or raise --timeout-seconds"
            ) from error
        if not died and not shared_memory:
            raise
        reason = text.strip().splitlines()[-1]
        hint = "its memory use (check the kernel log with dmesg), or a crash in the data set's own code"
        if torch.multiprocessing.get_start_method() != "fork":
            hint += '; or this script trains when a worker imports it: put that under if __name__ == "__main__":'
        if shared_memory:
            free = shutil.disk_usage("/dev/shm").free / 2**20 if Path("/dev/shm").exists() else 0.0
            hint = f"/dev/shm is full ({free:.0f} MiB free): give it more room, or fewer --data.num-workers"
        raise TrainingError(f"a data worker died: {reason}\n  check: {hint}") from error
