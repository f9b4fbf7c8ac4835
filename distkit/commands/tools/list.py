"""What a run directory or a checkpoint contains, in lines: `distkit checkpoint list|show|verify`. No torch."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from distkit.checkpoint.format import Manifest, TensorEntry, step_name
from distkit.checkpoint.retention import last_evaluation, leftovers, list_checkpoints
from distkit.checkpoint.verify import open_checkpoint, read_manifest, read_state
from distkit.commands.tools.locate import find_checkpoint, find_folder, is_checkpoint
from distkit.errors import CheckpointError, ConfigError, printable
from distkit.json_files import is_number

#: The start of the name of a checkpoint that did not verify, and that a run has put aside.
SET_ASIDE = "damaged-"
#: The columns of the list.
HEAD = ("step", "created", "size", "world size", "strategy", "last evaluation")


def list_run(path: Path, *, as_json: bool = False) -> str:
    """The checkpoints of the run `path` (or RUN/checkpoints), one a line, by their manifests; nothing is hashed.

    Args:
        path: the directory.
        as_json: {"folder", "checkpoints": [{"step", "path", "newest", and "damaged" or what the manifest says}],
            "unfinished", "set_aside"} instead; values that are not finite become null.

    Raises:
        ConfigError: `path` is not a run directory.
    """
    folder = find_folder(path)
    rows = list(_rows(folder))
    aside = sorted(name for name in os.listdir(folder) if name.startswith(SET_ASIDE))
    if as_json:
        value = {"folder": str(folder), "checkpoints": rows, "unfinished": leftovers(folder), "set_aside": aside}
        return json.dumps(value, indent=2, allow_nan=False)
    lines = [f"{printable(str(folder))}: {len(rows) or 'no'} checkpoint{'s' * (len(rows) != 1)}"]
    if rows:
        lines += _table([HEAD, *map(_cells, rows)])
    if unfinished := leftovers(folder):
        lines.append(f"unfinished, removed when the run starts again: {printable(', '.join(unfinished))}")
    if aside:
        lines.append(f"set aside because they failed verification: {printable(', '.join(aside))}")
    return "\n".join(lines)


def _rows(folder: Path) -> Iterator[dict[str, object]]:
    """What is known about each checkpoint, ready for JSON, ascending."""
    steps = list_checkpoints(folder)
    for step in steps:
        directory = folder / step_name(step)
        row: dict[str, object] = {"step": step, "path": str(directory), "newest": step == steps[-1]}
        try:
            manifest = read_manifest(directory)
        except CheckpointError as error:
            if os.path.lexists(directory):  # else a run that goes on has just removed it
                yield row | {"damaged": str(error)}
            continue
        yield row | {
            "created": manifest.created,
            "bytes": manifest.nbytes(),
            "world_size": manifest.world_size,
            "strategy": manifest.strategy,
            "recipe": manifest.recipe,
            "evaluation": _evaluation(directory),
        }


def _evaluation(directory: Path) -> dict[str, object] | None:
    """The last evaluation before the save; None without one, and where state.json cannot be read."""
    try:
        last = last_evaluation(read_state(directory))
    except CheckpointError:
        return None
    return None if last is None else {name: value if is_number(value) else None for name, value in last.items()}


def _cells(row: Mapping[str, object]) -> tuple[str, ...]:
    newest = "  <- newest" if row["newest"] else ""
    if "damaged" in row:
        return (str(row["step"]), f"damaged: {row['damaged']}{newest}")
    seen, values = row["evaluation"], ""
    if isinstance(seen, Mapping):
        values = "  ".join(f"{name} {_number(value)}" for name, value in seen.items() if name != "step")
        values += "" if seen.get("step") == row["step"] else f"  (of step {_number(seen.get('step'))})"
    size = size_of(row["bytes"]) if isinstance(row["bytes"], int) else ""
    return (str(row["step"]), str(row["created"]), size, str(row["world_size"]), str(row["strategy"]), values + newest)


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float | int) else "not finite" if value is None else str(value)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their cells, all but the last; a row that is shorter than the first has a long last cell."""
    columns = len(rows[0])
    full = [row for row in rows if len(row) == columns]
    widths = [max(len(row[column]) for row in full) for column in range(columns - 1)]
    widths[0] = max(len(row[0]) for row in rows)
    return [
        "  "
        + printable("  ".join([cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)] + [row[-1]]))
        for row in rows
    ]


