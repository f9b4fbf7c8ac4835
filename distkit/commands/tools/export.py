"""The weights of a checkpoint as safetensors files that other programs load: `distkit checkpoint export`."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import torch
from torch import Tensor

from distkit.checkpoint.format import DTYPES, STATE, Manifest
from distkit.checkpoint.read import load_tensors
from distkit.checkpoint.verify import verify
from distkit.commands.tools.list import size_of
from distkit.commands.tools.locate import find_checkpoint
from distkit.commands.tools.publish import check_place, index_of, published, shard_names
from distkit.errors import ConfigError

#: Components of a name that wrappers have put there (DDP, torch.compile).
WRAPPERS = ("module", "_orig_mod")
Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: Mapping[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: Tensors that are read together; a larger one is read alone.
BATCH_BYTES = 2**26
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?([a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One tensor of the export: `name` in the file, `source` in the checkpoint, and its form in the file."""

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def header(self, start: int) -> dict[str, object]:
        """Its entry in a safetensors header, when its bytes begin at `start`."""
        return {"dtype": DTYPES[self.dtype][0], "shape": self.shape, "data_offsets": [start, start + self.nbytes]}


def parse_size(text: str) -> int:
    """Bytes: 5GB is 5 * 10^9, 5GiB is 5 * 2^30, a number alone is bytes.

    Raises:
        ConfigError: it is no size, or 0.
    """
    found = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise ConfigError("--max-shard-size is the most bytes of a file", expected="a number and B, KB, MB, GB or TB",
                          got=text, fix="--max-shard-size 5GB")  # fmt: skip
    return size


def export(
    path: Path,
    out: Path,
    *,
    ema: bool = False,
    max_shard_bytes: int | None = None,
    precision: Precision | None = None,
    overwrite: bool = False,
) -> str:
    """Write the model's parameters and buffers to `out`, under names without `module.` and `_orig_mod.`.

    The checkpoint is verified first. A reader sees whole files: each is written beside its place, fsynced and renamed,
    the index last. At most one tensor, or BATCH_BYTES of smaller ones, is in memory.

    Args:
        path: a checkpoint, or a run: its newest one.
        out: NAME.safetensors.
        ema: the averaged tensors where there are any, the model's own elsewhere.
        max_shard_bytes: split into NAME-00001-of-0000N.safetensors of at most this size, and
            NAME.safetensors.index.json in the form of Hugging Face; a single larger tensor has a file of its own. What
            fits into one file becomes NAME.safetensors without an index. None: one file.
        precision: of floating-point tensors; None: as they were saved. Others stay as they are.
        overwrite: replace an export that is there; its other files are removed.

    Returns:
        A line that says what was written.

    Raises:
        ConfigError: no checkpoint, no average in it, a place that cannot be written, a value beyond `precision`.
        CheckpointError: the checkpoint is damaged, or a write failed: what was there before is unchanged then.
    """
    directory = find_checkpoint(path)
    check_place(out, overwrite=overwrite)
    manifest = verify(directory)
    items = choose(manifest, read_aliases(directory), ema=ema, precision=precision)
    shards = split(items, max_shard_bytes)
    names = [out.name] if len(shards) == 1 else shard_names(out, len(shards))
    metadata = {"format": "pt", "recipe": manifest.recipe, "step": str(manifest.step)}
    total = sum(item.nbytes for item in items)
    with published(out, [*names, *([index_of(out).name] if len(shards) > 1 else [])]) as files:
        for name, shard in zip(names, shards, strict=True):
            with files[name].open("xb") as file:
                write_shard(file, directory, manifest, shard, metadata)
        if len(shards) > 1:
            weight_map = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            with files[index_of(out).name].open("xb") as file:
                file.write(json.dumps(index, indent=2).encode() + b"\n")
                _sync(file)
        check_place(out, overwrite=overwrite)  # verifying and writing may have taken long
    what = f"{'averaged ' if ema else ''}weights of step {manifest.step}"
    where = out if len(shards) == 1 else f"{out.parent / names[0]} to {names[-1]}"
    return f"{where}: {what}, {len(items)} tensors, {size_of(total)}"


def canonical_name(name: str) -> str:
    """`module.net._orig_mod.fc.weight` -> `net.fc.weight`."""
    *path, last = name.split(".")
    return ".".join([*(part for part in path if part not in WRAPPERS), last])


def read_aliases(directory: Path) -> dict[str, str]:
    """Further names of tied tensors -> the ones that the checkpoint has; {} in older ones."""
    found = json.loads((directory / STATE).read_bytes()).get("aliases", {})
    return {canonical_name(alias): canonical_name(name) for alias, name in found.items()}


