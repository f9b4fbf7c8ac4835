"""Observers: JSONL, TensorBoard, Weights & Biases, console. One file and one row of the table each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from distkit.config import ObserveConfig
from distkit.errors import ConfigError, nearest
from distkit.observers.base import Event, Observer, RunInfo, Scalar

__all__ = ["TABLE", "Event", "Observer", "RunInfo", "Scalar", "build_observers"]

#: Name of an observer -> the package that it needs, which is also the name of the extra that installs it. The file
#: of that name here has `build(run_dir) -> Observer`. jsonl is always on, the others by --observe.NAME, where
#: ObserveConfig has a switch of that name, or by --observe.also NAME. The console comes last, so that its last words
#: are the last ones on the terminal.
TABLE: dict[str, str | None] = {
    "jsonl": None,
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "console": None,
}


def build_observers(observe: ObserveConfig, run_dir: Path, is_main_process: bool) -> list[Observer]:
    """The observers of this process: what `observe` asks for on the main process, none on the others.

    Nothing is written, and no package of an observer imported, before `start`.

    Raises:
        ConfigError: on every rank alike, when an observer is unknown or needs a package that is not installed.
    """
    also = observe.also or ()
    for name in also:
        if name not in TABLE:
            raise ConfigError(f"--observe.also: unknown observer {name}", expected=", ".join(TABLE), got=name,
                              fix=f"--observe.also {nearest(name, TABLE) or 'console'}")  # fmt: skip
    wanted = [name for name in TABLE if name == "jsonl" or name in also or getattr(observe, name, False)]
    for name in wanted:
        package = TABLE[name]
        if package is not None and not _installed(package):
            off = "leave it out of --observe.also" if name in also else f"--observe.no-{name}"
            raise ConfigError(f"the observer {name} needs the package {package}, which is not installed",
                              fix=f'pip install "distkit[{package}]", or {off}')  # fmt: skip
    return [_build(name, run_dir) for name in wanted] if is_main_process else []


def _build(name: str, run_dir: Path) -> Observer:
    build: Callable[[Path], Observer] = importlib.import_module(f"distkit.observers.{name}").build
    return build(run_dir)


def _installed(package: str) -> bool:
    # a folder named wandb or tensorboard, as both leave behind, has a spec too, but no origin
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
