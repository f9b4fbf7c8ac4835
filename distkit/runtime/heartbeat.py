"""Where every rank is and whether it lives, known to all ranks also after one of them can no longer say so.

A rank notes its phase and step in a few bytes of anonymous shared memory, which costs a store to memory. A thread beats
once a second: it reads the bytes of the ranks on its own host, which outlive the process that wrote them, and exchanges
records with ranks elsewhere over the process group's TCPStore. There the first cause of a failure is published, too.

The threads also agree where all ranks stop, without a collective. The main thread counts the units of work that it
begins (a step, a batch of an evaluation; all ranks begin the same ones) and then looks at a flag. A thread that hears
of a wish to stop raises the flag and then reads the count: no unit after that one and the next look begins without a
decision. When the counts of all ranks are known, the largest is the last unit that is done, by every rank.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from distkit.errors import RankSilentError
from distkit.runtime.agent_store import is_served_by_agent

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT_SECONDS = 1.0
#: Ranks for whose records one more beat a second is worth its traffic; with more of them, beats are rarer.
RANKS_A_BEAT = 128
#: Longest wait for the store, whose host may be the rank that is stopped.
STORE_SECONDS = 3.0


class Phase(IntEnum):
    """What a rank is doing."""

    START_UP = 0
    DATA = 1
    STEP = 2
    EVALUATION = 3
    SAVE = 4
    END = 5


class State(IntEnum):
    """How far a rank is with the end of its run."""

    RUNNING = 0
    #: An exception has left the loop; it looks for the first cause, or closes its parts.
    ENDING = 1
    #: It has left the run in good order.
    DONE = 2


#: Cells of a position.
PHASE, STEP, SAVING, STATE, KNOWS, BEATS, UNIT, WISH, FROZEN = range(9)
NUM_CELLS = 9
#: Time between two beats while ranks agree where to stop.
AGREEING_SECONDS = 0.05
#: How long a rank waits for the others' counts.
AGREE_SECONDS = 30.0


class Position:
    """Where this rank is: int64 cells that other processes of the machine can read, and that outlive it.

    PHASE is a `Phase`. STEP is the step being done, and in evaluations and saves the last one that was done. SAVING is
    the step of a checkpoint that is being written behind the steps, or 0. STATE is a `State`. KNOWS is 1 when this rank
    has read the first cause. BEATS counts the beats of its thread. UNIT counts the units of work that it has begun.
    WISH is why it wants all ranks to stop, or 0. FROZEN is 1 + UNIT as it was when it heard of a wish, or 0.
    """

    __slots__ = ("cells", "descriptor")

    def __init__(self, *, shared: bool) -> None:
        self.descriptor = -1
        size = NUM_CELLS * 8
        if shared and hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("distkit-position")
            os.ftruncate(self.descriptor, size)
        self.cells = memoryview(mmap.mmap(self.descriptor, size)).cast("q")

    def enter(self, phase: Phase, step: int) -> None:
        """Note a new phase."""
        self.cells[STEP] = step
        self.cells[PHASE] = phase

    def close(self) -> None:
        """Give the descriptor back; the cells can still be written."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@dataclass
class Peer:
    """Another rank, as it was last seen; times are this process's monotonic clock."""

    rank: int
    host: str
    pid: int
    started: str
    here: bool
    cells: memoryview | list[int]
    beats: int = -1
    seen: float = field(default_factory=time.monotonic)
    place: tuple[int, ...] = ()
    since: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Note whether it has beaten, and whether it has moved."""
        now, place = time.monotonic(), tuple(self.cells[:SAVING])
        if self.cells[BEATS] != self.beats:
            self.beats, self.seen = self.cells[BEATS], now
        if place != self.place:
            self.place, self.since = place, now

    def has_left(self) -> bool:
        """True when it is done, or its process is gone."""
        return self.cells[STATE] == State.DONE or self.process()[0] == "gone"

    def process(self) -> tuple[str, int | None]:
        """ "alive", "stopped" or "gone", with the wait status of a process that its launcher has not reaped yet."""
        if not self.here:
            return "alive", None
        fields = process_fields(self.pid)
        if fields is None or fields[19] != self.started:
            return "gone", None
        if fields[0] in "ZX":
            return "gone", int(fields[-1])
        return ("stopped" if fields[0] in "Tt" else "alive"), None


def process_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat (proc(5)) after the name: [0] state, [19] start time, [-1] wait status; None without one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def process_table() -> str:
    """Tells whose process numbers are this process's: one boot of one machine, one PID namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class StopRequested(Exception):
    """All ranks have agreed to begin nothing more; raised on each of them at the same place.

    Attributes:
        wishes: rank -> why, of the ranks that wanted it.
    """

    def __init__(self, wishes: dict[int, int]) -> None:
        super().__init__("a stop was asked for")
        self.wishes = wishes


