"""The `distkit` command: answers on a login node, without torch, in a moment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import distkit
from distkit.errors import ConfigError, DistkitError, nearest

USAGE = f"""distkit {distkit.__version__}: a training run that is the same run everywhere

usage: distkit COMMAND [ARGUMENTS]

  show RUN_DIR      how a run stands: state, step, last and best evaluation
  version           print the version

A recipe is run by itself:
  accelerate launch recipes/cifar10.py --help
"""


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Do what `argv` says; the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if argv else 2
    try:
        name, *args = argv
        if name not in COMMANDS:
            raise ConfigError(f"distkit has no command {name}", expected=", ".join(COMMANDS), got=name,
                              fix=f"distkit {nearest(name, COMMANDS) or '--help'}")  # fmt: skip
        print(COMMANDS[name](args))
    except DistkitError as error:
        print(f"distkit: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def show(args: Sequence[str]) -> str:
    """A run directory in a few lines."""
    if len(args) != 1:
        raise ConfigError("distkit show takes one run directory", fix="distkit show runs/RECIPE/RUN")
    folder = Path(args[0])
    status = read_json(folder / "status.json")
    if status is None:
        raise ConfigError(f"{folder} is no run directory", expected="a folder with status.json",
                          fix="distkit show runs/RECIPE/RUN")  # fmt: skip
    lines = [f"{folder}: {status['state']} at step {status['step']}"]
    if status.get("reason"):
        lines.append(f"  reason: {status['reason']}")
    for name, value in (read_json(folder / "summary.json") or {}).items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {number:g}" for key, number in value.items())
        lines.append(f"  {name}: {value}")
    return "\n".join(lines)


def read_json(path: Path) -> dict[str, object] | None:
    """A JSON object, or None when the file does not exist.

    Raises:
        ConfigError: it is not one.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read", expected="a JSON object", got=error) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} cannot be read", expected="a JSON object", got=type(value).__name__)
    return value


def version(args: Sequence[str]) -> str:
    """The version of distkit."""
    if args:
        raise ConfigError("distkit version takes no argument", got=" ".join(args), fix="distkit version")
    return distkit.__version__


COMMANDS: dict[str, Callable[[Sequence[str]], str]] = {"show": show, "version": version}
