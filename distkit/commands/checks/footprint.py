"""How large the checkpoints of a run will be: from a number of parameters, or from a checkpoint that exists."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import cast

from distkit.commands.checks.finding import Footprint
from distkit.commands.show import read_json
from distkit.errors import ConfigError
from distkit.json_files import a_count, an_object, known, optional

#: fp32 weights, and AdamW's two moments of each.
BYTES_PER_PARAMETER = 12
#: A checkpoint's folder, its manifest and its state.json.
SMALL_FILES = 3
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def footprint(
    run_dir: Path, params: int | None, checkpoint: Path | None, keep: int | None, world_size: int
) -> Footprint | None:
    """What the checkpoints in `run_dir` will take; None where nothing says how large the model is.

    Args:
        run_dir: its config.json says how many are kept, and its newest checkpoint how large one is.
        params: of the model; goes before what lies in `run_dir`.
        checkpoint: a checkpoint or another run to take the size from.
        keep: how many are kept at a time; None: see `run_dir`, else what the options' defaults say.
        world_size: ranks that write.

    Raises:
        ConfigError: there is no checkpoint at `checkpoint`.
        CheckpointError: its manifest is damaged.
    """
    from distkit.checkpoint.plan import FILES, MAX_FILE_BYTES
    from distkit.checkpoint.retention import list_checkpoints

    kept = _kept(run_dir) if keep is None else keep
    if params is not None:
        nbytes = params * BYTES_PER_PARAMETER
        files = SMALL_FILES + world_size * max(FILES, math.ceil(nbytes / world_size / MAX_FILE_BYTES))
        return Footprint(nbytes, files, kept, f"{BYTES_PER_PARAMETER} bytes per parameter: fp32 weights and AdamW")
    if checkpoint is None and not list_checkpoints(run_dir / "checkpoints"):
        return None
    return _as_large_as(run_dir if checkpoint is None else checkpoint, kept)


def _as_large_as(path: Path, kept: int | None) -> Footprint:
    from distkit.checkpoint.verify import read_manifest
    from distkit.commands.tools.locate import find_checkpoint

    found = find_checkpoint(path)
    manifest = read_manifest(found)
    return Footprint(manifest.nbytes(), len(manifest.files) + SMALL_FILES - 1, kept, f"as {found.name}")


def _kept(run_dir: Path) -> int | None:
    """Checkpoints that a run in `run_dir` keeps at a time, as its config.json says, else the options' defaults."""
    from distkit.config import CheckpointConfig

    default = CheckpointConfig()
    config = known(read_json(run_dir / "config.json") or {}, {"checkpoint": an_object})
    kinds = {"keep_last": optional(a_count), "keep_best": optional(a_count)}
    said = known(cast(dict[str, object], config.get("checkpoint", {})), kinds)
    last, best = (cast(int | None, said.get(name, getattr(default, name))) for name in kinds)
    return None if last is None else last + (best or 0)


def parse_params(text: str) -> int:
    """124M -> 124,000,000; also K, B and T, or the plain number.

    Raises:
        ConfigError: it is no such number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().upper())
    count = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if count < 1:
        raise ConfigError("--params is the number of the model's parameters", expected="a number, with K, M or B",
                          got=text, fix="--params 124M")  # fmt: skip
    return count
