"""The commit (C4): every rank writes and votes, rank 0 checks the votes and makes the directory a checkpoint.

Nothing here touches the device. It may run behind the next steps in a thread of its own: all collectives are on a group
that only saving uses, and every rank does them in the same order, also after an exception, which is a vote.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from distkit.checkpoint import retention
from distkit.checkpoint.format import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_STATE_BYTES,
    STATE,
    FileEntry,
    Manifest,
    dump_manifest,
    step_name,
)
from distkit.checkpoint.plan import Layout
from distkit.checkpoint.saved_state import check_state, parse_state
from distkit.checkpoint.write import write_file
from distkit.errors import CheckpointError, NonFiniteError
from distkit.files import sync_folder, write_bytes
from distkit.json_files import JsonError
from distkit.runtime.faults import fault
from distkit.runtime.process import Runtime
from distkit.version import __version__

#: What lies after the votes; the other ranks pass these points, too, so that a test can kill them there.
LATE_POINTS = ("before_manifest", "after_manifest", "before_rename", "after_rename", "in_retention")
#: Gives the bytes of a file that this rank writes; called when its turn comes.
Contents = Callable[[], memoryview]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One checkpoint to be written.

    Args:
        step: finished steps.
        recipe, strategy: for the manifest.
        layout: what every rank writes.
        files: what this rank writes, by name.
        state: what rank 0 writes as state.json, with what each rank alone knows under "ranks".
        own_state: what this rank alone knows.
        threads: files that this rank writes at once.
        clean: removes old checkpoints after the commit; called on rank 0.
        replaces: the run has a checkpoint of this step, saved before the evaluation of the step was complete.
        error: why this rank has nothing to write, if it could not even copy its state.
        staging_seconds: what copying it took.
    """

    step: int
    recipe: str
    strategy: str
    layout: Layout
    files: Mapping[str, Contents]
    state: Mapping[str, object]
    own_state: Mapping[str, object]
    threads: int
    clean: Callable[[], None]
    replaces: bool = False
    error: str | None = None
    staging_seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank.

    Attributes:
        error: None, or why it failed, with the rank.
        nbytes, seconds: what all ranks wrote, and how long that took.
        warning: what went wrong after the checkpoint stood: its parent was not synced, old ones were not removed.
        lost: the tensor that is NaN or infinite, where that is the error; the ranks are not to blame, nor is the disk.
        written: each rank's own seconds (copying, writing, syncing), and the bytes of its files.
    """

    step: int
    error: str | None
    nbytes: int = 0
    seconds: float = 0.0
    warning: str | None = None
    lost: str | None = None
    written: Sequence[tuple[float, int]] = ()


@dataclass(frozen=True)
class Vote:
    """What one rank says about its part; `lost` as of Outcome."""

    step: int
    files: Mapping[str, FileEntry]
    error: str | None = None
    lost: str | None = None
    seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(entry.bytes for entry in self.files.values())


def commit(folder: Path, job: Job, runtime: Runtime) -> Outcome:
    """Write and commit `job` under `folder`; the same outcome on every rank.

    A failure leaves the older checkpoints as they are and no part of the new one. It is told, not raised; what is
    raised is that another rank is gone.
    """
    start = time.perf_counter()
    point = partial(fault, rank=runtime.rank, step=job.step)
    target = folder / f".tmp-{step_name(job.step)}"
    made = _attempt(partial(_make, target)) if runtime.is_main_process else None
    answers = runtime.gather((job.step, made, job.own_state))
    error = _first_difference([(step, error) for step, error, _ in answers])
    if error is not None:
        return Outcome(job.step, error)
    vote = Vote(job.step, {})
    state = {**job.state, "ranks": [own for _, _, own in answers]}
    try:
        entries, seconds = _write_files(target, job, state, runtime)
        vote = Vote(job.step, entries, seconds=job.staging_seconds + seconds)
        point("before_vote")
    except NonFiniteError as failure:
        vote = Vote(job.step, {}, f"{failure} is NaN or infinite", str(failure))
    except Exception as failure:
        vote = Vote(job.step, {}, describe(failure))
    votes = runtime.gather(vote)
    error = _first_error([other.error for other in votes])
    lost = _first_lost([other.lost for other in votes])
    written = [(other.seconds, other.nbytes) for other in votes]
    warning = None
    if error is None:
        # rank 0 alone decides from here on; a later error, of cleaning up, does not unmake what stands
        if runtime.is_main_process:
            error, warning = _decide(folder, target, job, votes, point)
        else:
            _attempt(lambda: [point(name) for name in LATE_POINTS])
        error, warning = runtime.broadcast((error, warning))
    if error is not None:
        if runtime.is_main_process:
            shutil.rmtree(target, ignore_errors=True)
        return Outcome(job.step, error, lost=lost)
    nbytes = sum(other.nbytes for other in votes)
    return Outcome(job.step, None, nbytes, time.perf_counter() - start, warning, written=written)


def _decide(
    folder: Path, target: Path, job: Job, votes: list[Vote], point: Callable[[str], None]
) -> tuple[str | None, str | None]:
    """Make the checkpoint and clean up: the error before it stood, and the first one after."""
    error = _attempt(partial(_publish, folder, target, job, votes, point))
    if error is not None:
        return f"rank 0: {error}", None
    later = [_attempt(step) for step in (partial(sync_folder, folder), partial(point, "after_rename"), job.clean)]
    return None, next((warning for warning in later if warning is not None), None)


def describe(error: BaseException) -> str:
    """One line: an OSError in the words of the system, one of ours as it is, others with their kind."""
    if isinstance(error, CheckpointError):
        return str(error).splitlines()[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _attempt(action: Callable[[], object]) -> str | None:
    """The error of `action` in one line, or None."""
    try:
        action()
    except Exception as error:
        return describe(error)
    return None


def _first_difference(answers: list[tuple[int, str | None]]) -> str | None:
    """The first rank's error; also when they do not save the same step."""
    if len({step for step, _ in answers}) > 1:
        return f"the ranks are not at the same step: {[step for step, _ in answers]}"
    return _first_error([error for _, error in answers])


