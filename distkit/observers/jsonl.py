"""metrics.jsonl: every event, one JSON object a line, on disk as soon as it happened."""

# ruff: noqa: ARG002 (an observer ignores what it has no use for)
from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from distkit.errors import TrainingError
from distkit.files import FULL, atomic_file, open_regular, remove_temporaries
from distkit.json_files import JsonError, is_number, parse_object
from distkit.observers.base import Event, Observer, RunInfo

TAIL_BYTES = 65536
UNWRITTEN_BYTES = 1 << 20
BLOCK_BYTES = 1 << 20
#: A longer line is none of ours, and a larger file is not searched: it holds 10 million lines.
LINE_BYTES, MOST_BYTES = 1 << 20, 1 << 32
STEP = re.compile(rb'"step"\s*:\s*(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)')


def build(run_dir: Path) -> JsonlObserver:
    """metrics.jsonl in the run directory."""
    return JsonlObserver(run_dir / "metrics.jsonl")


class JsonlObserver(Observer):
    """Appends to `path`; a run that resumes at `step` first removes the lines of later steps.

    So a step that is repeated has one line, and a run that starts over at step 0 has no line of an earlier attempt.
    Lines without a step stay. A line that a kill or a power failure left incomplete at the end is removed, so every
    line is a whole JSON object.

    JSON has no NaN and no infinity: such a value is written as null, and the line names it in `"nonfinite": ["loss"]`.

    Raises:
        TrainingError: naming the path, when a line cannot be written. On a full disk lines are kept, up to 1 MiB, and
            written when there is room: a failed save must not end the run through its report.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None
        self._unwritten = bytearray()

    def start(self, info: RunInfo, step: int) -> None:
        """Cut the file back to `step`, and open it."""
        self._open(step)

    def _open(self, step: int) -> None:
        try:
            remove_temporaries(self.path.parent, self.path.name)  # of a start that was killed while it removed lines
            if os.path.lexists(self.path):
                cut_back(self.path, step)
            # Unbuffered: a buffer would keep lines that a full disk refused, and fail again at exit.
            self._file = io.FileIO(open_regular(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")
        except OSError as error:
            raise self._failure(error) from error

    def record(self, event: Event) -> None:
        """Write one line; while the disk is full, keep it for the next time."""
        if self._file is None:
            raise TrainingError(f"{self.path} is not open: start() comes before record()")
        self._unwritten += to_line(event).encode()
        try:
            self._write()
        except OSError as error:
            # a background save may fill the disk for a moment, and frees it when it fails
            if error.errno not in FULL or len(self._unwritten) > UNWRITTEN_BYTES:
                raise self._failure(error) from error

    def _write(self) -> None:
        assert self._file is not None
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]

    def go_back(self, step: int) -> None:
        """Remove the lines of steps after `step`, as `start` does."""
        self.close("", "")
        self._open(step)

    def close(self, status: str, message: str) -> None:
        """Write what the disk was too full for, and close the file."""
        if self._file is None:
            return
        try:
            self._write()
        except OSError as error:
            raise self._failure(error) from error
        finally:
            self._file.close()
            self._file = None

    def _failure(self, error: OSError) -> TrainingError:
        return TrainingError(f"cannot write {self.path}: {error.strerror or error}; free space or choose --run-dir")


def to_line(event: Event) -> str:
    """One JSON object and a newline; see JsonlObserver for values that are not finite."""
    nonfinite = [name for name, value in event.items() if isinstance(value, float) and not math.isfinite(value)]
    if not nonfinite:
        return json.dumps(dict(event)) + "\n"
    finite = {name: None if name in nonfinite else value for name, value in event.items()}
    return json.dumps({**finite, "nonfinite": nonfinite}) + "\n"


def cut_back(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and lines at the end that are not JSON; the order stays.

    The file is read once, in blocks. It is truncated where everything to remove is at its end, and replaced otherwise.

    Raises:
        OSError: it is a link, is not a regular file, or has more than MOST_BYTES.
    """
    with os.fdopen(open_regular(path, os.O_RDWR), "r+b") as file:
        if os.fstat(file.fileno()).st_size > MOST_BYTES:
            raise OSError(errno.EFBIG, f"has more than {MOST_BYTES:,} bytes: move it away", str(path))
        _trim(file)
        begin = _first_later(file, step)
        if begin is None:
            return
        file.seek(begin)
        if all(_is_later(line, step) for line in _lines(file)):
            file.truncate(begin)
            _trim(file)
            os.fsync(file.fileno())
            return
        file.seek(0)
        _rewrite(path, file, begin, step)


def _rewrite(path: Path, file: BinaryIO, begin: int, step: int) -> None:
    """Replace `path` by its first `begin` bytes and those of the lines behind them that are not of later steps."""
    with atomic_file(path, stat.S_IMODE(os.fstat(file.fileno()).st_mode)) as shorter:
        for left in range(begin, 0, -BLOCK_BYTES):
            shorter.write(file.read(min(left, BLOCK_BYTES)))
        shorter.writelines(line for line in _lines(file) if not _is_later(line, step))
        _trim(shorter)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines from where `file` is; longer ones in pieces."""
    return iter(lambda: file.readline(LINE_BYTES), b"")


def _first_later(file: BinaryIO, step: int) -> int | None:
    """Offset of the first line of a step after `step`.

    All lines are looked at: a checkpoint's line of an earlier step may follow those of later steps. A pattern finds the
    candidates many times faster than a parser.
    """
    offset = 0
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        block += file.readline(LINE_BYTES)
        if any(float(number) > step for number in STEP.findall(block)):
            begin = offset
            for line in io.BytesIO(block):
                if _is_later(line, step):
                    return begin
                begin += len(line)
        offset += len(block)
    return None


def _is_later(line: bytes, step: int) -> bool:
    """True for an object whose `step` is a number above `step`."""
    if STEP.search(line) is None:
        return False
    value = (_parse(line) or {}).get("step")
    return is_number(value) and cast(float, value) > step


def _trim(file: BinaryIO) -> None:
    """Cut off what follows the last newline, then lines at the end that are not JSON."""
    file.flush()
    size = file.seek(0, io.SEEK_END)
    end = _after_newline(file, size)
    while end > 0:
        begin = _after_newline(file, end - 1)
        file.seek(begin)
        if end - begin <= LINE_BYTES and _parse(file.read(end - begin)) is not None:
            break
        end = begin
    if end < size:
        file.truncate(end)


def _after_newline(file: BinaryIO, end: int) -> int:
    """Offset behind the last newline before `end`; 0 when there is none."""
    while end > 0:
        begin = max(0, end - TAIL_BYTES)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def _parse(line: bytes) -> dict[str, object] | None:
    """The object in a line; None when it is none."""
    try:
        return parse_object(line)
    except JsonError:
        return None
