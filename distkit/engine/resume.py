"""Where a run starts from (C3): choose a checkpoint, check that it fits, restore it, and report what changed.

A run starts from scratch, from its own newest checkpoint, or from another run's. Nothing in the run is changed before
the checkpoint is known to fit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from distkit.checkpoint.plan import check_model_storable
from distkit.checkpoint.read import load_tensors
from distkit.checkpoint.restore import (
    differences,
    newest_verified,
    open_verified,
    resolve_source,
    set_aside,
)
from distkit.checkpoint.verify import VerifiedCheckpoint
from distkit.checkpoint.weights_file import load_weights_file_
from distkit.config import FIXED, TrainConfig, fill_defaults, to_json
from distkit.data.sets.fingerprint import file_digest
from distkit.engine.meter import Meter
from distkit.engine.run import ResumePoint, Run
from distkit.engine.run_dir import RunDirectory
from distkit.engine.state import live_tensors, parts, prefixed
from distkit.errors import CheckpointError, ConfigError, say, shorten
from distkit.runtime.process import Runtime
from distkit.runtime.seeding import capture_rng, restore_rng
from distkit.tensors.buffers import buffer_slots, extra_states, rank_buffers, set_extra_states, set_rank_buffers_
from distkit.tensors.spec import spec_of

#: Parts that a checkpoint may lack: a schedule may have been changed for one with history; ledgers are younger.
ADDED = ("plateau", "early_stop", "skips")


def choose_checkpoint(config: TrainConfig, runtime: Runtime, directory: RunDirectory) -> ResumePoint:
    """Choose and verify the checkpoint to start from; a run in `directory` takes precedence over `--resume DIR`.

    So the same command continues after a kill, even for a run that started from another one.

    Raises:
        ConfigError: --resume does not name a checkpoint.
        CheckpointError: there are checkpoints, and none verifies.
    """
    source = config.resume.source
    # read once: another rank could see the file before or after a change
    completed = runtime.broadcast(directory.completed_steps())
    if source == "never" or config.debug.enabled:
        return ResumePoint(completed_steps=completed)
    warnings: list[str] = []

    def warn(message: str) -> None:
        warnings.append(message)
        if runtime.is_main_process:
            say(f"distkit: warning: {message}")

    checkpoint, from_another_run, weights = None, False, None
    try:
        checkpoint = newest_verified(directory.checkpoints, runtime, warn)
    except CheckpointError as error:
        if completed < 0:
            raise
        warn(str(error).splitlines()[0])  # a completed run needs none, and one of more steps is refused later
    with runtime.raise_on_all_ranks("looking for what a completed run has left"):
        proven = proven_steps(completed, checkpoint, directory)
    proven = runtime.broadcast(proven)
    if proven < completed:
        warn(f"status.json says that {completed:,} steps are done; what was saved is of step {proven:,}")
        completed = proven
    if checkpoint is not None:
        with runtime.raise_on_all_ranks("looking for the checkpoint"):
            check_own_goes_first(source, directory, checkpoint.manifest.step)
        if source != "auto":
            warn(f"--resume {source} is not used: {directory.path} has checkpoints of its own and continues from them")
    elif source != "auto":
        from_another_run = True
        with runtime.raise_on_all_ranks("looking for the checkpoint"):
            weights = weights_file(source, weights_only=config.resume.weights_only)
            path, single = (Path(), False) if weights is not None else resolve_source(source)
        if weights is None:
            checkpoint = open_verified(path, runtime) if single else newest_verified(path, runtime, warn)
    elif completed < 0 and directory.holds_run():
        warn(f"{directory.path} holds a run that has saved nothing: starting again at step 0")
    return ResumePoint(checkpoint=checkpoint, from_another_run=from_another_run, weights=weights,
                       completed_steps=completed, warnings=warnings)  # fmt: skip


def weights_file(source: str, *, weights_only: bool) -> Path | None:
    """`--resume FILE`; None for a directory, or where there is nothing.

    Raises:
        ConfigError: it is a file, and more than weights is wanted of it.
    """
    file = Path(source)
    if not os.path.isfile(file):
        return None
    if not weights_only:
        raise ConfigError(f"--resume {source} is a file, which holds weights at most",
                          expected="a checkpoint, a run directory, or the weights alone",
                          fix=f"--resume {source} --resume.weights-only")  # fmt: skip
    return file


def load_weights_(model: nn.Module, resume: ResumePoint, runtime: Runtime) -> None:
    """Fill `model` from the file of weights where the run starts from one; all ranks together.

    Raises:
        ConfigError: it does not fit, or differs between ranks.
    """
    if resume.weights is None:
        return
    with runtime.raise_on_all_ranks("reading the weights"):
        resume.warnings.extend(load_weights_file_(model, resume.weights))
        digest = file_digest(resume.weights)
    first, *others = runtime.gather(digest)
    with runtime.raise_on_all_ranks("comparing the weights of the ranks"):
        for rank, other in enumerate(others, 1):
            if other != first:
                raise ConfigError(f"--resume {resume.weights} is another file on rank {rank} than on rank 0",
                                  expected="one file", fix="the same file on every machine")  # fmt: skip


def proven_steps(completed: int, checkpoint: VerifiedCheckpoint | None, directory: RunDirectory) -> int:
    """Of the `completed` steps that status.json claims, those that weights, newest checkpoint or summary prove.

    Raises:
        ConfigError: there is none of them.
    """
    saved = -1 if checkpoint is None else checkpoint.manifest.step
    proven = max(directory.steps_of_weights(), directory.steps_of_summary(), saved)
    if proven < 0 <= completed:
        path = directory.path
        raise ConfigError(f"--run-dir {path} says that its run is completed, and holds nothing of it",
                          expected=f"weights.safetensors or a checkpoint of step {completed}",
                          fix=f"--run-dir {path}-2")  # fmt: skip
    return min(completed, proven)


def check_own_goes_first(source: str, directory: RunDirectory, newest: int) -> None:
    """Refuse to start a run from an older checkpoint of its own: the newer ones would be in the way.

    Raises:
        ConfigError: saying how to branch off.
    """
    folder = directory.path.resolve()
    if source != "auto" and Path(source).resolve().is_relative_to(folder):
        raise ConfigError(f"--resume {source} is inside --run-dir {directory.path}, which continues from step {newest}",
                          expected="another directory for the new branch",
                          fix=f"--run-dir {directory.path}-2 --resume {source}, or --resume auto")  # fmt: skip


def check_resume(run: Run) -> None:
    """Refuse, before anything is written or changed, a run that could not be restored or whose saves could not be.

    Raises:
        ConfigError: naming what does not fit, and what to type.
    """
    if run.saver is not None and not run.config.debug.enabled:
        own = prefixed("buffer", rank_buffers(run.strategy.module))
        check_model_storable(run.strategy.module, live_tensors(run) | own)
    checkpoint, done = run.resume.checkpoint, run.resume.completed_steps
    if run.finished:
        return
    if checkpoint is not None:
        with read_strictly(checkpoint):
            check_fits(run, checkpoint)
    elif done >= 0:
        # restarting at step 0 would lose its metrics and weights
        path = run.directory.path
        raise ConfigError(f"--run-dir {path} holds a run of {done} steps and no checkpoint to continue from",
                          expected="a checkpoint, or another directory", fix=f"--run-dir {path}-2")  # fmt: skip


def put_damaged_aside(run: Run) -> None:
    """Move newer checkpoints of this run that did not verify out of the way."""
    step, folder = run.resume.own_step, run.directory.checkpoints
    with run.runtime.raise_on_all_ranks("putting damaged checkpoints aside"):
        if run.runtime.is_main_process and step is not None:
            run.resume.warnings.extend(f"kept for you as {folder / name}" for name in set_aside(folder, step))


def check_fits(run: Run, checkpoint: VerifiedCheckpoint) -> None:
    """Refuse a checkpoint that does not belong to this run, before anything in the run is changed.

    Raises:
        ConfigError: listing what is missing, unexpected and mismatched, and what to type.
    """
    where = f"checkpoint {checkpoint.directory}"
    if run.takes_weights_only:
        if not _matching_weights(run, checkpoint):
            raise ConfigError(f"{where} has no weight with the name, shape and dtype of one here",
                              expected=shorten(run.model_tensors()), fix="--resume auto")  # fmt: skip
        return
    step = checkpoint.manifest.step
    if step > run.num_steps:
        raise ConfigError(f"{where} is beyond the end of this run", expected=f"at least {step} steps",
                          got=f"{run.num_steps} steps", fix=f"--num-steps {step}, or another --run-dir")  # fmt: skip
    if checkpoint.state.get("recipe") != run.recipe:
        raise ConfigError(f"{where} belongs to another recipe", expected=run.recipe, got=checkpoint.state.get("recipe"),
                          fix="another --run-dir, or --resume.weights-only")  # fmt: skip
    saved = cast(dict[str, object], checkpoint.state.get("config", {}))
    for name in FIXED:
        before, value = saved.get(name), getattr(run.config, name)
        if before != value:
            raise ConfigError(f"{where} was trained on a different sample stream", expected=f"{name} {before}",
                              got=f"{name} {value}",
                              fix=f"--{name.replace('_', '-')} {before}, or another --run-dir")  # fmt: skip
    for name, here in (("num_samples", run.num_samples), ("data", run.data.fingerprint)):
        before = checkpoint.state.get(name)
        if here != before and not (name == "data" and None in (here, before)):
            changed = _changed(run, checkpoint)
            also = f"; changed since: {shorten(changed)}" if changed else ""
            raise ConfigError(f"{where} was trained on different data", expected=f"{name} {before}",
                              got=f"{name} {here}{also}",
                              fix="another --run-dir, or the data it was trained on")  # fmt: skip
    helper = None if run.frozen is None else run.frozen.digest
    if checkpoint.state.get("frozen") != helper:
        raise ConfigError(f"{where} was trained with another helper of build_frozen",
                          expected=f"the digest {checkpoint.state.get('frozen')}", got=helper,
                          fix="the weights it was trained with, or another --run-dir")  # fmt: skip
    position = _data_position(run, checkpoint)
    if (position is None) != (run.data_state is None):
        kinds = ("an indexable data set", "an iterable data set")
        raise ConfigError(f"{where} was trained on a different kind of data", expected=kinds[position is not None],
                          got=kinds[run.data_state is not None], fix="another --run-dir")  # fmt: skip
    if position is not None and run.data_state is not None:
        run.data_state.check_state_dict(position)
    recomputed = _recomputed(run, checkpoint)
    lines = differences(checkpoint.manifest, live_tensors(run), ("model/", "ema/", "scaler/"), recomputed)
    lines += _extra_differences(run, checkpoint)
    structure = cast(dict[str, object], checkpoint.parts().get("optimizer", {}))
    lines += run.strategy.optimizer_state.compare(structure)
    if lines:
        raise ConfigError("\n  ".join([f"{where} does not fit this run", *lines]),
                          fix="the configuration it was saved with, or --resume DIR --resume.weights-only")  # fmt: skip


@contextmanager
def read_strictly(checkpoint: VerifiedCheckpoint) -> Iterator[None]:
    """What the saved state does not have, or has in another form, is damage: one line that names the checkpoint."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{checkpoint.directory}: malformed state: {type(error).__name__} {error}") from error


