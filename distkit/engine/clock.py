"""Throughput of training alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Clock:
    """Samples per second over the last lap and over the whole run, without what ran inside `excluded`.

    A lap ends where a report has just waited for the device, so that queued work is not counted as done.
    """

    def __init__(self) -> None:
        self._start = self._lap_start = perf_counter()
        self._samples = 0

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time inside (an evaluation, a save) counts neither for the lap nor for the whole."""
        before = perf_counter()
        try:
            yield
        finally:
            passed = perf_counter() - before
            self._start += passed
            self._lap_start += passed

    def lap(self, samples: int) -> float:
        """Samples per second of the lap that ends now, in which `samples` were trained."""
        now = perf_counter()
        rate = samples / max(now - self._lap_start, 1e-9)
        self._lap_start = now
        self._samples += samples
        return rate

    @property
    def seconds(self) -> float:
        """Seconds of all laps together."""
        return self._lap_start - self._start

    def average(self) -> float:
        """Samples per second of all laps together."""
        return self._samples / max(self.seconds, 1e-9)
