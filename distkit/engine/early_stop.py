"""Early stopping: which evaluation ends a run before its last step."""

from __future__ import annotations

from collections.abc import Mapping

from distkit.config.stop import StopConfig


class EarlyStop:
    """Follows one metric of the evaluations.

    Attributes:
        reason: why the run ends now; None: it goes on. A run that continues under another `config` asks anew.
        rule_before: the metric that the restored state was about, where it was another one.
    """

    def __init__(self, config: StopConfig) -> None:
        self.config = config
        self.reason: str | None = None
        self.rule_before: str | None = None
        self._last: float | None = None
        self._best: float | None = None
        self._num_bad = 0

    def update(self, value: float) -> None:
        """Take the metric of one evaluation into account; NaN is never better."""
        sign = 1 if self.config.metric_mode == "min" else -1
        if self._best is None or sign * value < sign * self._best - self.config.min_delta:
            # a first one that is NaN is no best: nothing would beat it
            self._best, self._num_bad = (None, self._num_bad + 1) if value != value else (value, 0)
        else:
            self._num_bad += 1
        self._last = value
        self._judge()

    def _judge(self) -> None:
        config, last, self.reason = self.config, self._last, None
        if last is None:
            return
        if config.below is not None and last < config.below:
            self.reason = f"{config.metric} is {last:.6g}, below {config.below:g}"
        elif config.above is not None and last > config.above:
            self.reason = f"{config.metric} is {last:.6g}, above {config.above:g}"
        elif config.patience is not None and self._num_bad >= config.patience:
            best = "" if self._best is None else f" on {self._best:.6g}"
            self.reason = f"{config.metric} has not improved{best} for {self._num_bad} evaluations"

    @property
    def rule(self) -> str:
        """The metric, and whether it should fall or rise."""
        return f"{self.config.metric} ({self.config.metric_mode})"

    def state_dict(self) -> dict[str, float | str]:
        """The evaluations without improvement, the metric, and its last and best value where there are any."""
        values = {"last": self._last, "best": self._best}
        known = {name: value if value - value == 0 else str(value) for name, value in values.items()
                 if value is not None}  # fmt: skip  # JSON has no NaN
        return {"num_bad": self._num_bad, "rule": self.rule, **known}

    def load_state_dict(self, state: Mapping[str, float | str]) -> None:
        """Take them back; those of another metric count no more."""
        self.rule_before = None if state["rule"] == self.rule else str(state["rule"])
        known = state if self.rule_before is None else {}
        self._num_bad = int(known.get("num_bad", 0))
        self._last, self._best = (float(known[name]) if name in known else None for name in ("last", "best"))
        self._judge()
