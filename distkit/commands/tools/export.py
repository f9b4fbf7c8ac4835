"""The weights of a checkpoint as safetensors files that other programs load: `distkit checkpoint export`."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import torch
from torch import Tensor

from distkit.checkpoint.format import MANIFEST, STATE, Manifest, spec_bytes
from distkit.checkpoint.read import load_tensors
from distkit.checkpoint.shard_file import Header, write_tensors
from distkit.checkpoint.verify import read_state, verify
from distkit.commands.tools.list import size_of
from distkit.commands.tools.locate import find_checkpoint
from distkit.errors import CheckpointError, ConfigError
from distkit.files import atomic_files
from distkit.json_files import JsonError, a_text, mapping_of, record
from distkit.tensors.spec import TensorSpec, torch_dtype

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
#: Parts of a name that wrappers have put there (DDP, torch.compile).
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
    """One tensor of the export: `name` and `spec` in the file, `source` in the checkpoint."""

    name: str
    source: str
    spec: TensorSpec

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return spec_bytes(self.spec)


def parse_size(text: str) -> int:
    """Bytes: 5GB is 5 * 10^9, 5GiB is 5 * 2^30, a number alone is bytes.

    Raises:
        ConfigError: it is not a size, or is 0.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ConfigError("--max-shard-size is the largest size of a file", expected="a number and B, KB, MB, GB or TB",
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

    The checkpoint is verified first. A reader sees whole files only, and the index last. At most one tensor, or
    BATCH_BYTES of smaller ones, is in memory.

    Args:
        path: a checkpoint, or a run: its newest one.
        out: NAME.safetensors.
        ema: the averaged tensors where there are any, the model's own elsewhere.
        max_shard_bytes: split into NAME-00001-of-0000N.safetensors of at most this size, with
            NAME.safetensors.index.json as Hugging Face writes it; a larger single tensor gets a file to itself. If one
            file is enough, it is NAME.safetensors without an index. None: one file.
        precision: of floating-point tensors; None: as saved. Others stay as they are.
        overwrite: replace an earlier export, and remove those of its files that are not replaced.

    Returns:
        A line that says what was written.

    Raises:
        ConfigError: no checkpoint, no average in it, an `out` that cannot be written, a value beyond `precision`.
        CheckpointError: the checkpoint is damaged, or a write failed: an earlier export is unchanged then.
    """
    directory = find_checkpoint(path)
    check_out(out, overwrite=overwrite)
    manifest = verify(directory)
    items = choose(manifest, read_aliases(directory), ema=ema, precision=precision)
    shards = split(items, max_shard_bytes)
    names = [out.name] if len(shards) == 1 else shard_names(out, len(shards))
    metadata = {"format": "pt", "recipe": manifest.recipe, "step": str(manifest.step)}
    total = sum(item.nbytes for item in items)
    with published(out, [*names, *([index_of(out).name] if len(shards) > 1 else [])]) as files:
        for name, shard in zip(names, shards, strict=True):
            write_shard(files[name], directory, manifest, shard, metadata)
        if len(shards) > 1:
            weight_map = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            files[index_of(out).name].write(json.dumps(index, indent=2).encode() + b"\n")
        check_out(out, overwrite=overwrite)  # verifying and writing may have taken long
    what = f"{'averaged ' if ema else ''}weights of step {manifest.step}"
    where = out if len(shards) == 1 else f"{out.parent / names[0]} to {names[-1]}"
    return f"{where}: {what}, {len(items)} tensors, {size_of(total)}"


def canonical_name(name: str) -> str:
    """`module.net._orig_mod.fc.weight` -> `net.fc.weight`."""
    *path, last = name.split(".")
    return ".".join([*(part for part in path if part not in WRAPPERS), last])


def read_aliases(directory: Path) -> dict[str, str]:
    """Further names of tied tensors -> the ones that the checkpoint has; {} in older ones."""
    state = read_state(directory)
    try:
        record({}, may_have={"aliases": mapping_of(a_text)})(state)
    except JsonError as error:
        raise CheckpointError(f"{directory}: {error.of(STATE)}") from error
    aliases = cast(Mapping[str, str], state.get("aliases", {}))
    return {canonical_name(alias): canonical_name(name) for alias, name in aliases.items()}


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
        dtype, shape = manifest.tensors[source].spec
        if precision is not None and torch_dtype(dtype).is_floating_point:
            dtype = PRECISIONS[precision]
        items.append(Item(name, source, (dtype, shape)))
    return items


def _sources(manifest: Manifest, prefix: str) -> dict[str, str]:
    """Canonical name -> name in the checkpoint, of the tensors under `prefix`."""
    sources: dict[str, str] = {}
    for source in sorted(name for name in manifest.tensors if name.startswith(prefix)):
        name = canonical_name(source.removeprefix(prefix))
        if name in sources:
            raise ConfigError(f"two tensors would be called {name}", got=f"{sources[name]} and {source}",
                              expected="names that differ in more than module. and _orig_mod.")  # fmt: skip
        sources[name] = source
    return sources


def split(items: Sequence[Item], max_shard_bytes: int | None) -> list[list[Item]]:
    """Items in their order, in as few files of at most `max_shard_bytes` as that order allows, headers included."""
    reserved = 1024  # length, metadata, padding
    shards: list[list[Item]] = [[]]
    room = 0 if max_shard_bytes is None else max_shard_bytes - reserved
    for item in items:
        needed = item.nbytes + len(Header({item.name: item.spec}).data) + 32  # longer offsets
        if max_shard_bytes is not None and shards[-1] and needed > room:
            shards.append([])
            room = max_shard_bytes - reserved
        shards[-1].append(item)
        room -= needed
    return shards


def write_shard(
    file: BinaryIO, directory: Path, manifest: Manifest, items: Sequence[Item], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file.

    Raises:
        ConfigError: a value that is finite in the checkpoint is not in its new dtype.
    """
    by_name = {item.name: item for item in items}
    header = Header({item.name: item.spec for item in items}, metadata)
    write_tensors(file, header, _values(directory, manifest, [by_name[name] for name in header.spans]))


def _values(directory: Path, manifest: Manifest, items: Sequence[Item]) -> Iterator[Tensor]:
    for batch in _batches(items, manifest):
        tensors = {item.source: _empty(item, manifest) for item in batch}
        load_tensors(directory, manifest, tensors)
        last = {item.source: item for item in batch}
        for item in batch:
            # popped, and never held: a converted tensor takes its place in memory
            take = tensors.pop if last[item.source] is item else tensors.__getitem__
            yield _converted(item, take(item.source))
        del tensors


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
    dtype, shape = manifest.tensors[item.source].spec
    return torch.empty(shape, dtype=torch_dtype(dtype))


def _converted(item: Item, tensor: Tensor) -> Tensor:
    dtype = torch_dtype(item.spec[0])
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    infinite = ~converted.isfinite()
    if infinite.any():
        lost = tensor[infinite].double()
        lost = lost[lost.isfinite()]  # infinities of the checkpoint itself stay
        if lost.numel():
            raise ConfigError(f"{item.name} has values that {item.spec[0]} cannot hold",
                              expected=f"at most {torch.finfo(dtype).max:g}", got=f"{lost.abs().max().item():g}",
                              fix="the same without --dtype")  # fmt: skip
    return converted


def shard_names(out: Path, count: int) -> list[str]:
    """NAME-00001-of-0000N.safetensors and so on."""
    stem = out.name.removesuffix(SUFFIX)
    return [f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]


def index_of(out: Path) -> Path:
    """NAME.safetensors.index.json."""
    return out.with_name(out.name.removesuffix(SUFFIX) + INDEX_SUFFIX)


def _exported(out: Path) -> list[Path]:
    """The files of an earlier export to `out`: one, or shards and index."""
    stem = re.escape(out.name.removesuffix(SUFFIX))
    shard = re.compile(rf"{stem}-\d{{5,}}-of-\d{{5,}}{re.escape(SUFFIX)}")
    return sorted(p for p in out.parent.iterdir() if p in (out, index_of(out)) or shard.fullmatch(p.name))


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an `out` that cannot be exported to, before any work is done.

    Raises:
        ConfigError: no .safetensors, no writable directory, a checkpoint, or an export that exists already.
    """
    if not out.name.endswith(SUFFIX) or out.name == SUFFIX or out.is_dir():
        raise ConfigError(f"cannot export to {out}", expected="the name of a file that ends with .safetensors",
                          fix=f"{out / 'model' if out.is_dir() else out}{SUFFIX}")  # fmt: skip
    if not out.parent.is_dir():
        raise ConfigError(f"there is no directory {out.parent}", expected="a directory that exists",
                          fix=f"mkdir -p {out.parent}")  # fmt: skip
    if os.path.lexists(out.parent / MANIFEST):
        raise ConfigError(f"{out.parent} is a checkpoint: another file in it would be damage",
                          expected="another directory", fix=out.name)  # fmt: skip
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"cannot export to {out}", expected="a directory that you can write to", got=out.parent)
    existing = _exported(out)
    if existing and not overwrite:
        raise ConfigError(f"{existing[0]} exists", expected="a new name", fix="another name, or --overwrite")


@contextlib.contextmanager
def published(out: Path, names: Sequence[str]) -> Iterator[Mapping[str, BinaryIO]]:
    """Yield an open file for each of `names`; all get their names, in that order, when the block ends well.

    The files of an earlier export go when the new ones are on the disk, its index first: no index ever points to
    shards of another export.

    Raises:
        CheckpointError: an OSError in the block or afterwards; what was written so far is removed.
    """
    try:
        paths = [out.with_name(name) for name in names]
        with atomic_files(paths, before_rename=lambda: index_of(out).unlink(missing_ok=True)) as files:
            yield dict(zip(names, files, strict=True))
        for path in _exported(out):
            if path not in paths:
                path.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot export to {out}: {error.strerror or error}") from error
