"""What two checkpoints have in common, to the bit, and what one has learned: `distkit checkpoint diff|digest`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from distkit.checkpoint.digest import StateDigest
from distkit.checkpoint.format import STATE, Manifest
from distkit.checkpoint.read import iterate
from distkit.checkpoint.verify import read_manifest, read_state, verify
from distkit.commands.tools.compare import compare
from distkit.commands.tools.locate import find_checkpoint
from distkit.errors import printable
from distkit.tensors.spec import spec_text

#: Parts of state.json that are not state: how a run was configured, named and timed. Equal runs differ in them.
ASIDE = ("config.", "parts.clock.", "parts.observers.")
#: Characters of a value in a line.
SHOWN = 60

Side = tuple[Path, Manifest]


@dataclass(frozen=True)
class Diff:
    """How two checkpoints differ.

    Attributes:
        tensors: a line for each name, form or value that differs; empty when all tensors are equal to the bit.
        values: a line for each value of state.json that differs, as far as it is state.
        notes: lines for the rest of state.json.
    """

    tensors: tuple[str, ...]
    values: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """True when a run would continue from both in the same way."""
        return not self.tensors and not self.values


def diff(first: Path, second: Path, *, limit: int = 10) -> Diff:
    """Compare two checkpoints (or the newest of two runs): all tensors, random generators included, and state.json.

    Neither is verified beforehand, so that equal ones are read once.

    Args:
        first, second: the checkpoints.
        limit: lines of each kind, >= 1.

    Raises:
        ConfigError: one is not a checkpoint.
        CheckpointError: one cannot be read, or they differ because one is damaged.
    """
    directories = find_checkpoint(first), find_checkpoint(second)
    tensors = differing_tensors(*directories, limit=limit)
    values, notes = _differing_values(*(read_state(directory) for directory in directories))
    if tensors or values or notes:
        for directory in dict.fromkeys(directories):
            verify(directory)  # a flipped bit is not a difference between two runs
    return Diff(tuple(tensors), tuple(first_lines(values, limit)), tuple(first_lines(notes, limit)))


def _differing_values(first: Mapping[str, object], second: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """A line for each value that differs between two state.json: of the state, and of what is set aside."""
    one, other = dict(leaves(first)), dict(leaves(second))
    values: list[str] = []
    notes: list[str] = []
    for name in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(name, "missing"), other.get(name, "missing")
        if mine != theirs:
            lines = notes if f"{name}.".startswith(ASIDE) else values
            lines.append(printable(f"{STATE}: {name}: {mine:.{SHOWN}} and {theirs:.{SHOWN}}"))
    return values, notes


def differing_tensors(first: Path, second: Path, limit: int = 10) -> list[str]:
    """Lines that say which tensors two checkpoints do not have in common, to the bit; [] when there are none.

    First the names that only one has, then shapes and dtypes that differ, then values: `limit` lines of each, in the
    order of the names. One pair of tensors is in memory at a time.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    one, other = (first, read_manifest(first)), (second, read_manifest(second))
    entries = one[1].tensors, other[1].tensors
    lines: list[str] = []
    for directory, here, there in ((first, *entries), (second, *entries[::-1])):
        alone = sorted(here.keys() - there.keys())
        lines += first_lines(
            [printable(f"only in {directory}: {name} {spec_text(here[name].spec)}") for name in alone], limit
        )
    forms = {name: tuple(spec_text(side[name].spec) for side in entries) for name in entries[0].keys() & entries[1]}
    odd = [name for name in sorted(forms) if forms[name][0] != forms[name][1]]
    lines += first_lines([printable(f"{name}: {' and '.join(forms[name])}") for name in odd], limit)
    different = []
    for name, mine, theirs in _pairs(one, other, sorted(forms.keys() - set(odd))):
        found = compare(name, mine, theirs)
        del mine, theirs  # before the next pair is read
        if found is not None:
            different.append(printable(str(found)))
    return lines + first_lines(different, limit)


def _pairs(first: Side, second: Side, names: Iterable[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The tensors of both called `names`, which ascend."""
    one, other = iterate(*first), iterate(*second)
    for name in names:
        yield name, _advance(one, name), _advance(other, name)


def _advance(tensors: Iterator[tuple[str, Tensor]], name: str) -> Tensor:
    """The tensor called `name`, which has not been reached yet."""
    for found, tensor in tensors:
        if found == name:
            return tensor
        del tensor  # before the next one is read
    raise KeyError(name)


def leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """`parts.progress.step` and the JSON text of its value, for every value in `value` that holds no others."""
    inner: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    empty = True
    for name, part in inner:
        empty = False
        yield from leaves(part, f"{path}.{name}" if path else str(name))
    if empty:
        yield path, json.dumps(value)


def first_lines(lines: Iterable[str], limit: int) -> list[str]:
    """The first `limit` lines, and how many follow."""
    lines = list(lines)
    return [*lines[:limit], *([f"... and {len(lines) - limit:,} more"] if len(lines) > limit else [])]


def digest(path: Path) -> str:
    """`state_digest` of a checkpoint's model and optimizer tensors, after it was verified; one in memory at a time.

    It is the digest in the run's summary.json, but for optimizers that keep Python numbers or sparse tensors: a
    checkpoint has those in state.json and as parts, and this digest covers its tensors only.

    Raises:
        ConfigError: `path` is not a checkpoint.
        CheckpointError: it does not verify.
    """
    directory = find_checkpoint(path)
    manifest = verify(directory)
    found = StateDigest()
    for prefix in ("model/", "optimizer/"):
        for name, tensor in iterate(directory, manifest, prefix):
            found.update(name, tensor)
            del tensor  # before the next one is read
    return found.hexdigest()