def restore(run: Run, checkpoint: VerifiedCheckpoint) -> None:
    """Bring back everything but the random generators, from where the run starts."""
    if run.takes_weights_only:
        weights = prefixed("model", run.model_tensors())
        load_tensors(checkpoint.directory, checkpoint.manifest, _matching(weights, checkpoint))
        run.strategy.refresh_copies_()
        restore_extra_states_(run.strategy.module, checkpoint)
        if run.ema is not None:
            run.ema.restart_()
        return
    restore_all(run, checkpoint)


def restore_all(run: Run, checkpoint: VerifiedCheckpoint) -> None:
    """Bring back everything but the random generators, from a checkpoint of this run or of one like it."""
    with read_strictly(checkpoint):
        _restore_all(run, checkpoint)


def _restore_all(run: Run, checkpoint: VerifiedCheckpoint) -> None:
    strategy = run.strategy
    structure = cast(dict[str, object], checkpoint.parts()["optimizer"])
    forms = {
        name.removeprefix("optimizer/"): (cast(torch.dtype, getattr(torch, entry.dtype)), entry.shape)
        for name, entry in checkpoint.manifest.tensors.items()
        if name.startswith("optimizer/")
    }
    recomputed = _recomputed(run, checkpoint)
    live = {name: tensor for name, tensor in live_tensors(run).items() if name not in recomputed}
    optimizer_tensors = strategy.optimizer_state.allocate(structure, forms)
    load_tensors(checkpoint.directory, checkpoint.manifest, live | prefixed("optimizer", optimizer_tensors))
    strategy.optimizer_state.install(structure, optimizer_tensors)
    strategy.refresh_copies_()
    restore_extra_states_(strategy.module, checkpoint)
    run.meter.load_state_tensors(_meter_tensors(run, checkpoint))
    if checkpoint.manifest.world_size == run.runtime.world_size:
        own = read_tensors(checkpoint, f"buffer/{run.runtime.rank:05d}/")
        set_rank_buffers_(strategy.module, own, run.runtime.device)
    for name, part in parts(run).items():
        if name in checkpoint.parts() or name not in ADDED:
            part.load_state_dict(cast(dict[str, object], checkpoint.parts()[name]))
    for observer in run.observers:
        observer.load_state_dict(cast(dict[str, str], checkpoint.parts()["observers"]))
    position = _data_position(run, checkpoint)
    if run.data_state is not None and position is not None:
        run.data_state.load_state_dict(position)


