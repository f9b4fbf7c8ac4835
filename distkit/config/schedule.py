"""Which learning-rate schedule, and its numbers. The functions are in `distkit.schedules`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from distkit.config.check import flag, require, require_number, require_unused
from distkit.errors import ConfigError, nearest

ScheduleName = Literal[
    "constant",
    "cosine",
    "cosine_restarts",
    "linear",
    "multi_step",
    "exponential",
    "polynomial",
    "one_cycle",
    "cyclic",
    "warmup_stable_decay",
    "plateau",
]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)

#: The optional fields that each schedule takes besides warmup, which all but one_cycle, cyclic take.
TAKES: dict[str, frozenset[str]] = {
    "constant": frozenset(),
    "cosine": frozenset({"min_lr_ratio"}),
    "cosine_restarts": frozenset({"min_lr_ratio", "cycle_steps", "cycle_epochs", "cycle_growth"}),
    "linear": frozenset({"min_lr_ratio"}),
    "multi_step": frozenset({"milestones", "milestone_epochs", "gamma"}),
    "exponential": frozenset({"gamma", "min_lr_ratio"}),
    "polynomial": frozenset({"power", "min_lr_ratio"}),
    "one_cycle": frozenset({"warmup_ratio", "initial_lr_ratio", "min_lr_ratio", "anneal"}),
    "cyclic": frozenset({"min_lr_ratio", "cycle_steps", "cycle_epochs", "cycle_mode", "gamma"}),
    "warmup_stable_decay": frozenset({"min_lr_ratio", "decay_ratio", "anneal"}),
    "plateau": frozenset({"gamma", "patience", "threshold", "min_lr_ratio", "metric", "metric_mode"}),
}
WARMUP = frozenset({"warmup_steps", "warmup_epochs"})
OWN_WARMUP = frozenset({"one_cycle", "cyclic"})
PAIRS = (("warmup_steps", "warmup_epochs"), ("cycle_steps", "cycle_epochs"), ("milestones", "milestone_epochs"))


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate as a function of the step: optim.lr times a multiplier in [0, 1].

    Fields that are None keep the chosen schedule's default; a field that the schedule does not take cannot be set.
    """

    name: ScheduleName = "cosine"
    """The shape after the warmup."""
    warmup_steps: int | None = None
    """Steps of linear warmup, >= 0; default none."""
    warmup_epochs: float | None = None
    """The same in epochs, >= 0; set one of the two."""
    min_lr_ratio: float | None = None
    """Lowest learning rate as a fraction of the peak, in [0, 1]; default 0."""
    milestones: tuple[int, ...] | None = None
    """Steps at which multi_step multiplies by gamma, ascending, counted from step 0."""
    milestone_epochs: tuple[float, ...] | None = None
    """The same in epochs; set one of the two."""
    gamma: float | None = None
    """Factor of multi_step and plateau (default 0.1), a step's factor of exponential and cyclic, in (0, 1]."""
    power: float | None = None
    """Exponent of polynomial, > 0; default 1."""
    cycle_steps: int | None = None
    """Steps of the first cycle of cosine_restarts or of one cycle of cyclic, >= 1 (cyclic: even)."""
    cycle_epochs: float | None = None
    """The same in epochs, > 0; set one of the two."""
    cycle_growth: int | None = None
    """Each cycle of cosine_restarts is this many times the one before, >= 1; default 1."""
    cycle_mode: Literal["triangular", "triangular2", "exp_range"] | None = None
    """Shape of cyclic; default triangular. gamma belongs to exp_range."""
    warmup_ratio: float | None = None
    """Share of the run in which one_cycle rises, in (0, 1); default 0.3."""
    initial_lr_ratio: float | None = None
    """First learning rate of one_cycle as a fraction of the peak, in (0, 1]; default 0.04."""
    decay_ratio: float | None = None
    """Share of the run in which warmup_stable_decay falls, in (0, 1]; default 0.2."""
    anneal: Literal["cosine", "linear"] | None = None
    """How one_cycle (default cosine) and warmup_stable_decay (default linear) move."""
    patience: int | None = None
    """Evaluations without improvement that plateau tolerates, >= 0; default 10."""
    threshold: float | None = None
    """Relative improvement that plateau counts, >= 0; default 1e-4."""
    metric: str | None = None
    """Evaluation metric that plateau watches; default loss."""
    metric_mode: Literal["min", "max"] | None = None
    """Whether plateau's metric should fall or rise; default min."""

    def __post_init__(self) -> None:
        close = nearest(self.name, SCHEDULES) or "cosine"
        require(self.name in SCHEDULES, "schedule.name", "one of " + ", ".join(SCHEDULES), self.name, close)
        taken = TAKES[self.name] | (frozenset() if self.name in OWN_WARMUP else WARMUP)
        optional = {f"schedule.{f.name}": getattr(self, f.name) for f in fields(self) if f.default is None}
        require_unused(f"--schedule.name {self.name}", optional, {f"schedule.{name}" for name in taken})
        for steps, epochs in PAIRS:
            if getattr(self, steps) is not None and getattr(self, epochs) is not None:
                raise ConfigError(
                    f"{flag(f'schedule.{steps}')} and {flag(f'schedule.{epochs}')} say the same thing twice",
                    expected="one of the two",
                    fix=f"{flag(f'schedule.{epochs}')} None",
                )
        if self.name in ("cosine_restarts", "cyclic"):
            ok = self.cycle_steps is not None or self.cycle_epochs is not None
            require(ok, "schedule.cycle_epochs", f"the length of a cycle of {self.name}", "nothing", "10")
        if self.name == "multi_step":
            ok = self.milestones is not None or self.milestone_epochs is not None
            require(ok, "schedule.milestone_epochs", "the epochs at which the rate falls", "nothing", "80 120")
        if self.name == "exponential":
            require(self.gamma is not None, "schedule.gamma", "a step's factor", "nothing", "0.9999")
        if self.name == "cyclic" and (self.gamma is not None) != (self.cycle_mode == "exp_range"):
            example = "None" if self.gamma is not None else "0.9999"
            got = "nothing" if self.gamma is None else self.gamma
            require(False, "schedule.gamma", "a number with --schedule.cycle-mode exp_range, else None", got, example)
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in ("warmup_steps", "warmup_epochs", "patience", "threshold"):
            require_number(f"schedule.{name}", getattr(self, name), least=0, example="1")
        for name in ("cycle_steps", "cycle_growth"):
            require_number(f"schedule.{name}", getattr(self, name), least=1, example="2")
        for name in ("power", "cycle_epochs"):
            require_number(f"schedule.{name}", getattr(self, name), above=0, example="1")
        require_number("schedule.min_lr_ratio", self.min_lr_ratio, least=0, most=1, example="0.1")
        require_number("schedule.gamma", self.gamma, above=0, most=1, example="0.1")
        require_number("schedule.warmup_ratio", self.warmup_ratio, above=0, below=1, example="0.3")
        require_number("schedule.initial_lr_ratio", self.initial_lr_ratio, above=0, most=1, example="0.04")
        require_number("schedule.decay_ratio", self.decay_ratio, above=0, most=1, example="0.2")
        for name in ("milestones", "milestone_epochs"):
            marks = getattr(self, name) or ()
            ok = all(mark > 0 for mark in marks) and list(marks) == sorted(set(marks))
            require(ok, f"schedule.{name}", "ascending numbers > 0", marks, "80 120")
        if self.name == "cyclic" and self.cycle_steps is not None:
            require(self.cycle_steps % 2 == 0, "schedule.cycle_steps", "an even number", self.cycle_steps, "2000")
