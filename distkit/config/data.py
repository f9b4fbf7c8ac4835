"""Where samples come from, where they are held, and what to do about damaged ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from distkit.config.check import require, require_number

Source = Literal["cifar10", "cifar100", "mnist", "fashion_mnist", "folder", "packed", "synthetic"]
Placement = Literal["auto", "device", "host", "workers"]
Color = Literal["auto", "rgb", "grey"]
#: Grounds that have a name; any other colour is typed as #rrggbb.
GROUNDS = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0)}


def ground_color(background: str, name: str = "data.background") -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of "white", "grey", "black" or "#rrggbb".

    Raises:
        ConfigError: it is none of these; `name` is the option.
    """
    ok = background in GROUNDS or re.fullmatch("#[0-9a-fA-F]{6}", background) is not None
    require(ok, name, f"{', '.join(GROUNDS)} or #rrggbb", background, "white")
    return GROUNDS.get(background) or (int(background[1:3], 16), int(background[3:5], 16), int(background[5:7], 16))


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
    color: Color = "auto"
    """Channels of a folder's images. auto: grey where every training image is grey, else rgb."""
    background: str = "white"
    """What the transparent pixels of a folder's images are laid on: white, grey, black or #rrggbb."""
    allow_empty_classes: bool = False
    """Accept classes that have images in only one of a folder's splits."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel of the images, in [0, 1]; None: the data set's own, and CIFAR-10's for a folder.
    `distkit data stats` computes it."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel likewise, > 0."""
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
            what = "--data.source folder; `distkit data pack` has this option for packed images"
            require(self.color == "auto", "data.color", what, self.color, "auto")
            require(self.background == "white", "data.background", what, self.background, "white")
            ok = not self.allow_empty_classes
            require(ok, "data.no_allow_empty_classes", what, "--data.allow-empty-classes", "")
        require(self.color in get_args(Color), "data.color", ", ".join(get_args(Color)), self.color, "auto")
        ground_color(self.background)
        require(self.mean != (), "data.mean", "one number a channel", "none", "0.5 0.5 0.5")
        same_length = (self.mean and len(self.mean)) == (self.std and len(self.std))
        example = "None" if self.mean is None else " ".join(["0.25"] * len(self.mean))
        require(same_length, "data.std", "as many numbers as --data.mean", self.std, example)
        for value in self.mean or ():
            require_number("data.mean", value, least=0, most=1, example="0.5 0.5 0.5")
        for value in self.std or ():
            require_number("data.std", value, above=0, example=example)
        for name in ("num_workers", "prefetch_depth", "max_corrupt"):
            require_number(f"data.{name}", getattr(self, name), least=1, example="2")