def show(path: Path, *, tensors: bool = False) -> str:
    """What the manifest of a checkpoint says, and its tensors by the first part of their names.

    Args:
        path: a checkpoint, or a run: its newest one.
        tensors: also each tensor with dtype, shape and shards.

    Raises:
        ConfigError: there is no checkpoint.
        CheckpointError: its manifest is damaged; the other files are not looked at.
    """
    directory = find_checkpoint(path)
    manifest = read_manifest(directory)
    facts = {
        "step": str(manifest.step),
        "recipe": manifest.recipe,
        "strategy": manifest.strategy,
        "world size": str(manifest.world_size),
        "created": manifest.created,
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "files": f"{len(manifest.files)}, {size_of(manifest.nbytes())}",
        "tensors": f"{len(manifest.tensors)}, {size_of(sum(e.nbytes for e in manifest.tensors.values()))}",
    }
    lines = [printable(str(directory)), *(f"  {name + ':':<12}{printable(fact)}" for name, fact in facts.items())]
    lines += _groups(manifest)
    if tensors:
        for name in sorted(manifest.tensors):
            lines += _tensor(name, manifest.tensors[name])
    return "\n".join(lines)


def _groups(manifest: Manifest) -> list[str]:
    counts, sizes = Counter[str](), Counter[str]()
    for name, entry in manifest.tensors.items():
        prefix = name.split("/")[0]
        counts[prefix] += 1
        sizes[prefix] += entry.nbytes
    return [
        f"    {printable(prefix):<12}{counts[prefix]:>6}  {size_of(sizes[prefix]):>14}" for prefix in sorted(counts)
    ]


def _tensor(name: str, entry: TensorEntry) -> Iterator[str]:
    places = [
        f"{shard.file} [{', '.join(f'{o}:{o + n}' for o, n in zip(shard.offsets, shard.shape, strict=True))}]"
        for shard in entry.shards
    ]
    start = f"{printable(name)}  {entry.dtype} {list(entry.shape)}"
    if len(entry.shards) == 1:
        yield f"{start}  {entry.shards[0].file}"
        return
    yield f"{start}  {len(entry.shards)} shards"
    yield from (f"    {place}" for place in places)


def check(path: Path, *, every: bool = False) -> tuple[str, bool]:
    """Verify a checkpoint, the newest one of a run, or `every` one of a run: a line for each.

    Returns:
        The lines, and whether all of them verify.

    Raises:
        ConfigError: there is no checkpoint, or `every` one of a single one is asked for.
    """
    directories = [find_checkpoint(path)]
    if every:
        if is_checkpoint(path):
            raise ConfigError(f"{path} is one checkpoint", expected="--all with the directory of a run",
                              fix=f"distkit checkpoint verify {path}")  # fmt: skip
        folder = directories[0].parent
        directories = [folder / step_name(step) for step in list_checkpoints(folder)]
    lines, sound = [], True
    for directory in directories:
        try:
            manifest = open_checkpoint(directory).manifest
            lines.append(f"{directory}: verified, {len(manifest.files)} files, {size_of(manifest.nbytes())}")
        except CheckpointError as error:
            if every and not os.path.lexists(directory):
                continue  # a run that goes on has just removed it
            lines.append(f"damaged: {error}")
            sound = False
    return "\n".join(lines), sound


def size_of(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes >= 2**20 else f"{nbytes:,} bytes"
