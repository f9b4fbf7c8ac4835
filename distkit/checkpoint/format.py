"""What a checkpoint is on disk: safetensors shards, state.json and the manifest; renaming the directory commits them.

    step-000000500/
      MANIFEST.json                        every file with its size and sha256, every tensor with its shards
      state.json                           everything that is not a tensor
      shard-00000-of-00002-000.safetensors what rank 0 of 2 wrote, file 0

A save writes into a directory with a temporary name and renames it last. Checkpoints are listed by directory name; one
without a manifest is damaged. The manifest ends with a sha256 of itself. Nothing here is ever unpickled, and no name in
it may leave the directory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from distkit.errors import CheckpointError
from distkit.json_files import (
    MAX_NAME,
    JsonError,
    a_count,
    a_text,
    is_count,
    list_of,
    mapping_of,
    parse_object,
    record,
    refuse,
)

FORMAT = "distkit-checkpoint"
VERSION = 1
MANIFEST, STATE = "MANIFEST.json", "state.json"
#: Larger files are refused unread, and therefore never written; 256 MiB hold some 1,200,000 tensors.
MAX_MANIFEST_BYTES = 256 * 2**20
MAX_STATE_BYTES = 2**30
#: Ranks that a name of a shard has digits for.
MAX_WORLD_SIZE = 99_999
#: torch has no tensors of more dims.
MAX_DIMS = 64

#: torch's dtype name -> (name in a safetensors header, bytes an element).
DTYPES = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "int64": ("I64", 8), "int32": ("I32", 4),
    "int16": ("I16", 2), "int8": ("I8", 1), "uint64": ("U64", 8), "uint32": ("U32", 4), "uint16": ("U16", 2),
    "uint8": ("U8", 1), "bool": ("BOOL", 1), "complex64": ("C64", 8),
}  # fmt: skip
_SHARD_NAME = re.compile(r"shard-[0-9]{5}-of-[0-9]{5}-[0-9]{3}\.safetensors")
_STEP_NAME = re.compile(r"step-([0-9]{9,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def spec_bytes(spec: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of a tensor of this dtype (torch's name) and shape."""
    return math.prod(spec[1]) * DTYPES[spec[0]][1]


def step_name(step: int) -> str:
    """500 -> step-000000500."""
    return f"step-{step:09d}"


