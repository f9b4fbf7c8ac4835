"""Which checkpoint a run continues from, and whether it fits. Nothing in the run is changed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

from torch import Tensor

from distkit.checkpoint.commit import describe
from distkit.checkpoint.format import MANIFEST, Manifest, step_name, step_of
from distkit.checkpoint.retention import list_checkpoints, put_aside
from distkit.checkpoint.verify import VerifiedCheckpoint, open_checkpoint
from distkit.errors import CheckpointError, ConfigError, shorten
from distkit.runtime.process import Runtime
from distkit.tensors.spec import spec_of, spec_text


def open_verified(directory: Path, runtime: Runtime) -> VerifiedCheckpoint:
    """Verify `directory`, each rank a share of the files.

    Raises:
        CheckpointError: on every rank alike, naming the first thing that is wrong.
    """
    error, found = None, None
    try:
        found = open_checkpoint(directory, runtime.rank, runtime.world_size)
    except (CheckpointError, OSError) as failure:
        error = str(failure) if isinstance(failure, CheckpointError) else f"{directory}: {describe(failure)}"
    first = next((answer for answer in runtime.gather(error) if answer is not None), None)
    if first is not None:
        raise error_on_all_ranks(first)
    assert found is not None  # some rank has an error otherwise
    return found


def newest_verified(folder: Path, runtime: Runtime, warn: Callable[[str], None]) -> VerifiedCheckpoint | None:
    """The newest checkpoint in `folder` that verifies; None where there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and none verifies: starting over would lose them silently.
    """
    steps = runtime.broadcast(list_checkpoints(folder))
    last = ""
    for step in reversed(steps):
        try:
            found = open_verified(folder / step_name(step), runtime)
        except CheckpointError as error:
            last = str(error)
            warn(f"checkpoint of step {step} failed verification and is skipped: {last}")
            continue
        return found
    if not steps:
        return None
    raise error_on_all_ranks(
        f"none of the {len(steps)} checkpoints in {folder} verifies; the oldest: {last}\n"
        f"  to start over, leave them where they are and use --run-dir OTHER"
    )


def error_on_all_ranks(message: str) -> CheckpointError:
    """An error that every rank raises alike."""
    error = CheckpointError(message)
    error.on_all_ranks = True
    return error


def set_aside(folder: Path, step: int) -> list[str]:
    """Rename checkpoints newer than `step`, which failed verification; returns the new names."""
    return [put_aside(folder, newer) for newer in list_checkpoints(folder) if newer > step]


def resolve_source(source: str) -> tuple[Path, bool]:
    """`--resume DIR`: the folder of checkpoints, False; or one checkpoint, True.

    Raises:
        ConfigError: it is neither a checkpoint nor a run.
    """
    path = Path(source)
    try:
        path.stat()
    except PermissionError as error:
        raise ConfigError(f"--resume {source} cannot be looked at", expected="a directory that you may read",
                          got=error.strerror, fix=f"chmod u+rx {path.parent}") from error  # fmt: skip
    except OSError:
        pass  # nothing there, as is said below
    if step_of(path.name) is not None or (path / MANIFEST).exists():
        if not path.is_dir():
            raise ConfigError(f"--resume {source} is not a checkpoint", expected="a directory with MANIFEST.json",
                              fix=_suggestion(path.parent))  # fmt: skip
        return path, True
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder):
            return folder, False
    got = "a directory without" if path.is_dir() else "no directory" if path.exists() else "nothing there"
    raise ConfigError(f"--resume {source} holds no checkpoint", expected="a checkpoint, or the directory of a run",
                      got=got, fix="--resume runs/RECIPE/RUN")  # fmt: skip


def _suggestion(folder: Path) -> str:
    steps = list_checkpoints(folder)
    return f"--resume {folder / step_name(steps[-1])}" if steps else "--resume runs/RECIPE/RUN"


def differences(
    manifest: Manifest, expected: Mapping[str, Tensor], prefixes: Sequence[str], ignored: Set[str] = frozenset()
) -> list[str]:
    """How the tensors under `prefixes` differ from `expected` in name, shape or dtype, in lines; [] if they fit."""
    expected = {name: tensor for name, tensor in expected.items() if name not in ignored}
    saved = {
        name: entry
        for name, entry in manifest.tensors.items()
        if name.startswith(tuple(prefixes)) and name not in ignored
    }
    lines = []
    if missing := sorted(expected.keys() - saved.keys()):
        lines.append(f"missing in the checkpoint: {shorten(missing)}")
    if unexpected := sorted(saved.keys() - expected.keys()):
        lines.append(f"unexpected in the checkpoint: {shorten(unexpected)}")
    odd = [
        f"{name} is {spec_text(saved[name].spec)}, here {spec_text(spec_of(tensor))}"
        for name, tensor in sorted(expected.items())
        if name in saved and saved[name].spec != spec_of(tensor)
    ]
    if odd:
        lines.append(f"mismatched: {shorten(odd)}")
    return lines
