"""How long a rank's own forward takes, measured in a few steps before each report; nothing here waits for the device.

In a synchronous run all ranks have the same step time: the backward exchanges gradients, so that in it everybody waits
for the slowest. The forward is a rank's own, except where a strategy gathers parameters or sends buffers in it. What
such a gate takes is measured by hooks around it and subtracted. The hooks are there in the timed steps only: putting
them there costs less than 10 µs a gate at each report, next to exchanges in every step that take longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

#: Steps before a report that are timed; their median does not mind one that was interrupted.
TIMED_STEPS = 5
#: The outer module's first hook before its forward, and the inner one's last, between which a rank waits for others.
Gate = tuple[nn.Module, nn.Module]


class ForwardTimer:
    """Enter it around a forward.

    On a GPU it records events and reads them at the report, which has waited for the device; on a CPU, where an
    operation has ended when its call returns, it reads the clock.

    Args:
        report_every: steps between reports; None: never time anything.
        device: where the forward runs.
        gates: where it waits for other ranks (Strategy.gates).
    """

    def __init__(
        self,
        report_every: int | None = None,
        device: torch.device | None = None,
        gates: Sequence[Gate] = (),
    ) -> None:
        self._every, self._gates = report_every, gates
        self._on_gpu = device is not None and device.type == "cuda"
        self._wanted = self._inside = False
        #: A step's forward without its gates: the median of the timed steps before the last `read`; 0 without any.
        self.seconds = 0.0
        #: Of each timed step the marks in the order of time: begin, (gate begins, gate ends) ..., end, begin, ...
        self._times: list[list[float]] = []
        self._events: list[list[torch.cuda.Event]] = []
        self._handles: list[RemovableHandle] = []

    def begin_step(self, step: int) -> None:
        """Decide whether the next step, after `step` finished ones, is timed."""
        if self._every is not None:
            self._wanted = self._every - step % self._every <= TIMED_STEPS
            if self._wanted:
                self._times.append([])
                self._events.append([])
                self._watch_gates()

    def __enter__(self) -> None:
        if self._wanted:
            self._inside = True
            self._mark()

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            self._mark()
            self._inside = False

    def _watch_gates(self) -> None:
        for outer, inner in () if self._handles else self._gates:
            # the strategy's hooks are between the two
            self._handles.append(outer.register_forward_pre_hook(self._hook, prepend=True))
            self._handles.append(inner.register_forward_pre_hook(self._hook))

    def _hook(self, *_: object) -> None:
        if self._inside:  # not in an evaluation, nor where a backward repeats a forward
            self._mark()

    def _mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events[-1].append(event)
        else:
            self._times[-1].append(perf_counter())

    def read(self) -> None:
        """Set `seconds` from the steps timed since the last call; the device must have done what they queued."""
        if self._on_gpu:
            self._times = [[marks[0].elapsed_time(mark) / 1e3 for mark in marks] for marks in self._events]
        # gates follow each other, so a rank is in none between the marks 0 and 1, 2 and 3, and so on
        own = [sum(marks[1::2]) - sum(marks[::2]) for marks in self._times]
        self.seconds = median(own or [0.0])
        self._times, self._events = [], []
        while self._handles:
            self._handles.pop().remove()
