"""A packed split: a folder of safetensors files and an index. Nothing in it is pickled.

    OUT/train/images-00000-of-00003.safetensors    a shard: some of the samples, about 1 GB
    OUT/train/index.json                           the fields of `Index`; written last: with it the split is complete

Tensors of a shard of n samples, in this order, after the header of the safetensors format:

    labels        int64 [n]       class numbers
    path_offsets  int64 [n + 1]   where each path begins in `paths`; only in shards made from a folder
    offsets       int64 [n + 1]   where each sample begins in `images`; only in encoded shards
    paths         uint8           original paths below the split's folder, end to end; as `path_offsets`
    images        raw: uint8 [n, C, H, W]; encoded: uint8, the original image files end to end
    crc           uint8 [n, 4]    CRC-32 of each sample, little-endian

Samples are ordered by class, then by path. The metadata of a shard has the sha256 of its plan: the index with the
checksums of the shards blank, so that equal plans give equal files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distkit.config import Color, Split
from distkit.config.data import ground_color
from distkit.errors import ConfigError, DataError
from distkit.files import read_regular
from distkit.json_files import a_count, a_number, a_text, list_of, optional, parse_object, record

INDEX = "index.json"
VERSION = 2
#: An index has about 150 bytes a shard; a larger file is something else.
MAX_INDEX_BYTES = 64 << 20
BLANK = "0" * 64
PACK = "distkit data pack FOLDER OUT"

Form = Literal["raw", "encoded"]


@dataclass(frozen=True)
class ShardEntry:
    """What the index says about a shard."""

    file: str
    num_samples: int
    num_bytes: int
    """Size of the file."""
    sha256: str = BLANK
    """Of the whole file."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a packed split says about itself."""

    version: int = VERSION
    name: str
    """The data set, for people: the name of its folder, or of a torchvision set."""
    split: Split
    form: Form
    sample_shape: tuple[int, ...] | None
    """[C, H, W] of every sample of a raw split."""
    num_samples: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Mean per channel on the scale of [0, 1], as `ImageDataset` takes it."""
    std: tuple[float, ...]
    source_sha256: str
    """Over the paths, sizes and times of the files that were packed, or over the pixels and labels of a named set."""
    labels_sha256: str
    """Over the labels of all shards."""
    shards: tuple[ShardEntry, ...]
    color: Color = "rgb"
    """What was asked for. Version 1 has neither this nor what follows."""
    channels: int = 3
    """Of an encoded image once it is decoded: 1, grey, or 3."""
    background: str = "white"
    """What transparent pixels are laid on."""
    notes: tuple[str, ...] = ()
    """What is unusual about the images, for people; written last, like the checksums."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def plan_digest(self) -> str:
        """sha256 of the index with blank checksums and no notes: known before the first image is read."""
        blank = tuple(dataclasses.replace(shard, sha256=BLANK) for shard in self.shards)
        return _digest(dataclasses.replace(self, shards=blank, notes=())._values())

    def to_json(self) -> dict[str, object]:
        """The fields, and under `sha256` a checksum of them."""
        values = self._values()
        return {**values, "sha256": _digest(values)}

    def _values(self) -> dict[str, object]:
        added = ("color", "channels", "background", "notes") if self.version == 1 else ()
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in added}


def shard_name(number: int, num_shards: int) -> str:
    """File name of a shard: `images-00000-of-00003.safetensors`."""
    return f"images-{number:05}-of-{num_shards:05}.safetensors"


def read_index(folder: Path) -> tuple[Index, str]:
    """The index of a packed split, and its checksum.

    Raises:
        DataError: there is none, it is damaged or of a newer version, or it contradicts itself.
    """
    path = folder / INDEX
    try:
        data = read_regular(path, MAX_INDEX_BYTES)
    except PermissionError as error:
        raise DataError(f"{path} cannot be read", expected="a file that this user may read", got=error,
                        fix=f"chmod u+r {shlex.quote(str(path))}") from error  # fmt: skip
    except OSError as error:
        raise DataError(
            f"{folder} is not a packed split", expected=f"a folder made by {PACK}", got=error, fix=PACK
        ) from error
    try:
        values: dict[str, Any] = parse_object(data)
        if isinstance(values.get("version"), int) and values["version"] > VERSION:
            raise DataError(
                f"{folder} was packed by a newer distkit",
                expected=f"version {VERSION} or older",
                got=f"version {values['version']}",
                fix=f"pip install --upgrade distkit, or {PACK}",
            )
        sha256 = values.pop("sha256")
        if sha256 != _digest(values):
            raise ValueError("another checksum")
        _KIND(values)
        names = ("class_names", "mean", "std", "notes")
        lists = {name: tuple(values[name]) for name in names if name in values or name != "notes"}
        shape = values["sample_shape"] and tuple(values["sample_shape"])
        shards = tuple(ShardEntry(**shard) for shard in values["shards"])
        index = Index(**{**values, **lists, "sample_shape": shape, "shards": shards})
        _check(index)
        return index, sha256
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged",
            expected="the index that was written",
            got=error,
            fix=f"{PACK} --overwrite",
        ) from error


_TEXTS, _NUMBERS = list_of(a_text), list_of(a_number)
_KIND = record(
    {
        "name": a_text, "split": a_text, "form": a_text, "num_samples": a_count,
        "sample_shape": optional(list_of(a_count)),
        "class_names": _TEXTS, "mean": _NUMBERS, "std": _NUMBERS, "source_sha256": a_text, "labels_sha256": a_text,
        "shards": list_of(record({"file": a_text, "num_samples": a_count, "num_bytes": a_count, "sha256": a_text})),
    },
    may_have={"color": a_text, "channels": a_count, "background": a_text, "notes": _TEXTS},
)  # fmt: skip


def _check(index: Index) -> None:
    """Raise ValueError where the index contradicts itself: its sizes and names are used to open files."""
    counts = [*(index.sample_shape or ()), *(shard.num_samples for shard in index.shards)]
    if not index.shards or min(counts) < 1:
        raise ValueError("a size that is not a number above 0")
    if sum(shard.num_samples for shard in index.shards) != index.num_samples:
        raise ValueError(f"shards that do not add up to {index.num_samples} samples")
    if index.form not in ("raw", "encoded") or (index.form == "raw") != (index.sample_shape is not None):
        raise ValueError(f"the form {index.form} with samples of shape {index.sample_shape}")
    if index.channels not in (1, 3):
        raise ValueError(f"images of {index.channels} channels")
    try:
        ground_color(index.background)
    except ConfigError as error:
        raise ValueError(f"the background {index.background!r}") from error
    for number, shard in enumerate(index.shards):
        if shard.file != shard_name(number, len(index.shards)):
            raise ValueError(f"a shard named {shard.file}")


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()
