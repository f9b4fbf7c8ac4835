"""Worker processes themselves: how they start, that they never outlive their parent, and what their death means."""

from __future__ import annotations

import gc
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import ProcessError
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
from torch._C import _error_if_any_worker_fails
from torch.utils.data._utils import signal_handling

from distkit.errors import TrainingError
from distkit.runtime.local_ranks import die_with_owner
from distkit.runtime.signals import ignore_stop_signals

T = TypeVar("T")
#: What a crash in native code is ended by.
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
#: From the last that a worker that dies can send to when its parent knows that it is dead.
DYING_SECONDS = 2.0
#: Workers look at what this lock guards for microseconds.
LOCK_SECONDS = 1.0
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


def take_over_signal() -> None:
    """Handle SIGCHLD in torch's place, before it does.

    torch raises the death of a worker wherever the main thread is: in a step, a save, a collective. Here it is raised
    where the thread waits for a batch, which `waiting_for` says, or when it next does.
    """
    if threading.current_thread() is not threading.main_thread() or _on_child.installed:
        return
    before = signal.getsignal(signal.SIGCHLD)
    if callable(before) and before.__module__ != signal_handling.__name__:
        _on_child.before = before
    signal.signal(signal.SIGCHLD, _on_child)
    signal_handling._SIGCHLD_handler_set = True
    # once: a handler that somebody puts on top calls this one, and would be called by it
    _on_child.installed = True


class _OnChild:
    """The handler.

    Attributes:
        installed: it is, or was.
        before: the handler that was there.
        waits: the main thread waits for a batch.
    """

    installed, waits = False, False
    before: Callable[[int, FrameType | None], object] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.waits:
            _error_if_any_worker_fails()
        if self.before is not None:
            self.before(number, frame)


_on_child = _OnChild()


def end_workers(iterator: object) -> None:
    """End the worker processes of a DataLoader's iterator and wait for them; nothing where it has none.

    Dropping the iterator does the same, but a traceback may hold it for long, and torch would send SIGTERM to a worker
    that hangs, which ignores it. One that was killed may hold a lock for ever, which torch and the other workers would
    wait for.
    """
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is None:
        return
    workers, lock = iterator._workers, iterator._workers_done_event._cond  # type: ignore[attr-defined]
    if is_free := lock.acquire(True, LOCK_SECONDS):
        lock.release()
    if not is_free or not all(worker.is_alive() for worker in workers):
        for worker in workers:
            worker.kill()
        iterator._workers_done_event = threading.Event()  # type: ignore[attr-defined]  # nobody is left to be told
    shutdown()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def death_in(iterator: object, reading: Callable[[int], str]) -> tuple[str, int] | None:
    """The first worker that is dead, how it ended, what it was `reading`, and its exit code; None where all live."""
    workers = getattr(iterator, "_workers", [])
    for number, worker in enumerate(workers):
        code = worker.exitcode
        if code is not None:
            known = code < 0 and -code in {int(each) for each in signal.Signals}
            name = signal.Signals(-code).name if known else f"signal {-code}"
            how = f"was killed by {name}" if code < 0 else f"ended with exit code {code}"
            return f"worker {number} of {len(workers)} (process {worker.pid}) {how}{reading(number)}", code
    return None


def nothing(_worker: int) -> str:
    """What a worker was reading, where that is not known."""
    return ""


@contextmanager
def waiting_for(iterator: object, reading: Callable[[int], str] = nothing) -> Iterator[None]:
    """Inside, the main thread waits for a worker of `iterator`: the death of one is an error that says how it ended.

    Raises:
        TrainingError: one died, or did not answer in time, or shared memory is full.
    """
    is_main = threading.current_thread() is threading.main_thread()
    try:
        _on_child.waits = _on_child.waits or is_main
        _error_if_any_worker_fails()  # one that died when nobody waited
        yield
        _on_child.waits = _on_child.waits and not is_main
    except RuntimeError as error:
        told = in_words(error, death_in(iterator, reading))
        if told is None:
            raise
        raise told from error
    except (OSError, EOFError, ProcessError) as error:
        # one that dies leaves messages whose tensors it can no longer hand over, a moment before it is known to be dead
        end, death = time.monotonic() + (DYING_SECONDS if getattr(iterator, "_workers", None) else 0), None
        while death is None and time.monotonic() < end:
            time.sleep(0.02)
            death = death_in(iterator, reading)
        if death is None:
            raise
        raise died(*death) from error
    finally:
        _on_child.waits = _on_child.waits and not is_main


def iterator_of(loader: Iterable[T]) -> Iterator[T]:
    """`iter(loader)`; where a worker dies meanwhile, the others are ended before the error is raised.

    Raises:
        TrainingError: as `waiting_for`.
    """
    try:
        return iter(loader)
    except RuntimeError as error:
        # nothing but the frames has what torch was making
        made = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        iterator = next((each for each in made if hasattr(each, "_workers")), None)
        told = in_words(error, death_in(iterator, nothing))
        end_workers(iterator)
        if told is None:
            raise
        raise told from error


def in_words(error: RuntimeError, death: tuple[str, int] | None) -> TrainingError | None:
    """torch's error about workers in other words; None for other errors."""
    text = str(error).strip()
    if "DataLoader timed out" in text:
        return TrainingError(
            f"no data worker returned a batch: {text}\n"
            "  check: what the data set waits for (a network drive, a lock), or raise --timeout-seconds"
        )
    is_death = "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text)
    shared_memory = "shared memory" in text or "No space left" in text or "Bus error" in text
    if not is_death and not shared_memory:
        return None
    if death is not None:
        return died(*death, shared_memory=shared_memory)
    # of a DataLoader of the recipe's own
    return died(text.splitlines()[-1], -signal.SIGKILL if "killed by signal" in text else 1,
                shared_memory=shared_memory)  # fmt: skip


def died(who: str, code: int, *, shared_memory: bool = False) -> TrainingError:
    """The error for a worker that ended with `code`, and what to look for."""
    hint = "something that the data set calls ended the process (os._exit, sys.exit)"
    if shared_memory:
        free = shutil.disk_usage("/dev/shm").free / 2**20 if Path("/dev/shm").exists() else 0.0
        hint = f"/dev/shm is full ({free:.0f} MiB free): give it more room, or fewer --data.num-workers"
    elif -code in CRASHES:
        hint = "native code that the data set calls crashed: PYTHONFAULTHANDLER=1 shows where"
    elif code < 0:
        hint = "its memory use (check the kernel log with dmesg), or who sent the signal"
    if torch.multiprocessing.get_start_method() != "fork" and not shared_memory:
        hint += '; or this script trains when a worker imports it: put that under if __name__ == "__main__":'
    return TrainingError(f"a data worker died: {who}\n  check: {hint}")
