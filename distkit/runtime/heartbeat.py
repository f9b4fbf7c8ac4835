"""Where every rank is and whether it lives, known to all ranks also after one of them can no longer say so.

A rank notes its phase and step in a page of anonymous shared memory, which costs a store to memory. A thread beats
once a second: it reads the pages of the ranks on its own host, which outlive the processes that wrote them, and
exchanges records with ranks elsewhere over the process group's TCPStore. There the first cause of a failure is
published, too. While its rank does not get on, the thread notes what that stands in.

The threads also agree where all ranks stop, without a collective. The main thread counts the units of work that it
begins (a step, a batch of an evaluation; all ranks begin the same ones) and then looks at a flag. A thread that hears
of a wish to stop raises the flag and then reads the count: no unit after that one and the next look begins without a
decision. When the counts of all ranks are known, the largest is the last unit that is done, by every rank.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from distkit.errors import RankSilentError
from distkit.runtime.agent_store import is_served_by_agent
from distkit.runtime.position import (
    BEATS,
    FROZEN,
    KNOWS,
    STATE,
    UNIT,
    WISH,
    Peer,
    Position,
    State,
    cells_of,
    page_of,
    process_fields,
    process_table,
)
from distkit.runtime.standing import standing

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT_SECONDS = 1.0
#: Ranks for whose records one more beat a second is worth its traffic; with more of them, beats are rarer.
RANKS_A_BEAT = 128
#: Longest wait for the store, whose host may be the rank that is stopped.
STORE_SECONDS = 3.0
#: Time between two beats while ranks agree where to stop.
AGREEING_SECONDS = 0.05
#: How long a rank waits for the others' counts.
AGREE_SECONDS = 30.0
#: A rank that has not got on for so long notes what it stands in.
STILL_SECONDS = 2.0


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
        #: This rank as its own watcher sees it, and the others.
        self.me = Peer(rank, socket.gethostname(), os.getpid(), "", True, self.position.cells, self.position.page)
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
        self.me.started = fields[19] if fields else ""
        self._record = {"host": self.me.host, "pid": self.me.pid, "table": process_table(),
                        "started": self.me.started, "descriptor": self.position.descriptor}  # fmt: skip
        store.set(f"position/{self.rank}", self._message())
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        for rank, text in zip(others, store.multi_get([f"position/{rank}" for rank in others]), strict=True):
            record = json.loads(text)
            peer = Peer(rank, record["host"], record["pid"], record["started"], False, record["cells"])
            if record["table"] and record["table"] == self._record["table"]:
                with suppress(OSError):
                    peer.page = page_of(record["pid"], record["descriptor"])
                    peer.cells, peer.here = cells_of(peer.page), True
            self.peers.append(peer)
        self._remote = [peer for peer in self.peers if not peer.here]

    def _message(self) -> str:
        return json.dumps({**self._record, "cells": self.position.cells.tolist(), "sentence": self.me.sentence})

    def _beat(self) -> None:
        while True:
            last = self._closed
            self._rounds[0] += 1
            self.position.cells[BEATS] += 1
            self._note_standing()
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

    def _note_standing(self) -> None:
        """Note what this rank stands in, unless it gets on; one that looks for a cause keeps what it stood in."""
        self.me.look()
        if self.position.cells[STATE] == State.RUNNING:
            still = time.monotonic() > self.me.since + STILL_SECONDS
            self.position.stand(*standing(self.world_size) if still else (False, ""))

    def _exchange(self, store: Store) -> None:
        store.set(f"position/{self.rank}", self._message())
        if self._remote:
            records = store.multi_get([f"position/{peer.rank}" for peer in self._remote])
            for peer, record in zip(self._remote, records, strict=True):
                seen = json.loads(record)
                peer.cells, peer.page = seen["cells"], seen["sentence"]
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
