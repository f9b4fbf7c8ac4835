"""Shared by all tests: the helpers are importable, one thread a process, and no child process outlives a test."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
# Read when torch is imported. Tests run side by side, and tensors this small gain nothing from a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# nohup and `command &` in a script ignore these, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _children() -> set[int]:
    """Live descendants, without the fork server and multiprocessing's resource tracker."""
    alive = set()
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            if process.status() != psutil.STATUS_ZOMBIE and "multiprocessing" not in command:
                alive.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return alive


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = _children()
    yield
    left = _children() - before
    assert not left, f"processes left behind: {left}"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread, and others work on this machine too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
