"""Where a run begins: from nothing, from its own newest checkpoint, or from another run's."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from distkit.checkpoint.restore import VerifiedCheckpoint, newest_verified, open_verified, resolve_source, set_aside
from distkit.config import TrainConfig
from distkit.engine.run import Run
from distkit.engine.run_dir import RunDirectory
from distkit.engine.save import build_saver
from distkit.errors import CheckpointError, ConfigError
from distkit.runtime.process import Runtime


@dataclass
class Origin:
    """The checkpoint that a run begins from, None for a new run, and what was said while it was looked for."""

    found: VerifiedCheckpoint | None = None
    elsewhere: bool = False
    warnings: list[str] = field(default_factory=list)


def find_origin(config: TrainConfig, runtime: Runtime, directory: RunDirectory) -> Origin:
    """Choose and verify the checkpoint to begin from; a run that stands in `directory` goes before `--resume DIR`.

    So the same command goes on after a kill, also one that began from somewhere else.

    Raises:
        ConfigError: --resume names no checkpoint.
        CheckpointError: there are checkpoints, and none verifies.
    """
    origin = Origin()
    source = config.resume.source
    if source == "never" or config.debug.enabled:
        return origin

    def warn(message: str) -> None:
        origin.warnings.append(message)
        if runtime.is_main_process:
            print(f"distkit: warning: {message}", file=sys.stderr, flush=True)

    try:
        origin.found = newest_verified(directory.checkpoints, runtime, warn)
    except CheckpointError as error:
        if directory.completed_steps() < 0:
            raise
        warn(str(error).splitlines()[0])  # a completed run needs none, and one of more steps is refused below
    if origin.found is not None:
        with runtime.raise_on_all_ranks("looking for the checkpoint"):
            check_own_goes_first(source, directory, origin.found.manifest.step)
        if source != "auto":
            warn(f"--resume {source} is not used: {directory.path} has checkpoints of its own, and goes on from them")
        return origin
    if source == "auto" and directory.holds_run() and directory.completed_steps() < 0:
        warn(f"{directory.path} holds a run that has saved nothing: it begins again at step 0")
    if source != "auto":
        with runtime.raise_on_all_ranks("looking for the checkpoint"):
            path, single = resolve_source(source)
        origin.elsewhere = True
        origin.found = open_verified(path, runtime) if single else newest_verified(path, runtime, warn)
    return origin


def check_own_goes_first(source: str, directory: RunDirectory, newest: int) -> None:
    """Refuse to begin a run from an older checkpoint of its own: the newer ones would be in its way.

    Raises:
        ConfigError: saying how to branch off.
    """
    folder = directory.path.resolve()
    if source != "auto" and Path(source).resolve().is_relative_to(folder):
        raise ConfigError(f"--resume {source} lies in --run-dir {directory.path}, which goes on from step {newest}",
                          expected="another directory for a run that branches off",
                          fix=f"--run-dir {directory.path}-2 --resume {source}, or --resume auto")  # fmt: skip


def check_not_completed(directory: RunDirectory) -> None:
    """Refuse to begin a completed run again at step 0 for more steps: its metrics and weights would be lost.

    Raises:
        ConfigError: naming the directory.
    """
    done = directory.completed_steps()
    if done >= 0:
        raise ConfigError(
            f"--run-dir {directory.path} holds a run of {done} steps and no checkpoint to go on from",
            expected="a checkpoint, or another directory",
            fix=f"--run-dir {directory.path}-2",
        )


def settle_origin(run: Run, origin: Origin) -> None:
    """What follows once the directory is written: put damaged checkpoints aside, and make what saves new ones."""
    config, runtime, folder = run.config, run.runtime, run.directory.checkpoints
    source = origin.found.manifest.step if origin.found is not None and not origin.elsewhere else None
    with runtime.raise_on_all_ranks("putting damaged checkpoints aside"):
        if runtime.is_main_process and source is not None:
            for name in set_aside(folder, source):
                origin.warnings.append(f"kept for you as {folder / name}")
    run.warnings = origin.warnings
    if config.checkpoint.enabled:
        run.saver = build_saver(run, source)
