"""Throughput of training alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Clock:
    """Samples per second over the last lap and over the whole run, without what ran inside `excluded`.

    A lap ends where a report has just waited for the device, so that queued work is not counted as done. Seconds and
    samples of all laps are state: a resumed run continues counting.
    """

    def __init__(self) -> None:
        self._lap_start = perf_counter()
        self._samples = 0
        self._carried = 0.0
        self.seconds = 0.0

    def begin(self) -> None:
        """Begin the first lap, or continue the restored one."""
        self._lap_start = perf_counter() - self._carried
        self._carried = 0.0

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time inside (an evaluation, a save) counts neither for the lap nor for the whole."""
        before = perf_counter()
        try:
            yield
        finally:
            self._lap_start += perf_counter() - before

    def lap(self, samples: int) -> float:
        """Samples per second of the lap that ends now, in which `samples` were trained."""
        now = perf_counter()
        seconds = now - self._lap_start
        self._lap_start = now
        self._samples += samples
        self.seconds += seconds
        return samples / max(seconds, 1e-9)

    def average(self) -> float:
        """Samples per second of all laps together."""
        return self._samples / max(self.seconds, 1e-9)

    def state_dict(self) -> dict[str, float]:
        """Seconds and samples of all laps, and the seconds of the one that is open."""
        return {"seconds": self.seconds, "samples": self._samples, "open_seconds": perf_counter() - self._lap_start}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take them back; the open lap continues at `begin`."""
        self.seconds, self._samples = state["seconds"], int(state["samples"])
        self._carried = state["open_seconds"]