def recomputed_buffers(module: nn.Module, tensors: Mapping[str, Tensor], checkpoint: VerifiedCheckpoint) -> set[str]:
    """Of `tensors`, buffers with persistent=False saved with another dtype or shape: their layers recompute them."""
    saved = checkpoint.manifest.tensors
    caches = [slot.name for slot in buffer_slots(module) if not slot.persistent]
    names = [f"{part}/{name}" for name in caches for part in ("model", "ema")]
    return {
        name
        for name in names
        if (spec_of(tensors[name]) if name in tensors else None) != (saved[name].spec if name in saved else None)
    }


def _recomputed(run: Run, checkpoint: VerifiedCheckpoint) -> set[str]:
    return recomputed_buffers(run.strategy.module, live_tensors(run), checkpoint)


def restore_extra_states_(module: nn.Module, checkpoint: VerifiedCheckpoint) -> None:
    """Give each module the extra state that is saved for it, a tensor or a value.

    Raises:
        CheckpointError: a module does not take it.
    """
    states = {**checkpoint.parts().get("extra", {}), **read_tensors(checkpoint, "extra/")}
    try:
        set_extra_states(module, states)
    except Exception as error:  # the modules' own code, given what may be anything
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint.directory}: set_extra_state refuses what was saved: {reason}") from error


