"""Everything one training run consists of; complete when it is made, and made by `distkit.assemble`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from distkit.checkpoint.digest import state_digest
from distkit.checkpoint.saver import Saver
from distkit.checkpoint.verify import VerifiedCheckpoint
from distkit.config import BatchSplit, TrainConfig
from distkit.config.every import in_steps
from distkit.data import Dataset
from distkit.data.batch import Microbatches
from distkit.data.reading.iterable import IterableData
from distkit.data.reading.loader import EvaluationLoader
from distkit.ema import Ema
from distkit.engine.clock import Clock
from distkit.engine.early_stop import EarlyStop
from distkit.engine.flops import Utilization
from distkit.engine.forward_timer import ForwardTimer
from distkit.engine.frozen import Frozen
from distkit.engine.guard import Guard
from distkit.engine.ledger import Ledger
from distkit.engine.meter import ComputeMetrics, Meter
from distkit.engine.run_dir import RunDirectory
from distkit.engine.stragglers import Stragglers
from distkit.engine.watch import Watch
from distkit.errors import TrainingError, shorten
from distkit.losses import ComputeLoss
from distkit.observers import Event, Observer
from distkit.runtime.process import Runtime
from distkit.schedules import PlateauTracker, Schedule
from distkit.strategies import Strategy
from distkit.tensors.buffers import rank_buffers
from distkit.tensors.spec import TensorSpec


class DataState(Protocol):
    """This rank's position in an iterable data set, whose samples have no numbers."""

    def state_dict(self) -> dict[str, object]:
        """The position, ready for JSON."""

    def check_state_dict(self, state: Mapping[str, object]) -> None:
        """Raise ConfigError when it does not fit; change nothing."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from there."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data sets of a run, the same on every rank.

    Attributes:
        train_set, test_set: as the recipe built them; test_set is None where there is none.
        fingerprint: tells the training set from another one; None where it cannot be computed.
        notes: what a person should know of them, said at the start.
    """

    train_set: Dataset | IterableData
    test_set: Dataset | None
    fingerprint: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a run starts from.

    Attributes:
        checkpoint: what it is restored from; None for a new run.
        from_another_run: the checkpoint is not in this run's own directory.
        weights: a file of weights that the model is filled with; instead of a checkpoint.
        completed_steps: of the run that was completed in this directory; -1 when none was.
        warnings: what was reported before there were observers.
    """

    checkpoint: VerifiedCheckpoint | None = None
    from_another_run: bool = False
    weights: Path | None = None
    completed_steps: int = -1
    warnings: list[str] = field(default_factory=list)

    @property
    def own_step(self) -> int | None:
        """The step of the checkpoint, where it is one of this run's own."""
        return None if self.checkpoint is None or self.from_another_run else self.checkpoint.manifest.step


@dataclass(frozen=True)
class Best:
    """Which evaluation metric decides what is best, and whether it should fall or rise."""

    metric: str = "loss"
    mode: Literal["min", "max"] = "min"

    def __str__(self) -> str:
        return f"{self.metric} ({self.mode})"

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
        """Restore the step."""
        self.step = state["step"]


