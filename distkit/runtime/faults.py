"""Faults on purpose, at named points: how tests prove what a crash leaves behind. Inert unless DISTKIT_FAULT is set.

    DISTKIT_FAULT=point:rank:step:action[,point:rank:step:action...]

`rank` and `step` are numbers, or `*` for any. `half_shard:1:500:kill` kills rank 1 when half of a shard of step 500 is
written. A fault fires once in a process; with step `*`, `raise`, `slow` and `enospc` fire each time the point is
reached. No torch.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass, field

from distkit.errors import ConfigError, nearest

VARIABLE = "DISTKIT_FAULT"
#: In a save, in the order of time; an exception there is a vote against the checkpoint.
SAVE_POINTS = ("staging", "half_shard", "before_fsync", "before_vote", "before_manifest", "after_manifest",
               "before_rename", "after_rename", "in_retention")  # fmt: skip
#: `start-up` (step 0) lies before data and model are built, `data` before a microbatch is read, `step` after the update
#: of a step and before its reports, `evaluation` and `save` at the beginning of one.
POINTS = ("start-up", "data", "step", "evaluation", "save", *SAVE_POINTS)
#: `exit` is sys.exit(3), `exit0` os._exit(0); `oom` asks for more memory than there may be; `hang_gil` holds Python's
#: lock while it hangs; `term`, `int`, `usr1` and `hup` are signals that ask for a stop.
ACTIONS = ("kill", "raise", "hang", "slow", "enospc", "exit", "exit0", "segv", "stop", "oom", "hang_gil", "term", "int",
           "usr1", "hup")  # fmt: skip
SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP, "term": signal.SIGTERM,
           "int": signal.SIGINT, "usr1": signal.SIGUSR1, "hup": signal.SIGHUP}  # fmt: skip
SLOW_SECONDS = 2.0


@dataclass
class Fault:
    """One fault; `rank` or `step` None stands for any."""

    point: str
    rank: int | None
    step: int | None
    action: str
    _unfired: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def fires(self, point: str, rank: int, step: int) -> bool:
        """True when it is this fault's turn; of several threads at a point, one gets it."""
        if point != self.point or self.rank not in (None, rank) or self.step not in (None, step):
            return False
        # a lock that is never released: taking it is atomic
        return self.step is None or self._unfired.acquire(blocking=False)

    def act(self) -> None:
        """Do it.

        Raises:
            RuntimeError: the action is `raise`.
            OSError: the action is `enospc` (ENOSPC).
            SystemExit, MemoryError: the action is `exit`, `oom`.
        """
        where = f"{VARIABLE} at {self.point}"
        if self.action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.action])
        if self.action == "exit":
            sys.exit(3)
        if self.action == "exit0":
            os._exit(0)
        if self.action == "oom":
            exhaust_memory()
        if self.action == "hang_gil":
            ctypes.PyDLL(None).sleep(86_400)
        if self.action == "raise":
            raise RuntimeError(where)
        if self.action == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
        if self.action == "slow":
            time.sleep(SLOW_SECONDS)
        while self.action == "hang":
            time.sleep(60.0)


def exhaust_memory() -> None:
    """Ask for more memory than this process may have, with whatever the machine has.

    Raises:
        MemoryError: always.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**36, before[1]))
    try:
        bytearray(2**40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


#: False: no fault is set, and a point in the path of a step need not be asked.
armed = True
_faults: tuple[Fault, ...] | None = None


def fault(point: str, rank: int, step: int) -> None:
    """Point `point` is reached, on `rank`, in step `step`.

    Raises:
        RuntimeError, OSError: as DISTKIT_FAULT says.
        ConfigError: DISTKIT_FAULT is malformed, and `check_faults` was not called.
    """
    if _faults == ():
        return
    for one in _faults if _faults is not None else check_faults():
        if one.fires(point, rank, step):
            one.act()


def check_faults() -> tuple[Fault, ...]:
    """Read DISTKIT_FAULT anew, at the start of a run; the faults in it have not fired yet.

    Raises:
        ConfigError: it is malformed; the message says what was expected.
    """
    global _faults, armed
    text = os.environ.get(VARIABLE, "").strip()
    _faults = tuple(_parse(part.strip()) for part in text.split(",")) if text else ()
    armed = bool(_faults)
    return _faults


def _parse(text: str) -> Fault:
    parts = text.split(":")
    if len(parts) != 4:
        raise ConfigError(f"{VARIABLE} has a fault of {len(parts)} parts", expected="point:rank:step:action",
                          got=repr(text), fix=f"{VARIABLE}=half_shard:1:500:kill")  # fmt: skip
    point, rank, step, action = parts
    for what, word, choices in (("point", point, POINTS), ("action", action, ACTIONS)):
        if word not in choices:
            raise ConfigError(f"{VARIABLE} names no {what} in {text!r}", expected=", ".join(choices), got=repr(word),
                              fix=nearest(word, choices))  # fmt: skip
    return Fault(point, _number("rank", rank, text), _number("step", step, text), action)


def _number(what: str, word: str, text: str) -> int | None:
    if word == "*":
        return None
    if not (word.isascii() and word.isdigit()):
        raise ConfigError(f"{VARIABLE} has no {what} in {text!r}", expected=f"a {what}, 0 or more, or * for any",
                          got=repr(word))  # fmt: skip
    return int(word)