def _extra_differences(run: Run, checkpoint: VerifiedCheckpoint) -> list[str]:
    names = {name.removeprefix("extra/") for name in checkpoint.manifest.tensors if name.startswith("extra/")}
    names |= cast(dict[str, object], checkpoint.parts().get("extra", {})).keys()
    odd = sorted(names ^ extra_states(run.strategy.module).keys())
    return [f"extra states (get_extra_state) of other modules: {shorten(odd)}"] if odd else []


def _data_position(run: Run, checkpoint: VerifiedCheckpoint) -> Mapping[str, object] | None:
    """This rank's position in an iterable data set; a rank that did not exist gets rank 0's, which is then refused."""
    ranks = cast(list[dict[str, Mapping[str, object]]], checkpoint.state["ranks"])
    return ranks[run.runtime.rank if run.runtime.rank < len(ranks) else 0].get("data")


def restore_generators(run: Run, checkpoint: VerifiedCheckpoint) -> None:
    """Bring back this rank's random generators: last, because opening data and observers may draw numbers.

    A rank or a kind of device that was not there keeps the seed of its number; `resume_notes` says so.
    """
    device = run.runtime.device
    saved = read_tensors(checkpoint, f"rng/{run.runtime.rank:05d}/")
    if not saved or saved.keys() != capture_rng(device).keys():
        return
    try:
        restore_rng(saved, device)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.directory}: the random generators do not fit here: {error}") from error


