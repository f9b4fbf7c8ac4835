"""Removing old checkpoints by hand: `distkit checkpoint prune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from distkit.checkpoint.format import step_name
from distkit.checkpoint.retention import (
    Retention,
    choose_removed,
    last_evaluation,
    list_checkpoints,
    remove,
    score_of,
)
from distkit.checkpoint.verify import open_checkpoint, read_manifest, read_state
from distkit.commands.tools.list import size_of
from distkit.commands.tools.locate import find_folder, run_of
from distkit.errors import CheckpointError, ConfigError

Mode = Literal["min", "max"]


def prune(
    path: Path, retention: Retention, *, metric: str | None = None, mode: Mode | None = None, yes: bool = False
) -> str:
    """Remove the checkpoints of the run `path` that `retention` does not keep; with `yes`, else say which.

    The newest one that verifies stays always, and so does every newer one.

    Args:
        path: the run directory, or RUN/checkpoints.
        retention: what is kept.
        metric, mode: which evaluation makes the best, where `retention` keeps any.
        yes: do it.

    Raises:
        ConfigError: no run, a live one, or a metric that no checkpoint has.
        CheckpointError: none verifies, or one could not be removed.
    """
    folder = find_folder(path)
    refuse_live(folder)
    steps = list_checkpoints(folder)
    if not steps:
        raise ConfigError(f"{path} holds no checkpoint", expected="a run that has saved")
    sound = _newest_sound(folder, steps)
    scores = {} if retention.keep_best is None else _scores(folder, steps, metric, mode)
    # newer ones are damaged: they neither go nor count
    going = choose_removed([step for step in steps if step <= sound], scores, retention, {sound})
    kept = f"{len(steps) - len(going)} of {len(steps)} checkpoints stay, of steps " + ", ".join(
        str(step) for step in steps if step not in set(going)
    )
    if not going:
        return f"nothing to remove: {kept}"
    lines = [f"{'removed' if yes else 'would go'}: {_describe(folder, step)}" for step in going]
    if not yes:
        return "\n".join([*lines, kept, "nothing was removed: add --yes to remove them"])
    refuse_live(folder)  # verifying may have taken long
    for step in going:
        try:
            remove(folder, step)
        except OSError as error:
            raise CheckpointError(f"cannot remove {folder / step_name(step)}: {error.strerror or error}") from error
    return "\n".join([*lines, kept])


def refuse_live(folder: Path) -> None:
    """Refuse while a run holds the lease of the run directory that contains `folder`.

    Raises:
        ConfigError: naming the run.
    """
    from distkit.engine.lease import holder

    run = run_of(folder)
    if (who := holder(run)) is not None:
        raise ConfigError(f"{run} is in use by a run, which removes its old checkpoints itself",
                          expected="a run that has ended", got=who)  # fmt: skip


def _newest_sound(folder: Path, steps: Sequence[int]) -> int:
    """The newest step whose checkpoint verifies."""
    last = ""
    for step in reversed(steps):
        try:
            open_checkpoint(folder / step_name(step))
        except CheckpointError as error:
            last = str(error)
        else:
            return step
    raise CheckpointError(f"none of the {len(steps)} checkpoints in {folder} verifies, so none is removed: {last}")


def _scores(folder: Path, steps: Sequence[int], metric: str | None, mode: Mode | None) -> dict[int, float]:
    """The scores of those that were evaluated; one whose state cannot be read has none."""
    if metric is None or mode is None:
        raise ConfigError("--keep-best needs to know what is best", expected="--metric and --mode",
                          fix="--keep-best 1 --metric loss --mode min")  # fmt: skip
    scores: dict[int, float] = {}
    known: set[str] = set()
    for step in steps:
        try:
            state = read_state(folder / step_name(step))
        except CheckpointError:
            continue
        known |= {str(name) for name in last_evaluation(state) or {}} - {"step"}
        if (score := score_of(state, metric, mode)) is not None:
            scores[step] = score
    if metric not in known:
        raise ConfigError(f"no checkpoint has an evaluation with {metric}",
                          expected=", ".join(sorted(known)) or "a run that evaluates", got=metric)  # fmt: skip
    return scores


def _describe(folder: Path, step: int) -> str:
    directory = folder / step_name(step)
    try:
        return f"{directory}, {size_of(read_manifest(directory).nbytes())}"
    except CheckpointError:
        return f"{directory}, damaged"
