"""The directory of a run: config.json, environment.json, status.json, summary.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distkit.errors import ConfigError

State = Literal["running", "completed", "preempted", "failed"]


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write `value` to `path`; a reader sees the old file or the new one, never a half."""
    partial = path.with_name(f".tmp-{path.name}")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run. Every rank knows the path; only rank 0 (`writes`) touches it."""

    path: Path
    writes: bool
    fresh: bool = False
    """The name was made up just now: another run that made up the same one must not share it."""

    def create(self, config: Mapping[str, object], environment: Mapping[str, object]) -> None:
        """Make the directory and write what the run is.

        Raises:
            ConfigError: it cannot be made or written.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=not self.fresh)
            write_json(self.path / "config.json", config)
            write_json(self.path / "environment.json", environment)
        except OSError as error:
            raise ConfigError(f"cannot write the run directory {self.path}", expected="a writable directory",
                              got=error, fix="--run-dir DIR") from error  # fmt: skip

    def write_status(self, state: State, step: int, reason: str | None = None) -> None:
        """Say in status.json how the run stands."""
        if self.writes:
            status = {"state": state, "step": step, "reason": reason, "attempt": 1}
            write_json(self.path / "status.json", status)

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write summary.json."""
        if self.writes:
            write_json(self.path / "summary.json", summary)


def check_unused(path: Path) -> None:
    """Refuse a directory that already holds a run.

    Raises:
        ConfigError: naming the directory and what to type.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--run-dir {path} is a file", expected="a directory, or a path that does not exist",
                          fix=f"--run-dir {path}-run")  # fmt: skip
    if (path / "config.json").exists():
        raise ConfigError(
            f"--run-dir {path} already holds a run",
            expected="an empty directory, or a path that does not exist",
            got=f"{path / 'config.json'}",
            fix=f"--run-dir {path}-2",
        )
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"--run-dir {path} cannot be made", expected="a place where you may write",
                          got=f"{parent} is not writable", fix="--run-dir runs/NAME")  # fmt: skip
