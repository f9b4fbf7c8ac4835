"""Everything a run needs to go on exactly where it was (C3): one dictionary of named parts, taken and given back.

Tensors: model/NAME, extra/MODULE, optimizer/PARAMETER/KEY, ema/NAME, scaler/NAME, and of each rank rng/RANK/NAME and
meter/RANK/NAME. Values: progress, trackers, clock, plateau, observers, extra states that are no tensors, and the form
of the optimizer's state. Data and learning rate have none: both are functions of the step. An iterable data set alone
has a place, each rank its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor

from distkit.checkpoint.read import load_tensors
from distkit.checkpoint.restore import VerifiedCheckpoint, differences
from distkit.checkpoint.saver import Snapshot
from distkit.config import to_json
from distkit.engine.meter import Meter
from distkit.engine.run import Run
from distkit.errors import CheckpointError, ConfigError, shorten
from distkit.runtime.seeding import capture_rng, restore_rng
from distkit.tensors.buffers import buffer_slots, extra_states, set_extra_states, split_extra
from distkit.tensors.spec import spec_of

#: Fields that decide which samples a step reads: with another value it would be another run.
FIXED = ("seed", "global_batch_size")


class Part(Protocol):
    """A stateful part without tensors."""

    def state_dict(self) -> dict[str, object]:
        """Its state, ready for JSON."""

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take it back."""


def parts(run: Run) -> dict[str, Part]:
    """The stateful parts without tensors, by name."""
    found = {"progress": run.progress, "trackers": run.trackers, "clock": run.clock}
    if run.plateau is not None:
        found["plateau"] = run.plateau
    return cast(dict[str, Part], found)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def live_tensors(run: Run) -> dict[str, Tensor]:
    """The tensors that exist from the start and are restored in place: model, ema, scaler."""
    tensors = _prefixed("model", run.model_tensors())
    if run.ema is not None:
        tensors |= _prefixed("ema", run.ema.state_dict())
    return tensors | _prefixed("scaler", run.strategy.scaler_tensors())


def snapshot(run: Run) -> Snapshot:
    """The state at this step boundary; its tensors are the live ones, to be copied before the next step.

    Buffers that differ between data parallel ranks become rank 0's first.
    """
    strategy, rank = run.strategy, run.runtime.rank
    strategy.synchronize_buffers_(run.ema.averaged_buffers if run.ema is not None else ())
    optimizer_state = strategy.optimizer_state
    extra, extra_values = split_extra(extra_states(strategy.module))
    observers: dict[str, str] = {}
    for observer in run.observers:
        observers |= observer.state_dict()
    values = {name: part.state_dict() for name, part in parts(run).items()}
    return Snapshot(
        shared=live_tensors(run) | extra | _prefixed("optimizer", optimizer_state.tensors()),
        own=_prefixed(f"rng/{rank:05d}", capture_rng(run.runtime.device))
        | _prefixed(f"meter/{rank:05d}", run.meter.state_tensors()),
        values={
            "version": 1,
            "recipe": run.recipe,
            "step": run.progress.step,
            "num_samples": run.num_samples,
            "data": run.fingerprint,
            "aliases": run.aliases,
            "config": to_json(run.config),
            "parts": values
            | {"observers": observers, "optimizer": optimizer_state.structure()}
            | {"extra": extra_values},
        },
        own_values={} if run.data_state is None else {"data": run.data_state.state_dict()},
    )


