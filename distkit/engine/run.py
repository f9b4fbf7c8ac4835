"""Everything one training run consists of, and its named state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

from distkit.checkpoint.restore import VerifiedCheckpoint
from distkit.checkpoint.saver import Saver
from distkit.config import BatchSplit, TrainConfig
from distkit.data import Batch
from distkit.data.reading.loader import EvaluationLoader
from distkit.ema import Ema
from distkit.engine.clock import Clock
from distkit.engine.flops import Utilization
from distkit.engine.meter import Meter
from distkit.engine.run_dir import RunDirectory
from distkit.errors import TrainingError
from distkit.losses import LossOutput
from distkit.observers import Event, Observer
from distkit.runtime.process import Runtime
from distkit.schedules import Plateau, Schedule
from distkit.strategies import Strategy
from distkit.tensors.spec import TensorSpec

ComputeLoss = Callable[[nn.Module, Batch], LossOutput]


class Loader(Protocol):
    """Where microbatches come from."""

    def microbatch(self, step: int, accum_index: int) -> Batch:
        """This rank's microbatch `accum_index` of global batch `step`, on the device."""

    def close(self) -> None:
        """Leave no thread and no process behind."""


class DataState(Protocol):
    """The place in data that has no numbers, a rank's own."""

    def state_dict(self) -> dict[str, object]:
        """The place, ready for JSON."""

    def check_state_dict(self, state: Mapping[str, object]) -> None:
        """Raise ConfigError when it does not fit; change nothing."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on there."""


@dataclass(frozen=True)
class Best:
    """Which evaluation metric decides what is best, and whether it should fall or rise."""

    metric: str = "loss"
    mode: Literal["min", "max"] = "min"

    def better(self, new: float, old: float) -> bool:
        """True when `new` beats `old`; what is not finite never does, and is beaten by anything that is."""
        if not (math.isfinite(new) and math.isfinite(old)):
            return math.isfinite(new)
        return new < old if self.mode == "min" else new > old


@dataclass
class Progress:
    """How far the run is. Data and learning rate need no more state: both are functions of the step."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the step back."""
        self.step = state["step"]


@dataclass
class Trackers:
    """What a run remembers of its evaluations."""

    last: dict[str, float] | None = None
    best: dict[str, float] | None = None

    def see(self, values: dict[str, float], best: Best) -> bool:
        """Remember an evaluation (with its "step"); True when it is the best so far.

        Raises:
            TrainingError: the evaluation has no such metric.
        """
        self.last = values
        if best.metric not in values:
            known = ", ".join(name for name in values if name != "step")
            raise TrainingError(
                f"the best evaluation is chosen by {best.metric}, which compute_loss does not report: {known}"
            )
        if best.better(values[best.metric], self.best[best.metric] if self.best else math.nan):
            self.best = values
            return True
        return False

    def state_dict(self) -> dict[str, dict[str, float | str] | None]:
        """The last and the best evaluation; what is not finite as a text, because JSON has no number for it."""
        return {"last": _for_json(self.last), "best": _for_json(self.best)}

    def load_state_dict(self, state: dict[str, dict[str, float | str] | None]) -> None:
        """Take both back."""
        self.last, self.best = (
            None if values is None else {name: float(value) for name, value in values.items()}
            for values in (state["last"], state["best"])
        )


def _for_json(values: dict[str, float] | None) -> dict[str, float | str] | None:
    if values is None:
        return None
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


@dataclass(kw_only=True)
class Run:
    """A run, assembled: configuration, parts that hold state, and those who watch."""

    recipe: str
    config: TrainConfig
    runtime: Runtime
    split: BatchSplit
    num_steps: int
    steps_per_epoch: float
    strategy: Strategy
    loader: Loader
    test_loader: EvaluationLoader | None
    compute_loss: ComputeLoss
    schedule: Schedule
    directory: RunDirectory
    plateau: Plateau | None = None
    ema: Ema | None = None
    best: Best = field(default_factory=Best)
    observers: list[Observer] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    trackers: Trackers = field(default_factory=Trackers)
    clock: Clock = field(default_factory=Clock)
    meter: Meter = field(init=False)
    saver: Saver | None = None
    restored_from: VerifiedCheckpoint | None = None
    restored_elsewhere: bool = False
    """restored_from does not lie in this run's own directory."""
    data_state: DataState | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names that the model's state dict has for tied tensors -> the one in checkpoints."""
    buffer_specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    """Of the persistent buffers as they were built."""
    fingerprint: str | None = None
    """Tells the training set from another one, where it can say so."""
    utilization: Utilization | None = None
    """None where the device's peak is not known."""
    warnings: list[str] = field(default_factory=list)
    """What was said before there was anybody to tell."""
    grad_norm: Tensor | None = None
    data_wait_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.meter = Meter(self.runtime, copies=self.strategy.reuses_outputs)
        if self.utilization is not None:
            self.loader = _FirstBatch(self, self.utilization)

    @property
    def num_samples(self) -> int:
        """Samples of the training set, or of one epoch of an iterable one."""
        return round(self.steps_per_epoch * self.split.global_batch_size)

    @property
    def takes_weights_only(self) -> bool:
        """True when the run begins at step 0 with weights from elsewhere."""
        return self.config.resume.weights_only and self.restored_elsewhere

    @property
    def finished(self) -> bool:
        """True when this directory holds the run with all its steps already."""
        return self.directory.completed_steps() >= self.num_steps

    def lr_multiplier(self) -> float:
        """What the peak learning rates are multiplied with at the current step."""
        multiplier = self.schedule(self.progress.step)
        return multiplier if self.plateau is None else multiplier * self.plateau.factor

    def tell(self, event: Event) -> None:
        """Hand an event to every observer."""
        for observer in self.observers:
            observer.record(event)

    def model_tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the model by its canonical name; tied ones once."""
        return self.strategy.model_tensors()

    def learned_tensors(self) -> Mapping[str, Tensor]:
        """Model and optimizer tensors, as `model/NAME` and `optimizer/NAME/KEY`: what `state_digest` covers."""
        return self.strategy.learned_tensors()


class _FirstBatch:
    """A loader that shows the first microbatch to what counts FLOPs, and then steps aside."""

    def __init__(self, run: Run, utilization: Utilization) -> None:
        self._run, self._utilization, self._loader = run, utilization, run.loader

    def microbatch(self, step: int, accum_index: int) -> Batch:
        """The loader's own."""
        if self._run.loader is self:
            self._run.loader = self._loader
        batch = self._loader.microbatch(step, accum_index)
        self._utilization.see(batch)
        return batch

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()