def step_of(name: str) -> int | None:
    """step-000000500 -> 500; None for any other name."""
    found = _STEP_NAME.fullmatch(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def shard_name(rank: int, world_size: int, index: int) -> str:
    """The name of file `index` of those that `rank` writes."""
    return f"shard-{rank:05d}-of-{world_size:05d}-{index:03d}.safetensors"


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A box of a tensor: where it begins (`offsets`), how large it is (`shape`), and its `key` in `file`."""

    file: str
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor: torch's dtype name without `torch.`, its shape, and the shards that tile it."""

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]

    @property
    def spec(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape."""
        return self.dtype, self.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return spec_bytes(self.spec)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What rank 0 checked before it committed.

    Attributes:
        step: finished steps.
        recipe, strategy, world_size: what wrote it.
        created: ISO 8601, UTC.
        versions: of distkit and torch.
        files: every file of the checkpoint but the manifest itself.
        tensors: by their names in the run's state, such as `model/fc.weight`.
    """

    step: int
    recipe: str
    strategy: str
    world_size: int
    created: str
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.bytes for entry in self.files.values())


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of MANIFEST.json."""
    value: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "recipe": manifest.recipe,
        "strategy": manifest.strategy,
        "world_size": manifest.world_size,
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "files": {name: {"bytes": e.bytes, "sha256": e.sha256} for name, e in manifest.files.items()},
        "tensors": {
            name: {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "shards": [{"file": s.file, "key": s.key, "offsets": s.offsets, "shape": s.shape}
                           for s in entry.shards],
            }
            for name, entry in manifest.tensors.items()
        },
    }  # fmt: skip
    return json.dumps({**value, "digest": _digest(value)}, sort_keys=True).encode() + b"\n"


def _digest(value: Mapping[str, object]) -> str:
    """sha256 over the JSON without the digest: keys sorted, no spaces."""
    text = json.dumps({k: v for k, v in value.items() if k != "digest"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def parse_manifest(data: bytes) -> Manifest:
    """Read MANIFEST.json without trusting anything in it.

    Raises:
        CheckpointError: broken JSON, a digest that does not fit, a newer version, a file name that is not one of ours,
            shards that do not tile their tensor.
    """
    try:
        value = parse_object(data)
    except JsonError as error:
        raise CheckpointError(error.of(MANIFEST)) from error
    if value.get("format") != FORMAT:
        raise CheckpointError(f"{MANIFEST} is not the manifest of a distkit checkpoint")
    version = value.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        reason = "written by a newer distkit: update this one" if newer else "unknown"
        raise CheckpointError(f"{MANIFEST} has format version {version!a:.80}, this distkit reads {VERSION} ({reason})")
    if value.get("digest") != _digest(value):
        raise CheckpointError(f"{MANIFEST} does not match the digest in it: it was changed after it was written")
    try:
        manifest = _manifest(value)
    except JsonError as error:
        raise CheckpointError(f"{MANIFEST} is malformed: {error}") from error
    if dump_manifest(manifest) != data:
        raise CheckpointError(f"{MANIFEST} is not in canonical form: it was changed after it was written")
    for name, entry in manifest.tensors.items():
        _check_tensor(name, entry, manifest.files)
    return manifest


def _sha256(value: object) -> None:
    if not (isinstance(value, str) and _SHA256.fullmatch(value)):
        refuse(value, "a sha256")


#: Characters of a recipe's name, a version, a time.
MAX_WORD = 256


def _file_name(value: object) -> None:
    if not (isinstance(value, str) and (value == STATE or _SHARD_NAME.fullmatch(value))):
        refuse(value, "a file name of ours")


def _dtype(value: object) -> None:
    if not (isinstance(value, str) and value in DTYPES):
        refuse(value, "a dtype")


def _counts(value: object) -> None:
    if not isinstance(value, list) or len(value) > MAX_DIMS or not all(map(is_count, value)):
        refuse(value, "a list of counts")


def _a_word(value: object) -> None:
    """A short text, which commands print."""
    a_text(value)
    if len(cast(str, value)) > MAX_WORD:
        refuse(value, f"at most {MAX_WORD} characters")


def _a_key(value: object) -> None:
    """The name of a tensor in a shard."""
    a_text(value)
    if len(cast(str, value)) > MAX_NAME:
        refuse(value, f"at most {MAX_NAME} characters")


#: What a manifest must hold, besides names that are checked below.
_KIND = record(
    {
        "step": a_count, "recipe": _a_word, "strategy": _a_word, "world_size": a_count, "created": _a_word,
        "versions": mapping_of(_a_word),
        "files": mapping_of(record({"bytes": a_count, "sha256": _sha256})),
        "tensors": mapping_of(record({
            "dtype": _dtype, "shape": _counts,
            "shards": list_of(record({"file": _file_name, "key": _a_key, "offsets": _counts, "shape": _counts})),
        })),
    }
)  # fmt: skip


def _manifest(value: Mapping[str, object]) -> Manifest:
    """The manifest of a JSON object.

    Raises:
        JsonError: a value is missing, or is not what it should be.
    """
    _KIND(value)
    # the types are known now
    files = cast(Mapping[str, Mapping[str, int | str]], value["files"])
    tensors = cast(Mapping[str, Mapping[str, object]], value["tensors"])
    world_size = cast(int, value["world_size"])
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise JsonError(f"world_size: {world_size} is not a number of ranks")
    if STATE not in files:
        raise JsonError(f"files has no {STATE}")
    for name in files:
        _file_name(name)
        if name != STATE and f"-of-{world_size:05d}-" not in name:
            raise JsonError(f"{name} on {world_size} ranks")
    for name in tensors:
        if not name.isprintable():
            raise JsonError(f"tensor name {name[:100]!a} cannot be printed")
    return Manifest(
        step=cast(int, value["step"]),
        recipe=cast(str, value["recipe"]),
        strategy=cast(str, value["strategy"]),
        world_size=world_size,
        created=cast(str, value["created"]),
        versions=cast(Mapping[str, str], value["versions"]),
        files={n: FileEntry(cast(int, e["bytes"]), cast(str, e["sha256"])) for n, e in files.items()},
        tensors={name: _tensor(entry) for name, entry in tensors.items()},
    )


def _tensor(value: Mapping[str, object]) -> TensorEntry:
    shards = tuple(
        Shard(cast(str, s["file"]), cast(str, s["key"]), tuple(s["offsets"]), tuple(s["shape"]))
        for s in cast(list[dict[str, list[int]]], value["shards"])
    )
    return TensorEntry(cast(str, value["dtype"]), tuple(cast(list[int], value["shape"])), shards)


def _check_tensor(name: str, entry: TensorEntry, files: Mapping[str, FileEntry]) -> None:
    """Check that shards are inside the tensor, do not overlap, and together fill it."""
    # torch can make no such tensor, even an empty one
    if math.prod(max(size, 1) for size in entry.shape) >= 2**59:
        raise CheckpointError(f"{MANIFEST}: tensor {name} of shape {list(entry.shape)} is too large")
    for shard in entry.shards:
        if shard.file not in files or shard.file == STATE:
            raise CheckpointError(f"{MANIFEST}: tensor {name} is in {shard.file}, which is not listed")
        box = list(zip(shard.offsets, shard.shape, entry.shape, strict=False))
        inside = all(offset + size <= whole for offset, size, whole in box)
        if not (len(shard.offsets) == len(shard.shape) == len(entry.shape)) or not inside:
            raise CheckpointError(f"{MANIFEST}: a shard of tensor {name} is not inside it")
    if not _tile(entry):
        raise CheckpointError(f"{MANIFEST}: the shards of tensor {name} do not fill it exactly once")


def _tile(entry: TensorEntry) -> bool:
    """True when every element is in one shard, in time linear in the number of shards.

    A box is a product of intervals, and an interval [a, b) is the step at a minus the step at b. Products of steps are
    linearly independent functions, so the boxes add up to the whole exactly when their polynomials do, with a variable
    for each place in each dim; and two different polynomials of degree d agree at random values modulo a prime p with a
    probability of at most d / p (Schwartz, Zippel), 2^-121 here. Nobody who writes a manifest knows the values.
    """
    steps: list[defaultdict[int, int]] = [defaultdict(_random_residue) for _ in entry.shape]

    def polynomial(offsets: tuple[int, ...], shape: tuple[int, ...]) -> int:
        value = 1
        for step, begin, size in zip(steps, offsets, shape, strict=True):
            value = value * (step[begin] - step[begin + size]) % _PRIME
        return value

    whole = polynomial((0,) * len(entry.shape), entry.shape)
    return sum(polynomial(shard.offsets, shard.shape) for shard in entry.shards) % _PRIME == whole % _PRIME


_PRIME = 2**127 - 1


def _random_residue() -> int:
    return secrets.randbelow(_PRIME)
