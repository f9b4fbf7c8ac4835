"""Where samples come from, where they are held, and what to do about damaged ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from distkit.config.check import require, require_number

Source = Literal["cifar10", "cifar100", "mnist", "fashion_mnist", "folder", "packed", "synthetic"]
Placement = Literal["auto", "device", "host", "workers"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and where they are held during training."""

    source: Source = "cifar10"
    """A data set downloaded by name; folder: ROOT/SPLIT/CLASS/*; packed: the output of `distkit data pack`;
    synthetic."""
    root: Path = Path("data")
    """Directory of the data: downloads, the image folder, or the packed files."""
    cache_dir: Path | None = None
    """Where the decoded copy of an image folder is kept; None: inside the image folder."""
    placement: Placement = "auto"
    """device: all samples in the device's memory; host: batches gathered on the CPU ahead of the step; workers:
    map-style data sets in worker processes."""
    num_workers: int | None = None
    """Worker processes per rank, >= 1; None: cores / ranks. Only for placement workers."""
    prefetch_depth: int = 2
    """Batches prepared ahead of the step, by host and by each worker, >= 1."""
    on_corrupt: Literal["error", "skip"] = "error"
    """What to do about an unreadable sample. error: end the run and name it; skip: replace it with another sample,
    always the same one."""
    max_corrupt: int = 100
    """Replaced samples per rank after which the run ends anyway, >= 1."""

    def __post_init__(self) -> None:
        require(self.source in get_args(Source), "data.source", ", ".join(get_args(Source)), self.source, "folder")
        require(self.placement in get_args(Placement), "data.placement", ", ".join(get_args(Placement)),
                self.placement, "auto")  # fmt: skip
        if self.source == "synthetic":
            require(self.root == Path("data"), "data.root", "a source that reads files", self.root, "data")
        if self.source != "folder":
            ok = self.cache_dir is None
            require(ok, "data.cache_dir", "--data.source folder, which alone is decoded", self.cache_dir, "None")
        for name in ("num_workers", "prefetch_depth", "max_corrupt"):
            require_number(f"data.{name}", getattr(self, name), least=1, example="2")
