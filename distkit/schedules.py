"""What learning-rate schedules are made of; the schedules are in `distkit.config.schedule`, one class each.

A schedule is a pure function `step -> multiplier` of the peak learning rate. `step` counts from 0; the multiplier at
`step` is the one that update number `step` uses. Schedules have no state, so a resumed run needs none;
`PlateauTracker` follows a metric and is the exception. A schedule asked beyond its last step repeats its last value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

Schedule = Callable[[int], float]
Anneal = Literal["cosine", "linear"]


def move(start: float, end: float, share: float, anneal: Anneal) -> float:
    """From `start` at share 0 to `end` at share 1; beyond that `end`."""
    share = min(share, 1.0)
    if anneal == "cosine":
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
    return start + (end - start) * share


def with_warmup(schedule: Schedule, warmup_steps: int) -> Schedule:
    """`(step + 1) / warmup_steps` for the first `warmup_steps`, then `schedule` from its own step 0.

    The first step has 1 / warmup_steps, never 0; step warmup_steps - 1 has 1. This is SequentialLR over
    LinearLR(start_factor=1 / warmup_steps, total_iters=warmup_steps - 1) and `schedule`, milestone `warmup_steps`.
    """
    if warmup_steps == 0:
        return schedule
    return lambda step: (step + 1) / warmup_steps if step < warmup_steps else schedule(step - warmup_steps)


class PlateauTracker:
    """A factor that falls when a metric stops improving (ReduceLROnPlateau, threshold_mode="rel", eps=0).

    An evaluation counts as better when it beats the best one by the share `threshold`; more than `patience` evaluations
    in a row that do not multiply the factor by `gamma`, down to `min_lr_ratio`. NaN is never better.
    """

    def __init__(
        self, *, gamma: float, patience: int, threshold: float, min_lr_ratio: float, metric: str, mode: str
    ) -> None:
        self.gamma, self.patience, self.min_lr_ratio = gamma, patience, min_lr_ratio
        self.metric, self.mode = metric, mode
        self.factor = 1.0
        #: The metric that the restored state was about, where it was another one.
        self.metric_before: str | None = None
        # as if smaller were better: a metric that should rise is negated
        self._sign = 1 if mode == "min" else -1
        self._threshold = threshold
        self._best: float | None = None
        self._num_bad = 0

    def update(self, value: float) -> None:
        """Take the metric of one evaluation into account."""
        if self._is_better(value):
            self._best, self._num_bad = value, 0
        else:
            self._num_bad += 1
        if self._num_bad > self.patience:
            self.factor = max(self.factor * self.gamma, self.min_lr_ratio)
            self._num_bad = 0

    def _is_better(self, value: float) -> bool:
        bar = math.inf * self._sign if self._best is None else self._best * (1 - self._sign * self._threshold)
        return value * self._sign < bar * self._sign

    @property
    def _rule(self) -> str:
        return f"{self.metric} ({self.mode})"

    def state_dict(self) -> dict[str, float | str]:
        """The factor, the bad evaluations in a row, the metric and, once there is one, its best value."""
        state: dict[str, float | str] = {"factor": self.factor, "num_bad": self._num_bad, "rule": self._rule}
        return state if self._best is None else state | {"best": self._best}

    def load_state_dict(self, state: Mapping[str, float | str]) -> None:
        """Take them back; of another metric only the factor."""
        rule = str(state.get("rule", self._rule))
        self.metric_before = None if rule == self._rule else rule
        known = {} if self.metric_before else state
        best = known.get("best")
        self.factor, self._num_bad = float(state["factor"]), int(known.get("num_bad", 0))
        self._best = None if best is None else float(best)
