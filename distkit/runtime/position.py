"""Where a rank is: a page of memory that other ranks of its machine can read, also when it cannot speak any more."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path


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


#: Cells of a position. Those before STATE move while the rank gets on.
PHASE, STEP, UNIT, MICROBATCH, SAVING, STATE, KNOWS, BEATS, WISH, FROZEN, WAITS = range(11)
NUM_CELLS = 11
#: The sentence about what it stands in lies behind the cells.
SENTENCE_BYTES = 384
PAGE_BYTES = NUM_CELLS * 8 + SENTENCE_BYTES


class Position:
    """Where this rank is: int64 cells and a sentence, which other processes of the machine can read.

    PHASE is a `Phase`. STEP is the step being done, and in evaluations and saves the last one that was done. UNIT
    counts the units of work that it has begun, MICROBATCH the microbatches. SAVING is the step of a checkpoint that is
    being written while training goes on, or 0. STATE is a `State`. KNOWS is 1 when this rank has read the first cause.
    BEATS counts the beats of its thread. WISH is why it wants all ranks to stop, or 0. FROZEN is 1 + UNIT as it was
    when it heard of a wish, or 0. WAITS is 1 when the sentence says that it waits for other ranks.
    """

    __slots__ = ("cells", "descriptor", "page")

    def __init__(self, *, shared: bool) -> None:
        self.descriptor = -1
        if shared and hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("distkit-position")
            os.ftruncate(self.descriptor, PAGE_BYTES)
        self.page = memoryview(mmap.mmap(self.descriptor, PAGE_BYTES))
        self.cells = cells_of(self.page)

    def enter(self, phase: Phase, step: int) -> None:
        """Note a new phase."""
        self.cells[STEP] = step
        self.cells[PHASE] = phase

    def stand(self, waits: bool, sentence: str) -> None:
        """Note what this rank stands in while it does not get on; "" when it does again."""
        self.cells[WAITS] = waits
        text = sentence.encode()[:SENTENCE_BYTES]
        self.page[-SENTENCE_BYTES:] = text.ljust(SENTENCE_BYTES, b"\0")

    def close(self) -> None:
        """Give the descriptor back; the cells can still be written."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def cells_of(page: memoryview) -> memoryview:
    """The cells of a page."""
    return page[: NUM_CELLS * 8].cast("q")


@dataclass
class Peer:
    """A rank as it was last seen; times are this process's monotonic clock.

    `page` is its memory where it is on this machine, else its sentence as it was sent.
    """

    rank: int
    host: str
    pid: int
    started: str
    here: bool
    cells: memoryview | list[int]
    page: memoryview | str = ""
    beats: int = -1
    seen: float = field(default_factory=time.monotonic)
    place: tuple[int, ...] = ()
    since: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Note whether it has beaten, and whether it has moved."""
        now, place = time.monotonic(), tuple(self.cells[:STATE])
        if self.cells[BEATS] != self.beats:
            self.beats, self.seen = self.cells[BEATS], now
        if place != self.place:
            self.place, self.since = place, now

    @property
    def sentence(self) -> str:
        """What it stands in, "" where it has not said."""
        if isinstance(self.page, str):
            return self.page
        return bytes(self.page[-SENTENCE_BYTES:]).rstrip(b"\0").decode(errors="replace")

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


def page_of(pid: int, descriptor: int) -> memoryview:
    """The page of a process of this machine; it stays readable when that is gone.

    Raises:
        OSError: it is gone, it is somebody else's, or there is no /proc.
    """
    if descriptor < 0:
        raise OSError("no shared memory")
    opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return memoryview(mmap.mmap(opened, PAGE_BYTES, prot=mmap.PROT_READ))
    finally:
        os.close(opened)
