"""Ending a run before its last step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distkit.config.check import require, require_number
from distkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When an evaluation ends the run early; off unless one of patience, below and above is set."""

    metric: str = "loss"
    """Evaluation metric to watch."""
    metric_mode: Literal["min", "max"] = "min"
    """Whether the metric should fall or rise."""
    patience: int | None = None
    """End after so many evaluations in a row without improvement, >= 1; None: never."""
    min_delta: float = 0.0
    """Improvement that counts, in the unit of the metric, >= 0."""
    below: float | None = None
    """End when the metric is below this; None: never."""
    above: float | None = None
    """End when the metric is above this; None: never."""

    def __post_init__(self) -> None:
        require(self.metric_mode in ("min", "max"), "stop.metric_mode", "min or max", self.metric_mode, "max")
        require_number("stop.patience", self.patience, least=1, example="5")
        require_number("stop.min_delta", self.min_delta, least=0, example="0.001")
        for name in ("below", "above"):
            require_number(f"stop.{name}", getattr(self, name), example="0.5")
        if not self.enabled and (self.metric, self.metric_mode) != ("loss", "min"):
            raise ConfigError("--stop.metric without a reason to stop", expected="one of them too", got=self.metric,
                              fix="--stop.patience 5")  # fmt: skip
        if self.patience is None and (self.min_delta or (self.enabled and self.metric_mode != "min")):
            option = "--stop.min-delta" if self.min_delta else "--stop.metric-mode"
            raise ConfigError(f"{option} is about --stop.patience, which is not set", expected="both",
                              fix="--stop.patience 5")  # fmt: skip

    @property
    def enabled(self) -> bool:
        """Whether there is a reason to stop."""
        return not (self.patience is None and self.below is None and self.above is None)
