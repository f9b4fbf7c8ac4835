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
from distkit.runtime.local_ranks import die_with_parent

T = TypeVar("T")
#: A mode ends when nothing refers to it any more.
_held_by_worker: list[torch.inference_mode] = []


def start_worker(owner: int, _worker_id: int) -> None:
    """Make a worker quick; what is gained pays for seeding three generators a sample (14 µs).

    Python's collector keeps off what was inherited: scanning that costs time and copies its pages. And the whole
    process is in inference mode: transforms are many small operations, each of which autograd would look at. A data set
    that needs gradients opens `torch.inference_mode(False)`.

    Args:
        owner: the process that it works for, and must not outlive.
    """
    die_with_parent(owner)
    gc.freeze()
    mode = torch.inference_mode()
    mode.__enter__()
    _held_by_worker.append(mode)


def iterator_of(loader: Iterable[T]) -> Iterator[T]:
    """`iter(loader)`; where a worker dies while torch still starts them, the others are ended before that is told."""
    try:
        return iter(loader)
    except RuntimeError as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # torch's handler of SIGCHLD raises anywhere in its constructor, and nothing but the frames has it then
            shutdown = getattr(frame.f_locals.get("self"), "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()
        raise


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
                f"no data worker gave a batch: {text.strip()}\n"
                "  look at: what the data set waits for (a network drive, a lock), or raise --timeout-seconds"
            ) from error
        if not died and not shared_memory:
            raise
        reason = text.strip().splitlines()[-1]
        hint = "its memory use (the kernel's log tells), or a crash in the data set's own code"
        if shared_memory:
            free = shutil.disk_usage("/dev/shm").free / 2**20 if Path("/dev/shm").exists() else 0.0
            hint = f"/dev/shm is full ({free:.0f} MiB free): give it more room, or fewer --data.num-workers"
        raise TrainingError(f"a data worker died: {reason}\n  look at: {hint}") from error