def check_fits(run: Run, found: VerifiedCheckpoint) -> None:
    """Refuse a checkpoint that is not of this run, before anything of the run is changed.

    Raises:
        ConfigError: listing what is missing, unexpected and mismatched, and what to type.
    """
    where = f"checkpoint {found.directory}"
    if run.takes_weights_only:
        if not _matching_weights(run, found):
            raise ConfigError(f"{where} has no weight with the name, shape and dtype of one here",
                              expected=shorten(run.model_tensors()), fix="--resume auto")  # fmt: skip
        return
    step = found.manifest.step
    if found.state.get("step") != step or found.parts()["progress"] != {"step": step}:
        raise CheckpointError(f"{found.directory}: state.json is not that of step {step}")
    if step > run.num_steps:
        raise ConfigError(f"{where} is further than this run goes", expected=f"at least {step} steps",
                          got=f"{run.num_steps} steps", fix=f"--num-steps {step}, or another --run-dir")  # fmt: skip
    if found.state.get("recipe") != run.recipe:
        raise ConfigError(f"{where} belongs to another recipe", expected=run.recipe, got=found.state.get("recipe"),
                          fix="another --run-dir, or --resume.weights-only")  # fmt: skip
    saved = cast(dict[str, object], found.state.get("config", {}))
    for name in FIXED:
        before, value = saved.get(name), getattr(run.config, name)
        if before != value:
            raise ConfigError(f"{where} was trained on another sample stream", expected=f"{name} {before}",
                              got=f"{name} {value}",
                              fix=f"--{name.replace('_', '-')} {before}, or another --run-dir")  # fmt: skip
    for name, here in (("num_samples", run.num_samples), ("data", run.fingerprint)):
        before = found.state.get(name)
        if here != before and not (name == "data" and None in (here, before)):
            raise ConfigError(f"{where} was trained on other data", expected=f"{name} {before}", got=f"{name} {here}",
                              fix="the data it was trained on, or another --run-dir")  # fmt: skip
    place = _data_place(run, found)
    if (place is None) != (run.data_state is None):
        kinds = ("data with numbers", "an iterable data set")
        raise ConfigError(f"{where} was trained on another kind of data", expected=kinds[place is not None],
                          got=kinds[run.data_state is not None], fix="another --run-dir")  # fmt: skip
    if place is not None and run.data_state is not None:
        run.data_state.check_state_dict(place)
    made_anew = _made_anew(run, found)
    lines = differences(found.manifest, live_tensors(run), ("model/", "ema/", "scaler/"), made_anew)
    lines += _extra_differences(run, found)
    structure = cast(dict[str, object], found.parts().get("optimizer", {}))
    lines += run.strategy.optimizer_state.compare(structure)
    if lines:
        raise ConfigError("\n  ".join([f"{where} does not fit this run", *lines]),
                          fix="the configuration it was saved with, or --resume DIR --resume.weights-only")  # fmt: skip


