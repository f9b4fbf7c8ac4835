"""A process that ends with the one that started it. No torch."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading


def die_with_parent(owner: int) -> None:
    """End this process when process `owner`, for whom it works, ends, however that happens.

    Where `owner` started it itself the kernel sees to that (Linux prctl(2)); a child of Python's fork server has that
    server for a parent, and a thread waits for its owner (pidfd_open(2)).
    """
    if sys.platform != "linux":
        return
    if os.getppid() != owner:
        try:
            descriptor = os.pidfd_open(owner)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            threading.Thread(target=_outlive_nobody, args=(descriptor,), name="distkit-owner", daemon=True).start()
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != owner:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _outlive_nobody(descriptor: int) -> None:
    poll = select.poll()  # select takes no descriptor above 1023
    poll.register(descriptor, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)