def choose(manifest: Manifest, aliases: Mapping[str, str], *, ema: bool, precision: Precision | None) -> list[Item]:
    """What is exported, by name; a tied tensor under each of its names.

    Raises:
        ConfigError: there is nothing, no average, or two tensors with one canonical name.
    """
    sources, averaged = _sources(manifest, "model/"), _sources(manifest, "ema/")
    if ema and not averaged:
        raise ConfigError("--ema: the checkpoint holds no averaged weights", expected="a run with --ema-decay",
                          fix="the same without --ema")  # fmt: skip
    if not sources:
        raise ConfigError("the checkpoint holds no weights", expected="tensors called model/NAME")
    items = []
    chosen = {**sources, **(averaged if ema else {})}
    chosen |= {alias: chosen[name] for alias, name in aliases.items() if name in chosen and alias not in chosen}
    for name, source in sorted(chosen.items()):
        entry = manifest.tensors[source]
        dtype = entry.dtype
        if precision is not None and cast(torch.dtype, getattr(torch, dtype)).is_floating_point:
            dtype = PRECISIONS[precision]
        items.append(Item(name, source, dtype, entry.shape, math.prod(entry.shape) * DTYPES[dtype][1]))
    return items


def _sources(manifest: Manifest, prefix: str) -> dict[str, str]:
    """Canonical name -> name in the checkpoint, of the tensors under `prefix`."""
    found: dict[str, str] = {}
    for source in sorted(name for name in manifest.tensors if name.startswith(prefix)):
        name = canonical_name(source.removeprefix(prefix))
        if name in found:
            raise ConfigError(f"two tensors would be called {name}", got=f"{found[name]} and {source}",
                              expected="names that differ in more than module. and _orig_mod.")  # fmt: skip
        found[name] = source
    return found


def split(items: Sequence[Item], max_shard_bytes: int | None) -> list[list[Item]]:
    """Items in their order, in as few files of at most `max_shard_bytes` as that order allows, headers included."""
    base = 1024  # length, metadata, padding
    shards: list[list[Item]] = [[]]
    room = 0 if max_shard_bytes is None else max_shard_bytes - base
    for item in items:
        needed = item.nbytes + len(json.dumps({item.name: item.header(10**15)}))
        if max_shard_bytes is not None and shards[-1] and needed > room:
            shards.append([])
            room = max_shard_bytes - base
        shards[-1].append(item)
        room -= needed
    return shards


def write_shard(
    file: BinaryIO, directory: Path, manifest: Manifest, items: Sequence[Item], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file: 8 bytes of length, the header, then tensor after tensor; and fsync it.

    Larger elements come first, so that each tensor is aligned.

    Raises:
        ConfigError: a value that is finite in the checkpoint is not in its new dtype.
    """
    items = sorted(items, key=lambda item: (-DTYPES[item.dtype][1], item.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for item in items:
        header[item.name] = item.header(start)
        start += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for batch in _batches(items, manifest):
        tensors = {item.source: _empty(item, manifest) for item in batch}
        load_tensors(directory, manifest, tensors)
        last = {item.source: item for item in batch}
        for item in batch:
            # popped, and never held: a converted tensor takes its place in memory
            take = tensors.pop if last[item.source] is item else tensors.__getitem__
            file.write(_as_bytes(_converted(item, take(item.source))))
        del tensors
    _sync(file)


def _batches(items: Sequence[Item], manifest: Manifest) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        nbytes = manifest.tensors[item.source].nbytes
        if batch and size + nbytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += nbytes
    if batch:
        yield batch


def _empty(item: Item, manifest: Manifest) -> Tensor:
    return torch.empty(item.shape, dtype=getattr(torch, manifest.tensors[item.source].dtype))


def _converted(item: Item, tensor: Tensor) -> Tensor:
    dtype = cast(torch.dtype, getattr(torch, item.dtype))
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    infinite = ~converted.isfinite()
    if infinite.any():
        lost = tensor[infinite].double()
        lost = lost[lost.isfinite()]  # those that were not finite before stay so
        if lost.numel():
            raise ConfigError(f"{item.name} has values that {item.dtype} cannot hold",
                              expected=f"at most {torch.finfo(dtype).max:g}", got=f"{lost.abs().max().item():g}",
                              fix="the same without --dtype")  # fmt: skip
    return converted


def _as_bytes(tensor: Tensor) -> memoryview:
    # numpy has no bfloat16: the same bytes as uint8
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