@contextmanager
def read_strictly(found: VerifiedCheckpoint) -> Iterator[None]:
    """What the saved state does not have, or has in another form, is damage: one line that names the checkpoint."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{found.directory}: malformed state: {type(error).__name__} {error}") from error


def restore(run: Run, found: VerifiedCheckpoint) -> None:
    """Bring back everything but the random generators."""
    if run.takes_weights_only:
        weights = _prefixed("model", run.model_tensors())
        load_tensors(found.directory, found.manifest, _matching(weights, found))
        run.strategy.refresh_copies_()
        set_extra_states(run.strategy.module, _saved_extra(found))
        if run.ema is not None:
            run.ema.restart_()
        return
    with read_strictly(found):
        _restore_all(run, found)


def _restore_all(run: Run, found: VerifiedCheckpoint) -> None:
    strategy = run.strategy
    structure = cast(dict[str, object], found.parts()["optimizer"])
    forms = {
        name.removeprefix("optimizer/"): (cast(torch.dtype, getattr(torch, entry.dtype)), entry.shape)
        for name, entry in found.manifest.tensors.items()
        if name.startswith("optimizer/")
    }
    made_anew = _made_anew(run, found)
    live = {name: tensor for name, tensor in live_tensors(run).items() if name not in made_anew}
    optimizer_state = strategy.optimizer_state
    optimizer_tensors = optimizer_state.allocate(structure, forms)
    load_tensors(found.directory, found.manifest, live | _prefixed("optimizer", optimizer_tensors))
    optimizer_state.install(structure, optimizer_tensors)
    strategy.refresh_copies_()
    set_extra_states(strategy.module, _saved_extra(found))
    run.meter.load_state_tensors(_meter_tensors(run, found))
    for name, part in parts(run).items():
        if name in found.parts() or name != "plateau":  # a schedule may have been changed for one with history
            part.load_state_dict(cast(dict[str, object], found.parts()[name]))
    for observer in run.observers:
        observer.load_state_dict(cast(dict[str, str], found.parts()["observers"]))
    place = _data_place(run, found)
    if run.data_state is not None and place is not None:
        run.data_state.load_state_dict(place)


def _made_anew(run: Run, found: VerifiedCheckpoint) -> set[str]:
    """Buffers with persistent=False that were saved with another dtype or shape: their layers recompute them."""
    live, saved = live_tensors(run), found.manifest.tensors
    caches = [slot.name for slot in buffer_slots(run.strategy.module) if not slot.persistent]
    names = [f"{part}/{name}" for name in caches for part in ("model", "ema")]
    return {
        name
        for name in names
        if (spec_of(live[name]) if name in live else None) != (saved[name].spec if name in saved else None)
    }


def _saved_extra(found: VerifiedCheckpoint) -> dict[str, object]:
    """The extra states of modules: those that are tensors, and the others."""
    values = cast(dict[str, object], found.parts().get("extra", {}))
    return {**values, **_own_tensors(found, "extra/")}


def _extra_differences(run: Run, found: VerifiedCheckpoint) -> list[str]:
    names = {name.removeprefix("extra/") for name in found.manifest.tensors if name.startswith("extra/")}
    names |= cast(dict[str, object], found.parts().get("extra", {})).keys()
    odd = sorted(names ^ extra_states(run.strategy.module).keys())
    return [f"extra states (get_extra_state) of other modules: {shorten(odd)}"] if odd else []


def _data_place(run: Run, found: VerifiedCheckpoint) -> Mapping[str, object] | None:
    """This rank's place in an iterable data set; a rank that was not there gets the first one's, and is refused."""
    ranks = cast(list[dict[str, Mapping[str, object]]], found.state["ranks"])
    return ranks[run.runtime.rank if run.runtime.rank < len(ranks) else 0].get("data")


def restore_generators(run: Run) -> None:
    """Bring back this rank's random generators: last, because opening data and observers may draw numbers.

    A rank or a kind of device that was not there keeps the seed of its number; `resume_notes` says so.
    """
    found, device = run.restored_from, run.runtime.device
    if found is None or run.takes_weights_only:
        return
    saved = _own_tensors(found, f"rng/{run.runtime.rank:05d}/")
    if not saved or saved.keys() != capture_rng(device).keys():
        return
    try:
        restore_rng(saved, device)
    except ValueError as error:
        raise CheckpointError(f"{found.directory}: the random generators do not fit here: {error}") from error


def resume_notes(run: Run) -> list[str]:
    """What a person should know about this resume: what changed, and what that costs."""
    found = run.restored_from
    if found is None:
        return []
    if run.takes_weights_only:
        kept = sorted(run.model_tensors().keys() - {n.removeprefix("model/") for n in _matching_weights(run, found)})
        left = f"; not in it, or of another shape: {shorten(kept)}" if kept else ""
        return [f"started from the weights of {found.directory}{left}"]
    notes = [f"resumed from {found.directory}"]
    if made_anew := sorted(_made_anew(run, found)):
        notes.append(f"left to the layers, which make them anew (persistent=False): {shorten(made_anew)}")
    before, after = found.manifest.world_size, run.runtime.world_size
    if before != after:
        notes.append(
            f"saved on {before} ranks, resumed on {after}: the samples are the same; the order of sums is not, so that "
            "losses agree to rounding, and what a rank does by itself (dropout, BatchNorm's statistics) is another"
        )
    kinds = {name.removeprefix("rng/00000/") for name in found.manifest.tensors if name.startswith("rng/00000/")}
    if kinds != capture_rng(run.runtime.device).keys():
        notes.append("saved on another kind of device: arithmetic and random draws (dropout) are not those of before")
    changed = changes(cast(dict[str, object], found.state["config"]), to_json(run.config))
    if changed:
        notes.append(f"changed since: {shorten(changed)}")
    return notes


def changes(before: Mapping[str, object], after: Mapping[str, object], prefix: str = "") -> list[str]:
    """`optim.lr 0.1 -> 0.2` for each field that differs; where a run lies and begins does not count."""
    lines: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if prefix + name in ("run_dir", "resume") or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += changes(old, new, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} {old} -> {new}")
    return lines


def _matching_weights(run: Run, found: VerifiedCheckpoint) -> dict[str, Tensor]:
    """The model's tensors that the checkpoint has with the same name, shape and dtype."""
    return _matching(_prefixed("model", run.model_tensors()), found)


def _matching(live: Mapping[str, Tensor], found: VerifiedCheckpoint) -> dict[str, Tensor]:
    saved = found.manifest.tensors
    return {name: tensor for name, tensor in live.items() if name in saved and saved[name].spec == spec_of(tensor)}


def _meter_tensors(run: Run, found: VerifiedCheckpoint) -> dict[str, Tensor]:
    """This rank's open sums; over another number of ranks, the first one takes them all."""
    rank, before = run.runtime.rank, found.manifest.world_size
    if before == run.runtime.world_size:
        return _own_tensors(found, f"meter/{rank:05d}/")
    merged = Meter.merge([_own_tensors(found, f"meter/{other:05d}/") for other in range(before)])
    # the others keep the names, which must be the same on every rank
    return merged if rank == 0 else {name: torch.zeros_like(tensor) for name, tensor in merged.items()}


def _own_tensors(found: VerifiedCheckpoint, prefix: str) -> dict[str, Tensor]:
    entries = {name: entry for name, entry in found.manifest.tensors.items() if name.startswith(prefix)}
    tensors = {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in entries.items()}
    load_tensors(found.directory, found.manifest, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
