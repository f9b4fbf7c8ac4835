"""The learning-rate schedules: one class each, with the fields that it takes and its formula.

A new schedule is a class here (or in a file of its own) and its entry in `SCHEDULES`. Multipliers of optim.lr are in
[0, 1]. Names in brackets are torch's schedulers, which tests compare with. Momentum is never changed, not even by
one_cycle and cyclic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from distkit.config.check import flag, require
from distkit.config.choice import Choice, number
from distkit.errors import ConfigError
from distkit.schedules import Anneal, PlateauTracker, Schedule, move, with_warmup

#: Pairs of fields, in steps and in epochs: at most one of each pair is set.
PAIRS = (("warmup_steps", "warmup_epochs"), ("cycle_steps", "cycle_epochs"), ("milestones", "milestone_epochs"))


@dataclass(frozen=True)
class Span:
    """The part of a run that a schedule's shape covers."""

    num_steps: int
    """Steps of the whole run."""
    warmup_steps: int
    """Steps of warmup before the shape begins."""
    steps_per_epoch: float

    @property
    def shape_steps(self) -> int:
        """Steps after the warmup."""
        return self.num_steps - self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Choice, ABC):
    """The learning rate as a function of the step: optim.lr times a multiplier in [0, 1]."""

    section = "schedule"
    needs_evaluations: ClassVar[bool] = False
    """Whether it follows an evaluation metric, through `tracker`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for steps, epochs in PAIRS:
            if getattr(self, steps, None) is not None and getattr(self, epochs, None) is not None:
                raise ConfigError(
                    f"{flag(f'schedule.{steps}')} and {flag(f'schedule.{epochs}')} say the same thing twice",
                    expected="one of the two",
                    fix=f"{flag(f'schedule.{epochs}')} None",
                )

    @abstractmethod
    def shape(self, span: Span) -> Schedule:
        """The multipliers after the warmup, from step 0 of `span.shape_steps`.

        Raises:
            ConfigError: the fields do not fit the run.
        """

    def build(self, *, num_steps: int, steps_per_epoch: float) -> Schedule:
        """The schedule of a run of `num_steps` steps; numbers of epochs are rounded to whole steps.

        Raises:
            ConfigError: the warmup, a milestone or the decay does not fit into the run.
        """
        return self.shape(Span(num_steps, 0, steps_per_epoch))

    def tracker(self) -> PlateauTracker | None:
        """The factor that follows the evaluations, besides the multiplier; None if there is none."""
        return None


@dataclass(frozen=True, kw_only=True)
class _WithWarmup(ScheduleConfig):
    """A schedule after a linear warmup."""

    warmup_steps: int | None = number(None, least=0, example="1")
    """Steps of linear warmup, >= 0; default none."""
    warmup_epochs: float | None = number(None, least=0, example="1")
    """The same in epochs, >= 0; set one of the two."""

    def build(self, *, num_steps: int, steps_per_epoch: float) -> Schedule:
        name, unit = ("warmup_epochs", steps_per_epoch) if self.warmup_epochs is not None else ("warmup_steps", 1.0)
        warmup_steps = round((self.warmup_epochs or self.warmup_steps or 0) * unit)
        if warmup_steps >= num_steps:
            raise ConfigError(
                f"{flag(f'schedule.{name}')} is as long as the run",
                expected=f"less than the {num_steps} steps of the run",
                got=f"{warmup_steps} steps",
                fix=f"{flag(f'schedule.{name}')} {num_steps // 10 / unit:.10g}, or --num-steps {10 * warmup_steps}",
            )
        return with_warmup(self.shape(Span(num_steps, warmup_steps, steps_per_epoch)), warmup_steps)


@dataclass(frozen=True, kw_only=True)
class _WithMinimum(_WithWarmup):
    min_lr_ratio: float = number(0.0, least=0, most=1, example="0.1")
    """Lowest learning rate as a fraction of the peak, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Constant(_WithWarmup):
    """Always the peak."""

    name = "constant"

    def shape(self, _span: Span) -> Schedule:
        return lambda _step: 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine(_WithMinimum):
    """Half a cosine from 1 down to min_lr_ratio at the end of the run (CosineAnnealingLR)."""

    name = "cosine"

    def shape(self, span: Span) -> Schedule:
        return lambda step: move(1.0, self.min_lr_ratio, step / span.shape_steps, "cosine")


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(_WithMinimum):
    """Half cosines, each `cycle_growth` times as long as the one before (CosineAnnealingWarmRestarts)."""

    name = "cosine_restarts"

    cycle_steps: int | None = number(None, least=1, example="2")
    """Steps of the first cycle, >= 1."""
    cycle_epochs: float | None = number(None, above=0, example="1")
    """The same in epochs, > 0; set one of the two."""
    cycle_growth: int = number(1, least=1, example="2")
    """Length of a cycle divided by that of the one before, >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_cycle(self)

    def shape(self, span: Span) -> Schedule:
        first = self.cycle_steps or max(1, round((self.cycle_epochs or 0) * span.steps_per_epoch))

        def multiplier(step: int) -> float:
            offset, length = step, first
            if self.cycle_growth == 1:
                offset %= first
            while offset >= length:
                offset, length = offset - length, length * self.cycle_growth
            return move(1.0, self.min_lr_ratio, offset / length, "cosine")

        return multiplier


@dataclass(frozen=True, kw_only=True)
class Linear(_WithMinimum):
    """A straight line from 1 down to min_lr_ratio at the end of the run (LinearLR)."""

    name = "linear"

    def shape(self, span: Span) -> Schedule:
        return lambda step: move(1.0, self.min_lr_ratio, step / span.shape_steps, "linear")


@dataclass(frozen=True, kw_only=True)
class MultiStep(_WithWarmup):
    """Multiplied by `gamma` at each milestone, from that step on (MultiStepLR)."""

    name = "multi_step"

    milestones: tuple[int, ...] | None = None
    """Steps at which the rate falls, ascending, counted from step 0 of the run."""
    milestone_epochs: tuple[float, ...] | None = None
    """The same in epochs; set one of the two."""
    gamma: float = number(0.1, above=0, most=1)
    """Factor at each milestone, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = self.milestones is None and self.milestone_epochs is None
        example = "80 120"
        require(not missing, "schedule.milestone_epochs", "the epochs at which the rate falls", "nothing", example)
        for name in ("milestones", "milestone_epochs"):
            marks = getattr(self, name) or ()
            ok = all(mark > 0 for mark in marks) and list(marks) == sorted(set(marks))
            require(ok, f"schedule.{name}", "ascending numbers > 0", marks, example)

    def shape(self, span: Span) -> Schedule:
        name, unit = ("milestone_epochs", span.steps_per_epoch) if self.milestones is None else ("milestones", 1.0)
        marks = [round(mark * unit) for mark in self.milestones or self.milestone_epochs or ()]
        outside = [mark for mark in marks if not span.warmup_steps <= mark < span.num_steps]
        if outside:
            middle = (span.warmup_steps + span.num_steps) // 2 / unit
            raise ConfigError(
                f"{flag(f'schedule.{name}')} is outside the part of the run after the warmup",
                expected=f"{span.warmup_steps / unit:.10g} to {(span.num_steps - 1) / unit:.10g} in this run",
                got=", ".join(f"{mark / unit:.10g}" for mark in outside[:5]),
                fix=f"{flag(f'schedule.{name}')} {middle:.10g}, or --num-steps {max(marks) + 1}",
            )
        after_warmup = [mark - span.warmup_steps for mark in marks]
        return lambda step: self.gamma ** bisect_right(after_warmup, step)