@dataclass
class Trackers:
    """The last and the best evaluation of a run; `rule` says which one is best.

    Attributes:
        rule_before: by which the restored best one was chosen, where it was another rule: there is none then.
    """

    rule: Best = field(default_factory=Best)
    last: dict[str, float] | None = None
    best: dict[str, float] | None = None
    rule_before: str | None = None

    def update(self, values: dict[str, float]) -> bool:
        """Remember an evaluation (with its "step"); True when it is the best so far.

        Raises:
            TrainingError: the evaluation has no such metric.
        """
        self.last = values
        metric = self.rule.metric
        if metric not in values:
            known = ", ".join(name for name in values if name != "step")
            raise TrainingError(
                f"the best evaluation is chosen by {metric}, which compute_loss does not report: {known}"
            )
        if self.rule.better(values[metric], self.best[metric] if self.best else math.nan):
            self.best = values
            return True
        return False

    def state_dict(self) -> dict[str, object]:
        """Both evaluations; values that are not finite as text, because JSON has no number for them."""
        return {"last": _for_json(self.last), "best": _for_json(self.best), "rule": str(self.rule)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore both; the best one only where it was chosen by the same rule."""
        self.last, self.best = (_from_json(state[name]) for name in ("last", "best"))
        rule = str(state.get("rule", self.rule if self.best is None or self.rule.metric in self.best else "another"))
        self.rule_before = None if rule == str(self.rule) else rule
        if self.rule_before is not None:
            self.best = None


def _from_json(values: object) -> dict[str, float] | None:
    return None if values is None else {n: float(v) for n, v in cast(dict[str, float | str], values).items()}


def _for_json(values: dict[str, float] | None) -> dict[str, float | str] | None:
    if values is None:
        return None
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, assembled: what it is, its parts, those that hold state, and those who watch.

    Attributes:
        recipe: its name.
        schedule, plateau: step -> multiplier of the learning rate, and the factor that follows a metric.
        early_stop: ends the run before `num_steps`; None where nothing does.
        data_state: the position in an iterable data set; None for other data, whose position is the step.
        buffer_specs: dtype and shape of the persistent buffers, as the model was built.
        nan_buffers: names of buffers that the model was built with NaN in.
        unlike_buffers: names of shared buffers that were found to differ between ranks.
        aliases: further names that the model's state dict has for tied tensors -> their name in checkpoints.
        utilization: None where the device's peak is not known.
        facts: the resolved choices, printed at the start and repeated in summary.json.
        saver: None where no checkpoint is saved.
        ledger: the steps that were left out because of NaN or infinity.
        guard: None with --on-nan raise.
        frozen: the loss's helper that is not trained.
    """

    recipe: str
    config: TrainConfig
    runtime: Runtime
    split: BatchSplit
    num_steps: int
    data: Data
    strategy: Strategy
    loader: Microbatches
    test_loader: EvaluationLoader | None
    compute_loss: ComputeLoss
    schedule: Schedule
    directory: RunDirectory
    meter: Meter
    compute_metrics: ComputeMetrics | None = None
    frozen: Frozen | None = None
    plateau: PlateauTracker | None = None
    early_stop: EarlyStop | None = None
    ema: Ema | None = None
    data_state: DataState | None = None
    buffer_specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    nan_buffers: frozenset[str] = frozenset()
    unlike_buffers: set[str] = field(default_factory=set)
    aliases: Mapping[str, str] = field(default_factory=dict)
    utilization: Utilization | None = None
    resume: ResumePoint = field(default_factory=ResumePoint)
    saver: Saver | None = None
    observers: Sequence[Observer] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    trackers: Trackers = field(default_factory=Trackers)
    ledger: Ledger = field(default_factory=Ledger)
    guard: Guard | None = None
    clock: Clock = field(default_factory=Clock)
    watch: Watch = field(default_factory=Watch)
    forward_timer: ForwardTimer = field(default_factory=ForwardTimer)
    stragglers: Stragglers = field(default_factory=lambda: Stragglers([""]))

    @property
    def num_samples(self) -> int:
        """Samples of the training set, or of one epoch of an iterable one."""
        return len(self.data.train_set)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which the training set is read once."""
        return self.num_samples / self.split.global_batch_size

    @property
    def takes_weights_only(self) -> bool:
        """True when the run begins at step 0 with weights from elsewhere."""
        return self.config.resume.weights_only and self.resume.from_another_run

    @property
    def finished(self) -> bool:
        """True when this directory holds the run with all its steps already."""
        return self.resume.completed_steps >= self.num_steps

    @cached_property
    def eval_every(self) -> float | None:
        """Steps between evaluations, which need not be a whole number; None: only after the last."""
        return in_steps(self.config.eval_every, self.steps_per_epoch)

    @cached_property
    def save_every(self) -> float | None:
        """The same between saves."""
        return in_steps(self.config.checkpoint.save_every, self.steps_per_epoch)

    def is_done(self) -> bool:
        """Nothing is left to train."""
        stop = self.early_stop
        return self.progress.step >= self.num_steps or (stop is not None and stop.reason is not None)

    def lr_multiplier(self) -> float:
        """What the peak learning rates are multiplied by at the current step."""
        multiplier = self.schedule(self.progress.step)
        return multiplier if self.plateau is None else multiplier * self.plateau.factor

    def tell(self, event: Event) -> None:
        """Pass an event to every observer."""
        for observer in self.observers:
            observer.record(event)

    def note(self, message: str) -> None:
        """Send the observers a message for people to read."""
        self.tell({"event": "note", "step": self.progress.step, "message": message})

    def model_tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the model by its canonical name; tied ones once."""
        return self.strategy.model_tensors()

    def learned_tensors(self) -> Mapping[str, Tensor]:
        """Model and optimizer tensors, as `model/NAME` and `optimizer/NAME/KEY`, and digests `buffer/RANK/NAME`.

        They are what `state_digest` covers; all ranks together.
        """
        own = rank_buffers(self.strategy.module)
        digests = self.runtime.gather({name: state_digest({name: tensor}) for name, tensor in own.items()})
        buffers = {f"buffer/{rank:05d}/{name}": torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
                   for rank, names in enumerate(digests) for name, digest in names.items()}  # fmt: skip
        return {**self.strategy.learned_tensors(), **buffers}

    def synchronize_buffers_(self) -> None:
        """Give every rank the buffers that a checkpoint would hold, and their averages; notes those that differed."""
        unlike = self.strategy.synchronize_buffers_(self.ema.averaged_buffers if self.ema is not None else ())
        if new := [name for name in unlike if name not in self.unlike_buffers]:
            self.unlike_buffers.update(new)
            self.note(f"buffers {shorten(new)} differed between ranks: all have rank 0's now, as the checkpoints do; "
                      "distkit.register_rank_buffer declares a buffer each rank's own")  # fmt: skip
