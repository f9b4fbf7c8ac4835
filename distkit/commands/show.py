"""`distkit show`: the status of a run, from its directory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from distkit.errors import CheckpointError, ConfigError
from distkit.json_files import JsonError, known, read_object

#: Characters of a line; a longer one is not what a run has said.
LONGEST_LINE = 2000


def command(args: Sequence[str]) -> str:
    """The status of a run, from its directory."""
    if len(args) != 1:
        raise ConfigError("distkit show takes one run directory", fix="distkit show runs/RECIPE/RUN")
    from distkit.engine.attempts import KINDS, read_attempts
    from distkit.engine.lease import holder
    from distkit.engine.submission import jobs_of, newest_submission
    from distkit.engine.verdict import judge

    folder = Path(args[0])
    status = read_json(folder / "status.json")
    if status is None and (jobs := jobs_of(newest_submission(folder))):
        return f"{folder}: submitted as job {', '.join(jobs)}, not begun yet (squeue --job {jobs[0]})"
    if status is None:
        raise ConfigError(f"{folder} is not a run directory", expected="a folder with status.json",
                          fix="distkit show runs/RECIPE/RUN")  # fmt: skip
    status = known(status, KINDS)
    if not {"state", "step"} <= status.keys():
        raise ConfigError(f"{folder / 'status.json'} is not what a run wrote", expected="a state and a step",
                          got=", ".join(status) or "neither")  # fmt: skip
    who = holder(folder)
    lines = [f"{folder}: {status['state']} at step {status['step']}"]
    if status["state"] == "running":
        lines += _holder_and_progress(folder, who)
    if status.get("reason"):
        lines.append(f"  reason: {status['reason']}")
    lines += _skipped(folder)
    if attempts := read_attempts(folder, running=who is not None):
        lines += [f"  attempts: {attempts[-1].attempt}", f"  verdict: {judge(attempts)}"]
    for name, value in (read_json(folder / "summary.json") or {}).items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {_format(number)}" for key, number in value.items())
        lines.append(f"  {name}: {value}")
    return "\n".join(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…" for line in lines)


def _holder_and_progress(folder: Path, who: str | None) -> list[str]:
    """Who runs it and the last checkpoint: the status of a running run is as old as its start."""
    from distkit.checkpoint.retention import list_checkpoints

    lines = [f"  runs as {who}" if who else "  but no process is running it: it was killed"]
    steps = list_checkpoints(folder / "checkpoints")
    return [*lines, f"  saved at step {steps[-1]}" if steps else "  nothing saved yet"]


def _skipped(folder: Path) -> list[str]:
    """The ledger of skipped steps, as the newest checkpoint has it."""
    from distkit.checkpoint.format import step_name
    from distkit.checkpoint.retention import list_checkpoints
    from distkit.checkpoint.verify import read_state

    checkpoints = folder / "checkpoints"
    value: object = None
    with suppress(CheckpointError, ConfigError):  # a damaged one is for `distkit checkpoint verify` to name
        newest = list_checkpoints(checkpoints)[-1:]
        value = next((read_state(checkpoints / step_name(step)) for step in newest), None)
    for name in ("parts", "skips", "skips"):
        value = value.get(name) if isinstance(value, dict) else None
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    return [f"  skipped step {entry.get('step')}: {entry.get('why')}" for entry in entries]


def _format(value: object) -> object:
    return f"{value:g}" if isinstance(value, int | float) else value


def read_json(path: Path) -> dict[str, object] | None:
    """A JSON object, or None when the file does not exist.

    Raises:
        ConfigError: it is not one.
    """
    try:
        return read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, JsonError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read", expected="a JSON object", got=reason) from error
