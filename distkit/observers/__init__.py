"""Observers: console, JSONL, TensorBoard, Weights & Biases. One file and one row of the table each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distkit.config import ObserveConfig
from distkit.errors import ConfigError
from distkit.observers.base import Event, Observer, RunInfo, Scalar
from distkit.observers.console import ConsoleObserver
from distkit.observers.jsonl import JsonlObserver
from distkit.observers.tensorboard import TensorboardObserver
from distkit.observers.wandb import WandbObserver

__all__ = [
    "ConsoleObserver",
    "Event",
    "JsonlObserver",
    "Observer",
    "RunInfo",
    "Scalar",
    "TensorboardObserver",
    "WandbObserver",
    "build_observers",
]


@dataclass(frozen=True)
class Row:
    """One observer: whether a run wants it, how it is made, and the package (also the extra) that it needs."""

    wanted: Callable[[ObserveConfig], bool]
    build: Callable[[Path], Observer]
    needs: str | None = None


# The console comes last, so that its last words are the last ones on the terminal.
TABLE = (
    Row(lambda _: True, lambda run_dir: JsonlObserver(run_dir / "metrics.jsonl")),
    Row(lambda o: o.tensorboard, lambda run_dir: TensorboardObserver(run_dir / "tensorboard"), "tensorboard"),
    Row(lambda o: o.wandb, WandbObserver, "wandb"),
    Row(lambda o: o.console, lambda _: ConsoleObserver()),
)


def build_observers(observe: ObserveConfig, run_dir: Path, is_main_process: bool) -> list[Observer]:
    """The observers of this process: what `observe` asks for on the main process, none on the others.

    Nothing is written or imported before `start`.

    Raises:
        ConfigError: on every rank alike, when a package that a wanted observer needs is not installed.
    """
    rows = [row for row in TABLE if row.wanted(observe)]
    for row in rows:
        if row.needs is not None and not _installed(row.needs):
            raise ConfigError(
                f"--observe.{row.needs} needs the package {row.needs}, which is not installed",
                fix=f'pip install "distkit[{row.needs}]", or --observe.no-{row.needs}',
            )
    return [row.build(run_dir) for row in rows] if is_main_process else []


def _installed(package: str) -> bool:
    # A folder named wandb or tensorboard, as both leave behind, is found too, but has no origin.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