class Heartbeat:
    """This rank's position, and the thread that shows it to the others.

    Args:
        rank, world_size: this process among all.
        store: the process group's store, or None for one process. All ranks construct theirs together.
        beats: there is a thread; always with a store.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: Store | None = None, *, beats: bool = False) -> None:
        self.position, self.rank, self.world_size = Position(shared=store is not None), rank, world_size
        self.peers: list[Peer] = []
        self.beat_seconds = BEAT_SECONDS * (1 + world_size // RANKS_A_BEAT)
        self.cause: str | None = None
        #: Called in the thread when a cause has been known for `force_seconds` and this rank still does something else.
        self.force: Callable[[], None] | None = None
        self.force_seconds = 10.0
        #: Called in the thread at each beat with the count of units; an answer other than 0 is a wish to stop.
        self.watch: Callable[[int], int] | None = None
        #: The main thread must wait for a decision before it begins a unit; which one is the last.
        self.stopping = False
        self._last_unit: int | None = None
        self._informed_at: float | None = None
        self._proposal: str | None = None
        self._rounds = [0, 0]  # begun, done
        self._condition = threading.Condition()
        self._wake = threading.Event()
        self._closed = False
        self._host_is_rank_0 = not is_served_by_agent()
        self._thread: threading.Thread | None = None
        # calls of one client wait for each other, and the process group has its own
        self._store = None if store is None else store.clone()
        if self._store is not None:
            self._meet(self._store)
        if self._store is not None or beats:
            self._thread = threading.Thread(target=self._beat, name="distkit-heartbeat", daemon=True)
            self._thread.start()

    def _meet(self, store: Store) -> None:
        """Read the first record of every rank; local ones are watched through their own memory from now on."""
        fields = process_fields(os.getpid())
        self._record = {"host": socket.gethostname(), "pid": os.getpid(), "table": process_table(),
                        "started": fields[19] if fields else "", "descriptor": self.position.descriptor}  # fmt: skip
        store.set(f"position/{self.rank}", self._message())
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        for rank, text in zip(others, store.multi_get([f"position/{rank}" for rank in others]), strict=True):
            record = json.loads(text)
            cells: memoryview | list[int] = record["cells"]
            here = bool(record["table"]) and record["table"] == self._record["table"]
            if here:
                try:
                    cells = shared_cells(record["pid"], record["descriptor"])
                except OSError:
                    here = False
            self.peers.append(Peer(rank, record["host"], record["pid"], record["started"], here, cells))
        self._remote = [peer for peer in self.peers if not peer.here]

    def _message(self) -> str:
        return json.dumps({**self._record, "cells": self.position.cells.tolist()})

    def _beat(self) -> None:
        while True:
            last = self._closed
            self._rounds[0] += 1
            self.position.cells[BEATS] += 1
            if self._host_is_rank_0 and self.peers and self.peers[0].rank == 0 and self.peers[0].has_left():
                self._store = None
            if self._store is not None:
                try:
                    self._exchange(self._store)
                except RuntimeError:
                    # its host is gone, and each further call would print a warning of many lines
                    self._store = None
            for peer in self.peers:
                peer.look()
            self._adopt()
            self._agree()
            with self._condition:
                self._rounds[1] = self._rounds[0]
                self._condition.notify_all()
            if last:
                return
            agreeing = self.stopping and self._last_unit is None
            self._wake.wait(AGREEING_SECONDS if agreeing else self.beat_seconds)
            self._wake.clear()

    def _exchange(self, store: Store) -> None:
        store.set(f"position/{self.rank}", self._message())
        if self._remote:
            records = store.multi_get([f"position/{peer.rank}" for peer in self._remote])
            for peer, record in zip(self._remote, records, strict=True):
                peer.cells = json.loads(record)["cells"]
        if self._closed:
            return
        if self.cause is None and self._proposal is not None:
            self.cause = store.compare_set("cause", "", self._proposal).decode()
        elif self.cause is None and store.check(["cause"]):
            self.cause = store.get("cause").decode()

    def _adopt(self) -> None:
        """Without a store a proposal is the cause; where nobody asks for a cause that is known, force the end."""
        if self.cause is None and self._store is None:
            self.cause = self._proposal
        if self.cause is None:
            return
        if self._informed_at is None:
            self._informed_at = time.monotonic()
            self.position.cells[KNOWS] = 1
        if self.position.cells[STATE] == State.RUNNING:
            late = time.monotonic() > self._informed_at + self.force_seconds
            if late and self.force is not None:
                self.force()

    def _agree(self) -> None:
        """Hear of a wish to stop, and decide when every rank has said how far it is."""
        cells = self.position.cells
        if self.watch is not None and not cells[WISH]:
            cells[WISH] = self.watch(cells[UNIT])
        if not self.stopping and self.wishes():
            self.stopping = True  # before the count is read: the main thread counts before it looks here
            cells[FROZEN] = 1 + cells[UNIT]
        if self.stopping and self._last_unit is None:
            counts = [cells[FROZEN], *(peer.cells[FROZEN] for peer in self.peers)]
            if all(counts):
                self._last_unit = max(counts) - 1

    def wishes(self) -> dict[int, int]:
        """Why which ranks want to stop."""
        own = {self.rank: self.position.cells[WISH]}
        every = own | {peer.rank: peer.cells[WISH] for peer in self.peers}
        return {rank: every[rank] for rank in sorted(every) if every[rank]}

    def wish(self, why: int) -> None:
        """Ask all ranks to stop at their next unit; `why` is not 0. From any thread."""
        self.position.cells[WISH] = self.position.cells[WISH] or why
        self._wake.set()

    def next_unit(self) -> None:
        """Count a unit of work that begins; all ranks begin the same ones, in the same order.

        Raises:
            StopRequested: it must not begin, on any rank.
            RankSilentError: another rank does not say how far it is.
        """
        cells = self.position.cells
        done = cells[UNIT]
        cells[UNIT] = done + 1
        if self.stopping and done >= self._decision():
            raise StopRequested(self.wishes())

    def _decision(self) -> int:
        """The last unit that is done; waits for the counts of all ranks."""
        end = time.monotonic() + AGREE_SECONDS
        with self._condition:
            while self._last_unit is None:
                silent = [peer.rank for peer in self.peers if not peer.cells[FROZEN]]
                ending = [rank for rank in silent if self._is_ending(rank)]
                if ending or self.cause is not None or time.monotonic() > end:
                    raise RankSilentError(f"ranks {ending or silent} do not say where to stop")
                self._condition.wait(AGREEING_SECONDS)
            return self._last_unit

    def _is_ending(self, rank: int) -> bool:
        peer = next(peer for peer in self.peers if peer.rank == rank)
        return peer.cells[STATE] == State.ENDING or peer.has_left()

    def ask(self, proposal: str | None = None) -> str | None:
        """The first cause as all ranks know it; where there is none yet, `proposal` becomes it.

        It waits for one exchange, at most STORE_SECONDS: a store whose host is stopped does not answer.
        """
        self._proposal = self._proposal or proposal
        if self._thread is not None and self.cause is None and not self._closed:
            with self._condition:
                wanted = self._rounds[0] + 1
                self._wake.set()
                self._condition.wait_for(lambda: self._rounds[1] >= wanted, STORE_SECONDS)
        if self.cause is None:
            self.cause = self._proposal
        return self.cause

    def wait_until_all_know(self, seconds: float) -> None:
        """Keep the store alive until the other ranks have read the cause from it; at most `seconds`."""
        end = time.monotonic() + seconds
        while self._store is not None and time.monotonic() < end:
            if all(peer.cells[KNOWS] or peer.has_left() or peer.process()[0] == "stopped" for peer in self.peers):
                return
            time.sleep(0.05)

    def close(self) -> None:
        """Stop beating. What was learned stays; the others see that this rank is done, unless it has failed."""
        self._closed = True
        if self.position.cells[STATE] == State.RUNNING:
            self.position.cells[STATE] = State.DONE
        if self._thread is not None and self._thread is not threading.current_thread():
            self._wake.set()
            self._thread.join(STORE_SECONDS)
            self._thread = None
        self._store = None
        self.position.close()


def shared_cells(pid: int, descriptor: int) -> memoryview:
    """The cells of a process of this machine; they stay readable when it is gone.

    Raises:
        OSError: it is gone, it is somebody else's, or there is no /proc.
    """
    if descriptor < 0:
        raise OSError("no shared memory")
    opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return memoryview(mmap.mmap(opened, NUM_CELLS * 8, prot=mmap.PROT_READ)).cast("q")
    finally:
        os.close(opened)
