"""Which checkpoints are kept, and how others go: a kill in between leaves nothing that looks committed. No torch."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distkit.checkpoint.format import step_name, step_of
from distkit.errors import ConfigError
from distkit.files import sync_folder

#: Directories of a save that has not become a checkpoint, and of a checkpoint that is being removed.
UNFINISHED = (".tmp-step-", ".trash-step-")


def list_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder` (RUN/checkpoints), ascending, by their names; [] without a folder.

    A save takes such a name only with its manifest, and a removal gives it up first: one without a manifest is damaged,
    and for verification to name.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read", expected="a folder that you may read", got=error.strerror) \
            from error  # fmt: skip
    return sorted(step for step in map(step_of, names) if step is not None)


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Attributes:
        keep_last: this many of the newest, >= 1; None: all.
        keep_best: also this many of those with the best scores, >= 1; None: none for that.
        keep_every: also each whose step is a multiple of this, >= 1; None: none for that.
    """

    keep_last: int | None
    keep_best: int | None
    keep_every: int | None


def choose_removed(
    steps: Iterable[int], scores: Mapping[int, float], retention: Retention, protected: Set[int]
) -> list[int]:
    """The steps, ascending, that `retention` does not keep; never the newest one, nor one of `protected`.

    Args:
        steps: of committed checkpoints.
        scores: higher is better; of two that are equal the older one counts as better. Steps without an evaluation are
            absent.
        retention: what is kept.
        protected: steps that stay whatever the rest says.
    """
    ordered = sorted(set(steps))
    if retention.keep_last is None or not ordered:
        return []
    keep = {*protected, *ordered[-max(retention.keep_last, 1) :]}
    if retention.keep_best is not None:
        known = [step for step in ordered if not math.isnan(scores.get(step, math.nan))]
        keep.update(sorted(known, key=lambda step: -scores[step])[: retention.keep_best])
    if retention.keep_every is not None:
        keep.update(step for step in ordered if step % retention.keep_every == 0)
    return [step for step in ordered if step not in keep]


def score_of(state: Mapping[str, object], metric: str, mode: Literal["min", "max"]) -> float | None:
    """How good the checkpoint with this state.json is, higher is better; None when it was not evaluated at its step.

    It is the last evaluation's `metric`, negated for "min"; also None when that is missing or not finite.
    """
    last = last_evaluation(state)
    value = None if last is None or last.get("step") != state.get("step") else last.get(metric)
    if not isinstance(value, float | int) or not math.isfinite(value):
        return None
    return -float(value) if mode == "min" else float(value)


def last_evaluation(state: Mapping[str, object]) -> Mapping[str, object] | None:
    """`parts.trackers.last` of a state.json: the values by name and their "step"; None before the first evaluation."""
    value: object = state
    for name in ("parts", "trackers", "last"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else None


def remove(folder: Path, step: int) -> None:
    """Remove the checkpoint of `step`: it loses its name at once, then its files are deleted.

    Raises:
        OSError: it does not exist, or may not be removed.
    """
    delete(take_name(folder, step))


def take_name(folder: Path, step: int) -> Path:
    """Rename the checkpoint of `step` so that it counts no more; where it is now. OSError where there is none."""
    name = f".trash-{step_name(step)}"
    trash, number = folder / name, 1
    while os.path.lexists(trash):  # of a run that was killed here
        trash, number = folder / f"{name}-{number}", number + 1
    os.rename(folder / step_name(step), trash)
    sync_folder(folder)
    return trash


def delete(trash: Path) -> None:
    """Remove the files of a checkpoint that has lost its name."""
    if trash.is_symlink():
        trash.unlink()
    else:
        shutil.rmtree(trash)


def leftovers(folder: Path) -> list[str]:
    """Names of what a dead run left in `folder`: unfinished saves and half removed checkpoints; no symlinks."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.name.startswith(UNFINISHED) and e.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def sweep(folder: Path) -> None:
    """Delete the `leftovers` of `folder`; only while no run saves there.

    Raises:
        OSError: one may not be removed.
    """
    for name in leftovers(folder):
        shutil.rmtree(folder / name)


def put_aside(folder: Path, step: int) -> str:
    """Rename something with a checkpoint's name that is not one, so that it no longer counts and nothing is lost."""
    names = (f"damaged-{number}-{step_name(step)}" for number in itertools.count(1))
    name = next(name for name in names if not os.path.lexists(folder / name))
    os.rename(folder / step_name(step), folder / name)
    sync_folder(folder)
    return name
