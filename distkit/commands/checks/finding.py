"""What a check says, and what it is told. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from distkit.runtime import Topology

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the screen.

    Attributes:
        name: what was looked at, such as `all-reduce`.
        level: ok; warning: training works, but slower or less safely than it could; error: it will fail.
        message: what was found. Ranks that find the same say the same, so that it is printed once.
        remedy: what to do about it; empty only for ok.
    """

    name: str
    level: Level
    message: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"{self.level!r} is no level: {', '.join(get_args(Level))}")
        if (self.level == "ok") == bool(self.remedy):
            raise ValueError(f"{self.name}: a remedy belongs to a warning or an error, and each of these needs one")


@dataclass(frozen=True)
class Footprint:
    """What the checkpoints of a run take on the disk.

    Attributes:
        nbytes, files: of one checkpoint.
        kept: checkpoints that are kept at a time; None: all that the run writes.
        source: where the size comes from, for messages.
    """

    nbytes: int
    files: int
    kept: int | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every check is told.

    Attributes:
        env: the environment variables.
        topology: this process among its ranks; a single process where the launcher contradicts itself.
        launch_error: how it contradicts itself, if it does.
        node: the name of this machine, or of this SLURM node.
        run_dir: where checkpoints will be written; need not exist.
        footprint: of the checkpoints; None: unknown.
        data_workers: processes per rank that read data; None: as many as the run would start.
        device: `auto`, `cpu` or `cuda`, as the run would be told.
        timeout_seconds: how long ranks wait for each other.
    """

    env: Mapping[str, str]
    topology: Topology
    launch_error: str | None
    node: str
    run_dir: Path
    footprint: Footprint | None
    data_workers: int | None
    device: str
    timeout_seconds: float

    @property
    def local_world_size(self) -> int:
        """Ranks on this node."""
        return self.topology.local_world_size

    @property
    def num_nodes(self) -> int:
        """Nodes of the run, where each has as many ranks as this one."""
        return max(1, -(-self.topology.world_size // self.local_world_size))


def in_words(nbytes: float) -> str:
    """Bytes as people say them: 3.5 GiB."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            break
        nbytes /= 1024
    return f"{nbytes:.3g} {unit}" if nbytes < 1000 else f"{nbytes:.0f} {unit}"


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
