"""Learning-rate schedules: pure functions `step -> multiplier` of the peak learning rate.

`step` counts from 0; the multiplier at `step` is the one that update number `step` uses. Nothing here has state, so a
resumed run needs none; `Plateau`, the one schedule that follows a metric, is the exception. A schedule asked beyond
its last step repeats its last value. Momentum is never changed, also not by one_cycle and cyclic.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distkit.config.check import flag
from distkit.config.schedule import TAKES, ScheduleConfig
from distkit.errors import ConfigError

Schedule = Callable[[int], float]
Anneal = Literal["cosine", "linear"]
CycleMode = Literal["triangular", "triangular2", "exp_range"]
#: Share of the run in which warmup_stable_decay falls.
DECAY_RATIO = 0.2


def _move(start: float, end: float, share: float, anneal: Anneal) -> float:
    """From `start` at share 0 to `end` at share 1; beyond that `end`."""
    share = min(share, 1.0)
    if anneal == "cosine":
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
    return start + (end - start) * share


def constant() -> Schedule:
    """Always the peak."""
    return lambda _step: 1.0


def cosine(num_steps: int, min_lr_ratio: float = 0.0) -> Schedule:
    """Half a cosine from 1 at step 0 to `min_lr_ratio` at `num_steps` (CosineAnnealingLR, T_max=num_steps)."""
    return lambda step: _move(1.0, min_lr_ratio, step / num_steps, "cosine")


def cosine_restarts(cycle_steps: int, cycle_growth: int = 1, min_lr_ratio: float = 0.0) -> Schedule:
    """Half cosines, each `cycle_growth` times as long as the one before (CosineAnnealingWarmRestarts)."""

    def multiplier(step: int) -> float:
        place, length = step, cycle_steps
        if cycle_growth == 1:
            place %= cycle_steps
        while place >= length:
            place, length = place - length, length * cycle_growth
        return _move(1.0, min_lr_ratio, place / length, "cosine")

    return multiplier


def linear(num_steps: int, min_lr_ratio: float = 0.0) -> Schedule:
    """A straight line from 1 at step 0 to `min_lr_ratio` at `num_steps` (LinearLR, total_iters=num_steps)."""
    return lambda step: _move(1.0, min_lr_ratio, step / num_steps, "linear")


def multi_step(milestones: Sequence[int], gamma: float = 0.1) -> Schedule:
    """Multiplied by `gamma` at each of the ascending `milestones`, from that step on (MultiStepLR)."""
    marks = tuple(milestones)
    return lambda step: gamma ** bisect_right(marks, step)


def exponential(gamma: float, min_lr_ratio: float = 0.0) -> Schedule:
    """`gamma ** step`, at least `min_lr_ratio` (ExponentialLR, which has no minimum)."""
    return lambda step: max(gamma**step, min_lr_ratio)


def polynomial(num_steps: int, power: float = 1.0, min_lr_ratio: float = 0.0) -> Schedule:
    """`(1 - step / num_steps) ** power`, squeezed to end at `min_lr_ratio` (PolynomialLR, which ends at 0)."""
    return lambda step: min_lr_ratio + (1 - min_lr_ratio) * (1 - min(step / num_steps, 1.0)) ** power


def one_cycle(
    num_steps: int,
    warmup_ratio: float = 0.3,
    initial_lr_ratio: float = 0.04,
    min_lr_ratio: float = 0.0,
    anneal: Anneal = "cosine",
) -> Schedule:
    """Up from `initial_lr_ratio` to 1 in `warmup_ratio` of the run, then down to `min_lr_ratio` at its last step.

    OneCycleLR with div_factor = 1 / initial_lr_ratio, final_div_factor = initial_lr_ratio / min_lr_ratio,
    cycle_momentum=False, three_phase=False. A rise shorter than one step starts at the peak.
    """
    top, last = warmup_ratio * num_steps - 1, num_steps - 1

    def multiplier(step: int) -> float:
        if step <= top and top > 0:
            return _move(initial_lr_ratio, 1.0, step / top, anneal)
        return _move(1.0, min_lr_ratio, (step - top) / (last - top), anneal)

    return multiplier


def cyclic(
    cycle_steps: int, cycle_mode: CycleMode = "triangular", gamma: float = 1.0, min_lr_ratio: float = 0.0
) -> Schedule:
    """Straight up from `min_lr_ratio` to 1 and down again, every `cycle_steps` (CyclicLR, cycle_momentum=False).

    triangular2 halves the height with each cycle; exp_range multiplies it by `gamma ** step`. The first step of a cycle
    has `min_lr_ratio` itself.
    """

    def multiplier(step: int) -> float:
        cycle, place = divmod(step, cycle_steps)
        height = 1 - abs(2 * place / cycle_steps - 1)
        if cycle_mode == "triangular2":
            height /= 2.0**cycle
        elif cycle_mode == "exp_range":
            height *= gamma**step
        return min_lr_ratio + (1 - min_lr_ratio) * height

    return multiplier


def warmup_stable_decay(
    num_steps: int, decay_steps: int, min_lr_ratio: float = 0.0, anneal: Anneal = "linear"
) -> Schedule:
    """1, then in the last `decay_steps` down to `min_lr_ratio` at `num_steps`; the warmup is `with_warmup`'s.

    Source: Hu et al. 2024, arXiv:2404.06395, section 4.2. Step num_steps - decay_steps is the last one with 1.
    """
    start = num_steps - decay_steps
    return lambda step: 1.0 if step <= start else _move(1.0, min_lr_ratio, (step - start) / decay_steps, anneal)


def with_warmup(schedule: Schedule, warmup_steps: int) -> Schedule:
    """`(step + 1) / warmup_steps` for the first `warmup_steps`, then `schedule` from its own step 0.

    The first step has 1 / warmup_steps, never 0; step warmup_steps - 1 has 1. This is SequentialLR over
    LinearLR(start_factor=1 / warmup_steps, total_iters=warmup_steps - 1) and `schedule`, milestone `warmup_steps`.
    """
    if warmup_steps == 0:
        return schedule
    return lambda step: (step + 1) / warmup_steps if step < warmup_steps else schedule(step - warmup_steps)


def _given(config: ScheduleConfig, *names: str) -> dict[str, Any]:
    """The fields of `config` that are set: what is not set keeps the default of the function that takes it."""
    return {name: value for name in names if (value := getattr(config, name)) is not None}


@dataclass(frozen=True)
class _Span:
    """The steps a shape is laid over: those of the run (`num_steps`) after the warmup."""

    num_steps: int
    warmup_steps: int
    steps_per_epoch: float

    @property
    def shape_steps(self) -> int:
        return self.num_steps - self.warmup_steps


def _cosine_restarts(c: ScheduleConfig, span: _Span) -> Schedule:
    cycle_steps = c.cycle_steps or max(1, round((c.cycle_epochs or 0) * span.steps_per_epoch))
    return cosine_restarts(cycle_steps, **_given(c, "cycle_growth", "min_lr_ratio"))


def _multi_step(c: ScheduleConfig, span: _Span) -> Schedule:
    name, unit = ("milestone_epochs", span.steps_per_epoch) if c.milestones is None else ("milestones", 1.0)
    marks = [round(mark * unit) for mark in c.milestones or c.milestone_epochs or ()]
    outside = [mark for mark in marks if not span.warmup_steps <= mark < span.num_steps]
    if outside:
        middle = (span.warmup_steps + span.num_steps) // 2 / unit
        raise ConfigError(
            f"{flag(f'schedule.{name}')} lies outside the part of the run after the warmup",
            expected=f"{span.warmup_steps / unit:.10g} to {(span.num_steps - 1) / unit:.10g}, as the run is long",
            got=", ".join(f"{mark / unit:.10g}" for mark in outside[:5]),
            fix=f"{flag(f'schedule.{name}')} {middle:.10g}, or --num-steps {max(marks) + 1}",
        )
    return multi_step([mark - span.warmup_steps for mark in marks], **_given(c, "gamma"))


def _cyclic(c: ScheduleConfig, span: _Span) -> Schedule:
    # an even number, so that a step hits the peak
    cycle_steps = c.cycle_steps or max(2, 2 * round((c.cycle_epochs or 0) * span.steps_per_epoch / 2))
    return cyclic(cycle_steps, **_given(c, "cycle_mode", "gamma", "min_lr_ratio"))


def _warmup_stable_decay(c: ScheduleConfig, span: _Span) -> Schedule:
    ratio = DECAY_RATIO if c.decay_ratio is None else c.decay_ratio
    decay_steps = max(1, round(ratio * span.num_steps))
    if decay_steps > span.shape_steps:
        raise ConfigError(
            "--schedule.decay-ratio and the warmup together are longer than the run",
            expected=f"at most {span.shape_steps} of {span.num_steps} steps after {span.warmup_steps} of warmup",
            got=f"{ratio:g}, which is {decay_steps} steps",
            fix=f"--schedule.decay-ratio {span.shape_steps / span.num_steps:.10g}",
        )
    return warmup_stable_decay(span.shape_steps, decay_steps, **_given(c, "min_lr_ratio", "anneal"))


_SHAPES: dict[str, Callable[[ScheduleConfig, _Span], Schedule]] = {
    "constant": lambda _c, _span: constant(),
    "cosine": lambda c, span: cosine(span.shape_steps, **_given(c, "min_lr_ratio")),
    "cosine_restarts": _cosine_restarts,
    "linear": lambda c, span: linear(span.shape_steps, **_given(c, "min_lr_ratio")),
    "multi_step": _multi_step,
    "exponential": lambda c, _span: exponential(**_given(c, "gamma", "min_lr_ratio")),
    "polynomial": lambda c, span: polynomial(span.shape_steps, **_given(c, "power", "min_lr_ratio")),
    "one_cycle": lambda c, span: one_cycle(span.num_steps, **_given(c, *TAKES["one_cycle"])),
    "cyclic": _cyclic,
    "warmup_stable_decay": _warmup_stable_decay,
    "plateau": lambda _c, _span: constant(),
}


def build_schedule(config: ScheduleConfig, *, num_steps: int, steps_per_epoch: float) -> Schedule:
    """The schedule of a run of `num_steps` steps; numbers of epochs are rounded to whole steps.

    Of "plateau" this is the part that is a function of the step, the warmup: multiply by `Plateau.factor`.

    Raises:
        ConfigError: the warmup, a milestone or the decay does not fit into the run.
    """
    name, unit = ("warmup_epochs", steps_per_epoch) if config.warmup_epochs is not None else ("warmup_steps", 1.0)
    warmup_steps = round((config.warmup_epochs or config.warmup_steps or 0) * unit)
    if warmup_steps >= num_steps:
        raise ConfigError(
            f"{flag(f'schedule.{name}')} is as long as the run",
            expected=f"less than the {num_steps} steps of the run",
            got=f"{warmup_steps} steps",
            fix=f"{flag(f'schedule.{name}')} {num_steps // 10 / unit:.10g}, or --num-steps {10 * warmup_steps}",
        )
    shape = _SHAPES[config.name](config, _Span(num_steps, warmup_steps, steps_per_epoch))
    return with_warmup(shape, warmup_steps)


class Plateau:
    """A factor that falls when a metric stops improving (ReduceLROnPlateau, threshold_mode="rel", eps=0).

    An evaluation counts as better when it beats the best one by the share `threshold`; more than `patience` evaluations
    in a row that do not multiply the factor by `gamma`, down to `min_lr_ratio`. NaN is never better.
    """

    def __init__(
        self,
        gamma: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        min_lr_ratio: float = 0.0,
        metric_mode: Literal["min", "max"] = "min",
    ) -> None:
        self.gamma, self.patience, self.min_lr_ratio, self.mode = gamma, patience, min_lr_ratio, metric_mode
        self.factor = 1.0
        self._bar = 1 - threshold if metric_mode == "min" else 1 + threshold
        self._best: float | None = None
        self._num_bad = 0

    def update(self, value: float) -> None:
        """Take the metric of one evaluation into account."""
        if self._better(value):
            self._best, self._num_bad = value, 0
        else:
            self._num_bad += 1
        if self._num_bad > self.patience:
            self.factor = max(self.factor * self.gamma, self.min_lr_ratio)
            self._num_bad = 0

    def _better(self, value: float) -> bool:
        if self._best is None:
            return value < math.inf if self.mode == "min" else value > -math.inf
        return value < self._best * self._bar if self.mode == "min" else value > self._best * self._bar

    def state_dict(self) -> dict[str, float | int]:
        """The factor, the bad evaluations in a row and, once there is one, the best value."""
        state: dict[str, float | int] = {"factor": self.factor, "num_bad": self._num_bad}
        return state if self._best is None else state | {"best": self._best}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Take all three back."""
        self.factor, self._num_bad, self._best = state["factor"], int(state["num_bad"]), state.get("best")


def build_plateau(config: ScheduleConfig) -> Plateau | None:
    """The history-dependent part of "plateau"; None for every other schedule."""
    if config.name != "plateau":
        return None
    return Plateau(**_given(config, "gamma", "patience", "threshold", "min_lr_ratio", "metric_mode"))
