"""Files that appear whole, under names that are free: where an export goes."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from distkit.checkpoint.format import MANIFEST
from distkit.errors import CheckpointError, ConfigError
from distkit.files import sync_folder

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"


def shard_names(out: Path, count: int) -> list[str]:
    """NAME-00001-of-0000N.safetensors and so on."""
    stem = out.name.removesuffix(SUFFIX)
    return [f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]


def index_of(out: Path) -> Path:
    """NAME.safetensors.index.json."""
    return out.with_name(out.name.removesuffix(SUFFIX) + INDEX_SUFFIX)


def _exported(out: Path) -> list[Path]:
    """The files of an export to `out` that are there: one, or shards and index."""
    stem = re.escape(out.name.removesuffix(SUFFIX))
    shard = re.compile(rf"{stem}-\d{{5,}}-of-\d{{5,}}{re.escape(SUFFIX)}")
    return sorted(p for p in out.parent.iterdir() if p in (out, index_of(out)) or shard.fullmatch(p.name))


def check_place(out: Path, *, overwrite: bool) -> None:
    """Refuse a place that cannot take an export to `out`, before any work is done.

    Raises:
        ConfigError: no .safetensors, no writable directory, a checkpoint, or an export that is there already.
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
        raise ConfigError(f"cannot export to {out}", expected="a directory where you may write", got=out.parent)
    there = _exported(out)
    if there and not overwrite:
        raise ConfigError(f"{there[0]} exists", expected="a name that is free", fix="another name, or --overwrite")


@contextlib.contextmanager
def published(out: Path, names: Sequence[str]) -> Iterator[Mapping[str, Path]]:
    """Give a path to write for each of `names`; all get their names in that order when the block ends well.

    The files of an export before go when the new ones are complete: an index first, so that none ever points to
    shards of another export.

    Raises:
        CheckpointError: an OSError in the block or afterwards; what was written so far is removed.
    """
    # the process: another export to the same place must not rename the half of this one
    partial = {name: out.with_name(f".tmp-{os.getpid()}-{name}") for name in names}
    try:
        yield partial
        index_of(out).unlink(missing_ok=True)
        for name, path in partial.items():
            os.replace(path, out.with_name(name))
        for path in _exported(out):
            if path.name not in partial:
                path.unlink()
        sync_folder(out.parent)
    except OSError as error:
        raise CheckpointError(f"cannot export to {out}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            for path in partial.values():
                path.unlink(missing_ok=True)
