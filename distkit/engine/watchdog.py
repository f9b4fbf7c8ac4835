"""Ends a run whose ranks do not get on any more, and says which one they wait for, and in what (C6).

Collectives have timeouts of their own; this one also notices a rank that hangs by itself, alone or before a collective
that the others have not reached, and names the line.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from distkit.engine.endings import (
    PATIENCE_SECONDS,
    Ending,
    look_for_the_dead,
    look_for_the_silent,
    look_for_the_stuck,
    unfinished,
)
from distkit.runtime.position import PHASE, Phase

#: Looks in the time after which a rank hangs, and the longest time between two.
LOOKS, LONGEST_SECONDS = 8, 5.0
#: Of a run that was told to stop: launchers kill what has not ended half a minute later.
STOPPING_SECONDS = 10.0


@contextmanager
def watching(ending: Ending, seconds: float | None) -> Iterator[None]:
    """Inside, the run ends when this rank has not got on for `seconds`, > 0; None: it never does."""
    if seconds is None:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=watch, args=(ending, seconds, done), name="distkit-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def watch(ending: Ending, seconds: float, done: threading.Event) -> None:
    """Look until `done`, or until this rank has not got on for `seconds`."""
    me, pause = ending.runtime.heartbeat.me, min(LONGEST_SECONDS, seconds / LOOKS)
    still, place, then = 0.0, me.place, time.monotonic()
    rings = ending.ends_process  # there is one such timer in a process
    while not done.wait(pause):
        me.look()
        now = time.monotonic()
        # a process that was suspended has not hung in that time
        still = still + min(now - then, 2 * pause) if me.place == place else 0.0
        place, then = me.place, now
        if rings:
            # for the case that Python's lock is held and this thread cannot look; it ends nothing
            faulthandler.dump_traceback_later(seconds, file=sys.__stderr__ or 2)
        if (still >= seconds and may_hang(ending)) or waits_in_vain(ending, still):
            break
    if rings:
        faulthandler.cancel_dump_traceback_later()
    if not done.is_set():
        end_the_hang(ending)


def waits_in_vain(ending: Ending, still: float) -> bool:
    """The run was told to stop, and this rank has not got on for `still` seconds beside one that gives no sign."""
    runtime = ending.runtime
    is_late = runtime.heartbeat.stopping and still >= STOPPING_SECONDS
    return is_late and look_for_the_silent(runtime, late=False) is not None


def may_hang(ending: Ending) -> bool:
    """False in the start-up of a single process: it may download for hours, and nobody waits for it."""
    return ending.runtime.cpu_group is not None or ending.runtime.position.cells[PHASE] != Phase.START_UP


def end_the_hang(ending: Ending) -> None:
    """Tell all ranks who hangs, unless they know already how the run ends, and end this process."""
    runtime = ending.runtime
    heartbeat = runtime.heartbeat
    if heartbeat.ask() is None:
        cause = look_for_the_dead(runtime) or look_for_the_silent(runtime, late=False)
        cause = cause or look_for_the_stuck([heartbeat.me, *unfinished(runtime)], heartbeat.me)
        heartbeat.ask(json.dumps(asdict(cause)))
    heartbeat.wait_until_all_know(2 * PATIENCE_SECONDS)
    ending.force()
