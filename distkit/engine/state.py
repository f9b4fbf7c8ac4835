"""What a run saves (C3): one dictionary of named parts.

Tensors: model/NAME, extra/MODULE, optimizer/PARAMETER/KEY, ema/NAME, scaler/NAME, and for each rank rng/RANK/NAME,
meter/RANK/NAME and buffer/RANK/NAME (those that are each rank's own). Values: progress, trackers, clock, skips (the
ledger), plateau, early_stop, observers, extra states that are not tensors, and the structure of the optimizer's state.
Data and learning rate have no state: both are functions of the step. Only an iterable data set has a position, one a
rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol, cast

from torch import Tensor

from distkit.checkpoint.saver import Snapshot
from distkit.config import to_json
from distkit.engine.run import Run
from distkit.optim import named_parameters
from distkit.runtime.seeding import capture_rng
from distkit.tensors.buffers import buffer_slots, extra_states, rank_buffers, split_extra


class Part(Protocol):
    """A stateful part without tensors."""

    def state_dict(self) -> dict[str, object]:
        """Its state, ready for JSON."""

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore it."""


def parts(run: Run) -> dict[str, Part]:
    """The stateful parts without tensors, by name."""
    named: dict[str, object] = {"progress": run.progress, "trackers": run.trackers, "clock": run.clock}
    named["skips"] = run.ledger
    if run.plateau is not None:
        named["plateau"] = run.plateau
    if run.early_stop is not None:
        named["early_stop"] = run.early_stop
    return cast(dict[str, Part], named)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under `prefix`/NAME."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def live_tensors(run: Run) -> dict[str, Tensor]:
    """The tensors that exist from the start and are restored in place: model, ema, scaler."""
    tensors = prefixed("model", run.model_tensors())
    if run.ema is not None:
        tensors |= prefixed("ema", run.ema.state_dict())
    return tensors | prefixed("scaler", run.strategy.scaler_tensors())


def saved_tensors(run: Run) -> dict[str, Tensor]:
    """Every tensor that is not a rank's own: the live ones, extra states, the optimizer's state."""
    extra, _ = split_extra(extra_states(run.strategy.module))
    return live_tensors(run) | extra | prefixed("optimizer", run.strategy.optimizer_state.tensors())


def judged_tensors(run: Run, tensors: Collection[str]) -> dict[str, bool]:
    """Of the names of `saved_tensors`, those that must not be NaN -> whether they may be infinite.

    Trained weights, their averages and optimizer state may not. Buffers may (a mask of -inf), and are not judged where
    they are caches of their layers or held NaN when the model was built; frozen parameters and extra states are not.
    """
    module = run.strategy.module
    trained = [name for name, parameter in named_parameters(module).items() if parameter.requires_grad]
    saved = [slot.name for slot in buffer_slots(module) if slot.persistent and not slot.rank_own]
    buffers = [name for name in saved if name not in run.nan_buffers]
    names = dict.fromkeys(trained, False) | dict.fromkeys(buffers, True)
    judged = {f"{part}/{name}": infinity for part in ("model", "ema") for name, infinity in names.items()}
    judged |= dict.fromkeys((name for name in tensors if name.startswith("optimizer/")), False)
    return {name: infinity for name, infinity in judged.items() if name in tensors}


def snapshot(run: Run) -> Snapshot:
    """The state at this step boundary; its tensors are the live ones, to be copied before the next step.

    BatchNorm's statistics, which differ between data parallel ranks, become rank 0's first.
    """
    strategy, rank = run.strategy, run.runtime.rank
    run.synchronize_buffers_()
    shared = saved_tensors(run)
    # their shapes may differ between ranks, which can then not share the work
    caches = {f"model/{slot.name}" for slot in buffer_slots(strategy.module) if not slot.persistent} & shared.keys()
    whole = {name: shared.pop(name) for name in caches}
    _, extra_values = split_extra(extra_states(strategy.module))
    observers: dict[str, str] = {}
    for observer in run.observers:
        observers |= observer.state_dict()
    values = {name: part.state_dict() for name, part in parts(run).items()}
    return Snapshot(
        shared=shared,
        judged=judged_tensors(run, shared),
        own=prefixed(f"rng/{rank:05d}", capture_rng(run.runtime.device))
        | prefixed(f"meter/{rank:05d}", run.meter.state_tensors())
        | prefixed(f"buffer/{rank:05d}", rank_buffers(strategy.module))
        | (whole if rank == 0 else {}),
        values={
            "version": 1,
            "recipe": run.recipe,
            "step": run.progress.step,
            "num_samples": run.num_samples,
            "data": run.data.fingerprint,
            "aliases": run.aliases,
            "config": to_json(run.config),
            "parts": values
            | {"observers": observers, "optimizer": strategy.optimizer_state.structure()}
            | {"extra": extra_values},
        }
        | ({} if run.frozen is None else {"frozen": run.frozen.digest}),
        own_values={} if run.data_state is None else {"data": run.data_state.state_dict()},
    )