@dataclass(frozen=True, kw_only=True)
class Exponential(_WithMinimum):
    """`gamma ** step`, at least min_lr_ratio (ExponentialLR, which has no minimum)."""

    name = "exponential"

    gamma: float = field(metadata={"above": 0, "most": 1, "example": "0.9999"})
    """Factor of each step, in (0, 1]."""

    def shape(self, _span: Span) -> Schedule:
        return lambda step: max(self.gamma**step, self.min_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class Polynomial(_WithMinimum):
    """`(1 - step / steps) ** power`, squeezed to end at min_lr_ratio (PolynomialLR, which ends at 0)."""

    name = "polynomial"

    power: float = number(1.0, above=0)
    """Exponent, > 0."""

    def shape(self, span: Span) -> Schedule:
        low = self.min_lr_ratio
        return lambda step: low + (1 - low) * (1 - min(step / span.shape_steps, 1.0)) ** self.power


@dataclass(frozen=True, kw_only=True)
class OneCycle(ScheduleConfig):
    """Up from initial_lr_ratio to 1 in warmup_ratio of the run, then down to min_lr_ratio at its last step.

    OneCycleLR with div_factor = 1 / initial_lr_ratio, final_div_factor = initial_lr_ratio / min_lr_ratio,
    cycle_momentum=False, three_phase=False. A rise shorter than one step starts at the peak.
    """

    name = "one_cycle"

    warmup_ratio: float = number(0.3, above=0, below=1)
    """Share of the run in which the rate rises, in (0, 1)."""
    initial_lr_ratio: float = number(0.04, above=0, most=1)
    """First learning rate as a fraction of the peak, in (0, 1]."""
    min_lr_ratio: float = number(0.0, least=0, most=1, example="0.1")
    """Last learning rate as a fraction of the peak, in [0, 1]."""
    anneal: Anneal = "cosine"
    """How the rate moves."""

    def shape(self, span: Span) -> Schedule:
        top, last = self.warmup_ratio * span.num_steps - 1, span.num_steps - 1

        def multiplier(step: int) -> float:
            if step <= top and top > 0:
                return move(self.initial_lr_ratio, 1.0, step / top, self.anneal)
            return move(1.0, self.min_lr_ratio, (step - top) / (last - top), self.anneal)

        return multiplier


@dataclass(frozen=True, kw_only=True)
class Cyclic(ScheduleConfig):
    """Straight up from min_lr_ratio to 1 and down again, cycle by cycle (CyclicLR, cycle_momentum=False).

    triangular2 halves the height with each cycle; exp_range multiplies it by `gamma ** step`. The first step of a cycle
    has min_lr_ratio itself.
    """

    name = "cyclic"

    cycle_steps: int | None = number(None, least=1, example="2")
    """Steps of one cycle, an even number."""
    cycle_epochs: float | None = number(None, above=0, example="1")
    """The same in epochs, > 0; set one of the two."""
    cycle_mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    """Shape of a cycle; only exp_range uses gamma."""
    gamma: float | None = number(None, above=0, most=1, example="0.9999")
    """Factor of each step with exp_range, in (0, 1]."""
    min_lr_ratio: float = number(0.0, least=0, most=1, example="0.1")
    """Lowest learning rate as a fraction of the peak, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_cycle(self)
        if (self.gamma is not None) != (self.cycle_mode == "exp_range"):
            got, example = ("nothing", "0.9999") if self.gamma is None else (self.gamma, "None")
            require(False, "schedule.gamma", "a number with --schedule.cycle-mode exp_range, else None", got, example)
        even = self.cycle_steps is None or self.cycle_steps % 2 == 0
        require(even, "schedule.cycle_steps", "an even number", self.cycle_steps, "2000")

    def shape(self, span: Span) -> Schedule:
        # an even number, so that a step hits the peak
        cycle_steps = self.cycle_steps or max(2, 2 * round((self.cycle_epochs or 0) * span.steps_per_epoch / 2))

        def multiplier(step: int) -> float:
            cycle, offset = divmod(step, cycle_steps)
            height = 1 - abs(2 * offset / cycle_steps - 1)
            if self.cycle_mode == "triangular2":
                height /= 2.0**cycle
            elif self.gamma is not None:
                height *= self.gamma**step
            return self.min_lr_ratio + (1 - self.min_lr_ratio) * height

        return multiplier


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(_WithMinimum):
    """1 after the warmup, then in the last decay_ratio of the run down to min_lr_ratio.

    Source: Hu et al. 2024, arXiv:2404.06395, section 4.2. The last step with 1 is the one where the decay begins.
    """

    name = "warmup_stable_decay"

    decay_ratio: float = number(0.2, above=0, most=1)
    """Share of the run in which the rate falls, in (0, 1]."""
    anneal: Anneal = "linear"
    """How the rate falls."""

    def shape(self, span: Span) -> Schedule:
        decay_steps = max(1, round(self.decay_ratio * span.num_steps))
        if decay_steps > span.shape_steps:
            raise ConfigError(
                "--schedule.decay-ratio and the warmup together are longer than the run",
                expected=f"at most {span.shape_steps} of {span.num_steps} steps after {span.warmup_steps} of warmup",
                got=f"{self.decay_ratio:g}, which is {decay_steps} steps",
                fix=f"--schedule.decay-ratio {span.shape_steps / span.num_steps:.10g}",
            )
        start = span.shape_steps - decay_steps
        end = self.min_lr_ratio
        return lambda step: 1.0 if step <= start else move(1.0, end, (step - start) / decay_steps, self.anneal)


@dataclass(frozen=True, kw_only=True)
class Plateau(_WithMinimum):
    """The peak times a factor that falls when an evaluation metric stops improving: see `PlateauTracker`."""

    name = "plateau"
    needs_evaluations = True

    gamma: float = number(0.1, above=0, most=1)
    """What the factor is multiplied by, in (0, 1]."""
    patience: int = number(10, least=0)
    """Evaluations without improvement that are tolerated, >= 0."""
    threshold: float = number(1e-4, least=0)
    """Relative improvement that counts, >= 0."""
    metric: str = "loss"
    """Evaluation metric to watch."""
    metric_mode: Literal["min", "max"] = "min"
    """Whether the metric should fall or rise."""

    def shape(self, _span: Span) -> Schedule:
        return lambda _step: 1.0

    def tracker(self) -> PlateauTracker:
        return PlateauTracker(
            gamma=self.gamma,
            patience=self.patience,
            threshold=self.threshold,
            min_lr_ratio=self.min_lr_ratio,
            metric=self.metric,
            mode=self.metric_mode,
        )


def _require_cycle(config: CosineRestarts | Cyclic) -> None:
    known = config.cycle_steps is not None or config.cycle_epochs is not None
    require(known, "schedule.cycle_epochs", f"the length of a cycle of {config.name}", "nothing", "10")


SCHEDULES: dict[str, type[ScheduleConfig]] = {
    kind.name: kind
    for kind in (
        Constant,
        Cosine,
        CosineRestarts,
        Linear,
        MultiStep,
        Exponential,
        Polynomial,
        OneCycle,
        Cyclic,
        WarmupStableDecay,
        Plateau,
    )
}
