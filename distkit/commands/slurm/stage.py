"""A data set on a node's own disk: copied once, by whichever job of the node comes first, and whole or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from distkit.errors import ConfigError
from distkit.files import TEMPORARY, locked

#: Read in whole for the copy's name: manifests and indexes. Of larger files, size and time of change count.
SMALL_BYTES = 2**20


def copy_name(source: Path) -> str:
    """NAME-DIGEST: another content, as far as names, sizes, times and small files tell, has another name.

    Raises:
        ConfigError: it is no folder, or cannot be read.
    """
    if not source.is_dir():
        raise ConfigError(f"--stage {source} is no folder", expected="the folder of a data set",
                          fix="distkit data pack FOLDER OUT makes one")  # fmt: skip
    digest = hashlib.sha256()
    for file in _files(source):
        stat = file.stat()
        what = file.read_bytes() if stat.st_size <= SMALL_BYTES else f"{stat.st_size} {stat.st_mtime_ns}".encode()
        digest.update(f"{file.relative_to(source)} {len(what)}\n".encode() + what)
    return f"{source.resolve().name}-{digest.hexdigest()[:16]}"


def stage(source: Path, target: Path) -> str:
    """Copy `source` to `target` unless it is there; says what was done.

    Raises:
        ConfigError: `target` cannot be written, or there is too little space.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(target.with_name(f"{target.name}.lock")):
            if target.is_dir():
                return f"{target} is there already, on {os.uname().nodename}"
            return _copy(source, target)
    except OSError as error:
        raise ConfigError(f"cannot copy {source} to {target} on {os.uname().nodename}",
                          expected="a folder on the node's own disk, with space", got=error,
                          fix='scratch = "…" in slurm/site.toml, or leave --stage out') from error  # fmt: skip


def _copy(source: Path, target: Path) -> str:
    size, free = sum(file.stat().st_size for file in _files(source)), shutil.disk_usage(target.parent).free
    if size > free:
        raise OSError(f"{size / 1e9:.1f} GB of data, {free / 1e9:.1f} GB free")
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a job that was killed; nobody else has the lock
    try:
        shutil.copytree(source, temporary)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"{source} copied to {target} on {os.uname().nodename}: {size / 1e9:.3f} GB"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