def resume_notes(run: Run) -> list[str]:
    """What a person should know about this resume: what changed, and what that costs."""
    checkpoint = run.resume.checkpoint
    if checkpoint is None:
        return []
    if run.takes_weights_only:
        kept = sorted(
            run.model_tensors().keys() - {n.removeprefix("model/") for n in _matching_weights(run, checkpoint)}
        )
        left = f"; not in it, or of another shape: {shorten(kept)}" if kept else ""
        return [f"started from the weights of {checkpoint.directory}{left}"]
    notes = [f"resumed from {checkpoint.directory}"]
    if recomputed := sorted(_recomputed(run, checkpoint)):
        notes.append(f"recomputed by their layers (persistent=False): {shorten(recomputed)}")
    before, after = checkpoint.manifest.world_size, run.runtime.world_size
    if before != after:
        notes.append(
            f"saved on {before} ranks, resumed on {after}: the samples are the same, but sums run in a different "
            "order, so losses agree to rounding; per-rank randomness (dropout) and BatchNorm statistics differ"
        )
        if own := sorted(rank_buffers(run.strategy.module)):
            notes.append(f"begin again, because each rank has its own: buffers {shorten(own)}")
    kinds = {name.removeprefix("rng/00000/") for name in checkpoint.manifest.tensors if name.startswith("rng/00000/")}
    if kinds != capture_rng(run.runtime.device).keys():
        notes.append("saved on another kind of device: arithmetic and random draws (dropout) differ from before")
    if run.trackers.rule_before is not None:
        notes.append(f"the best evaluation is chosen by {run.trackers.rule}, and was by {run.trackers.rule_before}: "
                     "there is none so far")  # fmt: skip
    if run.plateau is not None and run.plateau.metric_before is not None:
        notes.append(f"the schedule follows {run.plateau.metric}, and followed {run.plateau.metric_before}: it counts "
                     "from 0 again, at the learning rate it had reached")  # fmt: skip
    if run.early_stop is not None and run.early_stop.rule_before is not None:
        notes.append(f"early stopping follows {run.early_stop.rule}, and followed {run.early_stop.rule_before}: it "
                     "begins again")  # fmt: skip
    changed = _changed(run, checkpoint)
    if changed:
        notes.append(f"changed since: {shorten(changed)}")
    return notes


def _changed(run: Run, checkpoint: VerifiedCheckpoint) -> list[str]:
    """`optim.lr 0.1 -> 0.2` for each field of the configuration that differs from the checkpoint's."""
    with read_strictly(checkpoint):
        return changes(fill_defaults(cast(dict[str, object], checkpoint.state["config"])), to_json(run.config))


def changes(before: Mapping[str, object], after: Mapping[str, object], prefix: str = "") -> list[str]:
    """`optim.lr 0.1 -> 0.2` for each field that differs; where a run is stored and where it began do not count."""
    lines: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if prefix + name in ("run_dir", "resume") or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += changes(old, new, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} {old!s:.60} -> {new!s:.60}")
    return lines


def _matching_weights(run: Run, checkpoint: VerifiedCheckpoint) -> dict[str, Tensor]:
    """The model's tensors that the checkpoint has with the same name, shape and dtype."""
    return _matching(prefixed("model", run.model_tensors()), checkpoint)


def _matching(live: Mapping[str, Tensor], checkpoint: VerifiedCheckpoint) -> dict[str, Tensor]:
    saved = checkpoint.manifest.tensors
    return {name: tensor for name, tensor in live.items() if name in saved and saved[name].spec == spec_of(tensor)}


def _meter_tensors(run: Run, checkpoint: VerifiedCheckpoint) -> dict[str, Tensor]:
    """This rank's open sums; over another number of ranks, the first one takes them all."""
    rank, before = run.runtime.rank, checkpoint.manifest.world_size
    if before == run.runtime.world_size and (own := read_tensors(checkpoint, f"meter/{rank:05d}/")):
        return own
    saved: list[dict[str, Tensor]] = [{} for _ in range(before)]
    for name, tensor in read_tensors(checkpoint, "meter/").items():
        other, _, inner = name.partition("/")
        saved[int(other)][inner] = tensor
    merged = Meter.merge(list(filter(None, saved)))
    # the others keep the names, which must be the same on every rank
    return merged if rank == 0 else {name: torch.zeros_like(tensor) for name, tensor in merged.items()}


def read_tensors(checkpoint: VerifiedCheckpoint, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it, on the CPU."""
    entries = {name: entry for name, entry in checkpoint.manifest.tensors.items() if name.startswith(prefix)}
    tensors = {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in entries.items()}
    load_tensors(checkpoint.directory, checkpoint.manifest, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
