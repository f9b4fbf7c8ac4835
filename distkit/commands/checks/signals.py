"""Whether the signals that ask a run to save and stop would reach it."""

from __future__ import annotations

import os
import signal
import time

import psutil

from distkit.commands.checks.finding import Context, Finding

NAME = "signals"
ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
WAIT_SECONDS = 2.0


def signals(context: Context) -> list[Finding]:
    """Send each one to this process and see it come; say which are ignored or blocked, and what torchrun does."""
    blocked = [number for number in ASKED if number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    ignored = [number for number in ASKED if signal.getsignal(number) == signal.SIG_IGN]
    lost = [number for number in ASKED if number not in (*blocked, *ignored) and not comes_back(number)]
    found = []
    for numbers, what in ((blocked, "blocked"), (lost, "lost on their way")):
        if numbers:
            found.append(Finding(NAME, "error", f"{_names(numbers)}: {what} in this process: a run would not notice",
                                 "start it without the wrapper that blocks signals"))  # fmt: skip
    if ignored:
        message = f"{_names(ignored)}: ignored by what started this process (nohup, trap '', &): a run may not notice"
        found.append(Finding(NAME, "warning", message, "another way to start it, or SIGTERM to stop it"))
    return [*found, *_torchrun(context)] or [Finding(NAME, "ok", f"{_names(ASKED)} arrive")]


def comes_back(number: signal.Signals) -> bool:
    """Send `number` to this process; whether a Python handler runs. The handler before is set again."""
    came: list[int] = []
    before = signal.signal(number, lambda received, _frame: came.append(received))
    try:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + WAIT_SECONDS
        while not came and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)
    return bool(came)


def _torchrun(context: Context) -> list[Finding]:
    """torchrun dies of signals that it was not told to handle, and leaves its ranks behind."""
    if "TORCHELASTIC_RUN_ID" not in context.env or "SIGUSR1" in context.env.get("PET_SIGNALS_TO_HANDLE", ""):
        return []
    try:
        above = [" ".join(process.cmdline()) for process in psutil.Process().parents()]
    except psutil.Error:
        above = []
    if any("SIGUSR1" in line for line in above):
        return []
    return [Finding(NAME, "warning", "torchrun dies of SIGUSR1 and leaves its ranks behind",
                    "launch/local.sh, or torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2 (in torch "
                    "2.13 and later)")]  # fmt: skip


def _names(numbers: list[signal.Signals] | tuple[signal.Signals, ...]) -> str:
    return ", ".join(number.name for number in numbers)
