"""Which checkpoint a person means who types a path: itself, or the newest one of a run. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from distkit.checkpoint.format import MANIFEST, step_name, step_of
from distkit.checkpoint.retention import UNFINISHED, list_checkpoints
from distkit.errors import ConfigError

#: Where a run keeps its checkpoints.
FOLDER = "checkpoints"


def is_checkpoint(path: Path) -> bool:
    """True for a directory that has a manifest, or a checkpoint's name: then it lacks its manifest."""
    return os.path.isdir(path) and (os.path.lexists(path / MANIFEST) or step_of(_name(path)) is not None)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint `path`, or the newest one of the run directory or RUN/checkpoints that it is.

    Raises:
        ConfigError: it is none of them, or there is no checkpoint yet.
    """
    if is_checkpoint(path):
        return path
    if _name(path).startswith(UNFINISHED) and path.is_dir():
        raise ConfigError(f"{path} is not a checkpoint", expected="a directory with MANIFEST.json",
                          got="what a killed save or removal left behind", fix=str(path.parent))  # fmt: skip
    folder = find_folder(path)
    steps = list_checkpoints(folder)
    if not steps:
        raise ConfigError(f"{path} holds no checkpoint", expected=f"{folder / step_name(500)}, say",
                          got=f"{folder} without one")  # fmt: skip
    return folder / step_name(steps[-1])


def find_folder(path: Path) -> Path:
    """The folder of the checkpoints of a run: `path` is the run directory, or the folder itself.

    Raises:
        ConfigError: it is neither.
    """
    if is_checkpoint(path):
        raise ConfigError(f"{path} is one checkpoint", expected="the directory of a run", fix=str(run_of(path)))
    if os.path.isdir(path / FOLDER):
        return path / FOLDER
    if os.path.isdir(path) and (_name(path) == FOLDER or list_checkpoints(path)):
        return path
    there = "a directory without" if os.path.isdir(path) else "a file" if os.path.lexists(path) else "nothing there"
    raise ConfigError(f"{path} holds no checkpoint", expected="a checkpoint, or the directory of a run", got=there,
                      fix="runs/RECIPE/RUN")  # fmt: skip


def run_of(path: Path) -> Path:
    """The run directory, absolute, of a folder of checkpoints or of one; that folder where it has another name."""
    folder = Path(os.path.abspath(path))  # "." has no parent
    folder = folder.parent if is_checkpoint(folder) else folder
    return folder.parent if folder.name == FOLDER else folder


def _name(path: Path) -> str:
    return os.path.basename(os.path.abspath(path))
