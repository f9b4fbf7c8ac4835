"""Where a run begins: from nothing, from its own newest checkpoint, or from another run's."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from distkit.checkpoint.restore import Found, newest_verified, open_verified, resolve_source, set_aside
from distkit.config import TrainConfig
from distkit.engine.run import Run
from distkit.engine.run_dir import RunDirectory
from distkit.engine.saving import build_saver
from distkit.runtime.process import Runtime


@dataclass
class Origin:
    """The checkpoint that a run begins from, None for a new run, and what was said while it was looked for."""

    found: Found | None = None
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

    origin.found = newest_verified(directory.checkpoints, runtime, warn)
    if origin.found is None and source != "auto":
        with runtime.together("looking for the checkpoint"):
            path, single = resolve_source(source)
        origin.elsewhere = True
        origin.found = open_verified(path, runtime) if single else newest_verified(path, runtime, warn)
    return origin


def settle_origin(run: Run, origin: Origin) -> None:
    """What follows once the directory is written: put damaged checkpoints aside, and make what saves new ones."""
    config, runtime, folder = run.config, run.runtime, run.directory.checkpoints
    source = origin.found.manifest.step if origin.found is not None and not origin.elsewhere else None
    with runtime.together("putting damaged checkpoints aside"):
        if runtime.is_main_process and source is not None:
            for name in set_aside(folder, source):
                origin.warnings.append(f"kept for you as {folder / name}")
    run.warnings = origin.warnings
    if config.checkpoint.enabled:
        run.saver = build_saver(run, source)