def _first_error(errors: list[str | None]) -> str | None:
    return next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None), None)


def _first_lost(names: list[str | None]) -> str | None:
    """The first rank's tensor, a weight if there is one."""
    lost = [(not name.startswith("model/"), rank, name) for rank, name in enumerate(names) if name is not None]
    if not lost:
        return None
    _, rank, name = min(lost)
    return name if len(names) == 1 else f"{name} (in the part of rank {rank})"


def _make(target: Path) -> None:
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir()):
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed here
    target.mkdir(mode=0o700)


def _write_files(
    target: Path, job: Job, state: Mapping[str, object], runtime: Runtime
) -> tuple[dict[str, FileEntry], float]:
    """This rank's files, several at once, and the seconds that took; all threads have ended when it returns or raises.

    The seconds begin when the first file's bytes are there: the device may have waited for other ranks before.
    """
    if job.error is not None:
        raise CheckpointError(job.error)
    point = partial(fault, rank=runtime.rank, step=job.step)
    entries: dict[str, FileEntry] = {}
    starts: list[float] = []

    def write(name: str, contents: Contents) -> None:
        data = contents()
        starts.append(time.perf_counter())
        entries[name] = write_file(target / name, data, halfway=lambda: point("half_shard"),
                                   before_sync=lambda: point("before_fsync"))  # fmt: skip

    def write_state() -> None:
        text = json.dumps(state, indent=1).encode() + b"\n"
        _check_size(STATE, text, MAX_STATE_BYTES)
        entries[STATE] = write_file(target / STATE, memoryview(text))

    with ThreadPoolExecutor(job.threads, thread_name_prefix="distkit-write") as pool:
        tasks = [pool.submit(write_state)] if runtime.is_main_process else []
        tasks += [pool.submit(write, name, contents) for name, contents in job.files.items()]
        for task in tasks:
            task.result()
    sync_folder(target)
    end = time.perf_counter()
    return entries, end - min(starts, default=end)


def _publish(folder: Path, target: Path, job: Job, votes: list[Vote], point: Callable[[str], None]) -> None:
    """Rank 0: check that all is there, write the manifest, give the directory its name."""
    files: dict[str, FileEntry] = {}
    for rank, vote in enumerate(votes):
        expected = set(job.layout.files[rank]) | ({STATE} if rank == 0 else set())
        if vote.files.keys() != expected:
            raise CheckpointError(f"rank {rank} wrote {sorted(vote.files)}, not {sorted(expected)}")
        files |= vote.files
    on_disk = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in os.scandir(target)}
    if on_disk != {name: entry.bytes for name, entry in files.items()}:
        odd = sorted(on_disk.items() ^ {name: entry.bytes for name, entry in files.items()}.items())
        raise CheckpointError(f"the directory does not hold what the ranks wrote: {odd[:3]}; is it shared by all?")
    manifest = Manifest(
        step=job.step,
        recipe=job.recipe,
        strategy=job.strategy,
        world_size=len(votes),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"distkit": __version__, "torch": torch.__version__},
        files=files,
        tensors=job.layout.tensors,
    )
    try:
        check_state(parse_state((target / STATE).read_bytes()), manifest)
    except JsonError as error:
        raise CheckpointError(f"{STATE} {error}: no run could go on from it") from None
    point("before_manifest")
    text = dump_manifest(manifest)
    _check_size(MANIFEST, text, MAX_MANIFEST_BYTES)
    write_bytes(target / MANIFEST, text, mode=0o600)
    point("after_manifest")
    final = folder / step_name(job.step)
    replaced = None
    if job.replaces:
        replaced = retention.take_name(folder, job.step)
    elif os.path.lexists(final):  # it did not verify, or the run would have gone on from it
        retention.put_aside(folder, job.step)
    point("before_rename")
    os.rename(target, final)
    if replaced is not None:
        retention.delete(replaced)


def _check_size(name: str, text: bytes, most: int) -> None:
    """A save fails where no resume could read it."""
    if len(text) > most:
        raise CheckpointError(f"{name} would have {len(text)} bytes, more than the {most} that are read")
