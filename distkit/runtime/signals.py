"""Signals that ask a run to stop. They set a flag and nothing else; the second one ends the process at once. No torch.

Python runs a handler between two instructions of the main thread, which may wait in a collective for minutes. So the
handlers are empty: the interpreter also writes the number of each signal to a socket (signal.set_wakeup_fd), and a
thread reads it there.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
#: Names a file in the environment: where it is, the ranks were told to stop before they could hear a signal.
STOP_FILE = "DISTKIT_STOP_FILE"
#: The same signal sooner than this is the same request: SLURM and launchers send one to a rank twice, at once.
REPEAT_SECONDS = 1.0


class StopSignals:
    """From now on the signals that ask for a stop are noted here; for a process that is there for one run.

    Args:
        announces: this process tells people of the first one, in one line.

    Attributes:
        first: the number of the first signal that came, or None.
    """

    def __init__(self, *, announces: bool) -> None:
        self.first: int | None = None
        self._announces = announces
        self._seen: dict[int, float] = {}
        self._on_first: Callable[[int], None] | None = None
        self._on_second: Callable[[int], NoReturn] = end_at_once
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        # what is ignored already (SIGHUP under nohup) is somebody's wish
        chosen = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, _noted) for number in chosen}
        os.register_at_fork(after_in_child=self._leave_to_parent)
        self._thread = threading.Thread(target=self._listen, name="distkit-signals", daemon=True)
        self._thread.start()
        if os.environ.get(STOP_FILE) and Path(os.environ[STOP_FILE]).exists():
            # the signal itself may still come, and is no second one
            self._begin_to_stop(signal.SIGUSR1)
        # those that came since the launcher started this process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def call(self, on_first: Callable[[int], None], on_second: Callable[[int], NoReturn]) -> None:
        """From now on, call these in the thread with the number of the signal; the first may have come already."""
        self._on_first, self._on_second = on_first, on_second
        if self.first is not None:
            on_first(self.first)

    def close(self) -> None:
        """The signals do again what they did before."""
        self._restore()
        self._sender.send(b"\0")
        self._thread.join()

    def _restore(self) -> None:
        signal.set_wakeup_fd(-1)
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _leave_to_parent(self) -> None:
        """A forked process would write to the parent's socket."""
        if self._before:
            self._restore()

    def _listen(self) -> None:
        while True:
            for number in self._receiver.recv(4096):
                if number == 0:
                    return
                if number in STOPPING:  # libraries have handlers of other signals
                    self._note(number, time.monotonic())

    def _begin_to_stop(self, number: int) -> None:
        self.first = number
        if self._announces:
            name = signal.Signals(number).name
            print(f"distkit: {name}: the run stops after this step and saves; {name} again ends it at once",
                  file=sys.stderr, flush=True)  # fmt: skip
        if self._on_first is not None:
            self._on_first(number)

    def _note(self, number: int, now: float) -> None:
        if self.first is None:
            self._seen[number] = now
            self._begin_to_stop(number)
            return
        # SIGUSR1 as a warning and SIGTERM at the limit are one request
        earlier = self._seen.setdefault(number, now)
        if now > earlier + REPEAT_SECONDS:
            self._on_second(number)


def _noted(_number: int, _frame: object) -> None:
    """The handler: the thread knows already."""


def end_at_once(number: int) -> NoReturn:
    """What the second signal does."""
    print(f"distkit: {signal.Signals(number).name} again: ended at once", file=sys.stderr, flush=True)
    os._exit(128 + number)


def block_stop_signals() -> None:
    """For a launcher, in the process that becomes a rank: what comes before the run listens waits for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def ignore_stop_signals() -> None:
    """For helper processes: the one they work for decides when they end."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
