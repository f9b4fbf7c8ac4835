"""metrics.jsonl: every event, one JSON object a line, on disk as soon as it happened."""

# ruff: noqa: ARG002 (an observer ignores what it has no use for)
from __future__ import annotations

import io
import json
import math
from pathlib import Path

from distkit.errors import TrainingError
from distkit.observers.base import Event, Observer, RunInfo

TAIL_BYTES = 65536


class JsonlObserver(Observer):
    """Appends to `path`; a resumed run goes on in the same file.

    JSON has no NaN and no infinity: such a value is written as null, and the line gets `"nonfinite": ["loss"]` with the
    names. A line that a kill cut off is removed on start, so every line is a whole object. Steps that were done twice,
    because the run was killed after its last checkpoint, have two lines: the last one of a step counts.

    Raises:
        TrainingError: from start and record, naming the path, when a line cannot be written (disk full, no permission).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None

    def start(self, info: RunInfo, step: int) -> None:
        """Open the file and cut off what follows its last newline."""
        try:
            _drop_torn_line(self.path)
            # Unbuffered: a buffer would keep lines that a full disk refused, and fail again at exit.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failure(error) from error

    def record(self, event: Event) -> None:
        """Write one line."""
        if self._file is None:
            raise TrainingError(f"{self.path} is not open: start() comes before record()")
        left = memoryview(to_line(event).encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._failure(error) from error

    def close(self, status: str, message: str) -> None:
        """Close the file; nothing is written."""
        if self._file is not None:
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


def _drop_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        end = file.seek(0, io.SEEK_END)
        while end > 0:
            begin = max(0, end - TAIL_BYTES)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        file.truncate(end)
