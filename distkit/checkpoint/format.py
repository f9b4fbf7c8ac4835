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
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from distkit.errors import CheckpointError

FORMAT = "distkit-checkpoint"
VERSION = 1
MANIFEST, STATE = "MANIFEST.json", "state.json"
#: Larger files are refused unread, and therefore never written; 256 MiB hold some 1,200,000 tensors.
MAX_MANIFEST_BYTES = 256 * 2**20
MAX_STATE_BYTES = 2**30

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
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise CheckpointError(f"{MANIFEST} is not the manifest of a distkit checkpoint")
    version = value.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        reason = "written by a newer distkit: update this one" if newer else "unknown"
        raise CheckpointError(f"{MANIFEST} has format version {version!r}, this distkit reads {VERSION} ({reason})")
    if value.get("digest") != _digest(value):
        raise CheckpointError(f"{MANIFEST} does not match the digest in it: it was changed after it was written")
    try:
        manifest = _manifest(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is malformed: {type(error).__name__} {error}") from error
    if dump_manifest(manifest) != data:
        raise CheckpointError(f"{MANIFEST} is not in canonical form: it was changed after it was written")
    for name, entry in manifest.tensors.items():
        _check_tensor(name, entry, manifest.files)
    return manifest


def _manifest(value: Mapping[str, object]) -> Manifest:
    files = {_file_name(k): _file(v) for k, v in cast(dict[str, dict[str, object]], value["files"]).items()}
    if STATE not in files:
        raise ValueError(f"no {STATE}")
    tensors = cast(dict[str, dict[str, object]], value["tensors"])
    world_size = _count(value["world_size"])
    for name in files.keys() - {STATE}:
        if f"-of-{world_size:05d}-" not in name:
            raise ValueError(f"{name} on {world_size} ranks")
    return Manifest(
        step=_count(value["step"]),
        recipe=_text(value["recipe"]),
        strategy=_text(value["strategy"]),
        world_size=world_size,
        created=_text(value["created"]),
        versions={_text(k): _text(v) for k, v in cast(dict[str, str], value["versions"]).items()},
        files=files,
        tensors={_tensor_name(name): _tensor(entry) for name, entry in tensors.items()},
    )


def _file(value: Mapping[str, object]) -> FileEntry:
    sha256 = _text(value["sha256"])
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"sha256 {sha256!r}")
    return FileEntry(_count(value["bytes"]), sha256)


def _tensor(value: Mapping[str, object]) -> TensorEntry:
    shards = tuple(
        Shard(_file_name(s["file"]), _text(s["key"]), _counts(s["offsets"]), _counts(s["shape"]))
        for s in cast(list[dict[str, object]], value["shards"])
    )
    dtype = _text(value["dtype"])
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}")
    return TensorEntry(dtype, _counts(value["shape"]), shards)


def _file_name(value: object) -> str:
    name = _text(value)
    if name != STATE and not _SHARD_NAME.fullmatch(name):
        raise ValueError(f"file name {name[:100]!r}")
    return name


def _tensor_name(name: str) -> str:
    if not name.isprintable():
        raise ValueError(f"tensor name {name[:100]!a}")
    return name


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} where a string belongs")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise TypeError(f"{value!r:.100} where a count belongs")
    return value


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 64:
        raise TypeError(f"{value!r:.100} where a list of counts belongs")
    return tuple(map(_count, value))


def _check_tensor(name: str, entry: TensorEntry, files: Mapping[str, FileEntry]) -> None:
    """Check that shards are inside the tensor, do not overlap, and together fill it."""
    total = 0
    for shard in entry.shards:
        if shard.file not in files or shard.file == STATE:
            raise CheckpointError(f"{MANIFEST}: tensor {name} is in {shard.file}, which is not listed")
        box = list(zip(shard.offsets, shard.shape, entry.shape, strict=False))
        inside = all(offset + size <= whole for offset, size, whole in box)
        if not (len(shard.offsets) == len(shard.shape) == len(entry.shape)) or not inside:
            raise CheckpointError(f"{MANIFEST}: a shard of tensor {name} is not inside it")
        total += math.prod(shard.shape)
    if total != math.prod(entry.shape) or _overlap(entry.shards):
        raise CheckpointError(f"{MANIFEST}: the shards of tensor {name} do not fill it exactly once")


def _overlap(shards: tuple[Shard, ...]) -> bool:
    """True when two boxes share an element.

    A sweep along the dim in which most boxes begin at different places: a box is compared with those that begin before
    it ends.
    """
    boxes = [shard for shard in shards if math.prod(shard.shape)]
    if len(boxes) < 2 or not boxes[0].shape:
        return len(boxes) > 1
    dim = max(range(len(boxes[0].shape)), key=lambda d: len({box.offsets[d] for box in boxes}))
    boxes.sort(key=lambda box: box.offsets[dim])
    for position, first in enumerate(boxes):
        for second in itertools.islice(boxes, position + 1, None):
            if second.offsets[dim] >= first.offsets[dim] + first.shape[dim]:
                break
            sides = zip(first.offsets, first.shape, second.offsets, second.shape, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in sides):
                return True
    return False
