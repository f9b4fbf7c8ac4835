"""Saving at a step boundary: in the step's own time, or behind the next steps."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import psutil
from torch import Tensor

from distkit.checkpoint.commit import Contents, Job, Outcome, commit, describe
from distkit.checkpoint.plan import Layout, Piece, global_layout, local_plan, piece_of
from distkit.checkpoint.shard_file import ShardFile, tensor_bytes
from distkit.checkpoint.staging import Staging
from distkit.config import CheckpointConfig
from distkit.errors import CheckpointError, RankFailedError
from distkit.runtime.faults import fault
from distkit.runtime.position import SAVING
from distkit.runtime.process import Runtime
from distkit.tensors.spec import dtype_name

#: Most files that one rank writes at once, each with a thread that hashes it.
THREADS = 3
#: Share of the free memory of this machine that staging may take.
STAGING_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What is saved, as it is at a step boundary.

    Attributes:
        shared: tensors of the run: the same on every rank, or DTensors of which each rank holds its part.
        own: tensors that this rank alone has, under names that contain its number.
        values: everything else, ready for JSON; rank 0's is saved.
        own_values: what this rank alone knows, ready for JSON.
    """

    shared: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    values: Mapping[str, object]
    own_values: Mapping[str, object] = field(default_factory=dict)


class Saver:
    """Saves snapshots as checkpoints under `folder`; at most one save is in flight.

    All ranks call the same methods at the same steps. Saving behind the steps copies the snapshot into staging buffers
    that have the form of the files, and leaves the rest to a thread with a process group of its own.

    Args:
        folder: RUN/checkpoints, on a file system that all ranks share.
        runtime: this process.
        config: asynchronous and max_failures are used here.
        recipe, strategy: for the manifest.
        clean: removes old checkpoints after a commit of a step; called on rank 0, perhaps in the thread.
        committed: the step of the checkpoint in `folder` that the run was restored from.

    Attributes:
        committed: the step that was committed last.
    """

    def __init__(
        self,
        folder: Path,
        runtime: Runtime,
        config: CheckpointConfig,
        *,
        recipe: str,
        strategy: str,
        clean: Callable[[int], None],
        committed: int | None = None,
    ) -> None:
        self.folder, self.config = folder, config
        self._runtime, self._side = runtime, runtime.with_own_group()
        self._recipe, self._strategy, self._clean = recipe, strategy, clean
        self._form = b""
        self._layout = Layout((), {})
        self._files: dict[str, ShardFile] = {}
        self._staging = Staging()
        self._in_flight: Future[Outcome] | None = None
        self._jobs: SimpleQueue[tuple[Future[Outcome], Job] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._last_error: str | None = None
        # one more than its cores, because of the waits of fsync
        self._threads = min(THREADS, 1 + runtime.cores())
        self.behind: bool | None = None
        self.committed = committed

    def save(self, step: int, snapshot: Snapshot) -> list[Outcome]:
        """Save `snapshot` of `step` finished steps; returns what has ended by now, this save or the one before.

        A save that failed is an outcome, not an exception; see `check`.

        Raises:
            CheckpointError: a tensor that cannot be saved; an exception of another rank.
        """
        ended = self.finish()
        form = form_of(snapshot)
        # asked while the copy is made: a new form is rare, and then the copy is made again
        is_new = self._runtime.any_rank(form != self._form)
        staged = self._stage(snapshot, step) if form == self._form else None
        if is_new():
            self._plan(snapshot, form)
            staged = None
        files, error = self._stage(snapshot, step) if staged is None else staged
        job = Job(
            step=step,
            recipe=self._recipe,
            strategy=self._strategy,
            layout=self._layout,
            files=files,
            error=error,
            state=snapshot.values,
            own_state=snapshot.own_values,
            threads=self._threads,
            replaces=self.committed == step,
            clean=partial(self._clean, step),
        )
        if not self.behind:
            return [*ended, self._count(commit(self.folder, job, self._side))]
        self._in_flight = Future()
        if self._thread is None:
            # daemon: a run that fails does not wait for a peer that is gone
            self._thread = threading.Thread(target=self._work, name="distkit-save", daemon=True)
            self._thread.start()
        self._jobs.put((self._in_flight, job))
        return ended

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            try:
                self._runtime.position.cells[SAVING] = job.step
                outcome = commit(self.folder, job, self._side)
                self._runtime.position.cells[SAVING] = 0
                future.set_result(outcome)
            except BaseException as error:
                future.set_exception(error)

    def poll(self) -> list[Outcome]:
        """The outcome of the save in flight if it has ended on every rank, else []; all ranks together."""
        if self._in_flight is None or self._runtime.any_rank(not self._in_flight.done())():
            return []
        return self.finish()

    def finish(self) -> list[Outcome]:
        """Wait for the save in flight and return its outcome; [] if there is none.

        Raises:
            RankFailedError: this rank's disk has not answered for so long that the other ranks have given up.
        """
        if self._in_flight is None:
            return []
        # a single rank keeps nobody waiting, and a slow disk is no failure
        patience = 2 * self._runtime.timeout.total_seconds() if self._runtime.cpu_group is not None else None
        try:
            self._in_flight.exception(timeout=patience)
        except TimeoutError as error:
            raise RankFailedError(
                f"writing a checkpoint has taken more than {patience:g} s, twice --timeout-seconds: does the disk of "
                f"{self.folder} answer?"
            ) from error
        save, self._in_flight = self._in_flight, None
        return [self._count(save.result())]

    def _count(self, outcome: Outcome) -> Outcome:
        self._failures = 0 if outcome.error is None else self._failures + 1
        self.committed = outcome.step if outcome.error is None else self.committed
        self._last_error = outcome.error
        return outcome

    def close(self, timeout_seconds: float = 10.0) -> None:
        """End the thread; a save in flight, whose run has failed, gets `timeout_seconds` to become a checkpoint."""
        if self._in_flight is not None:
            wait_for([self._in_flight], timeout=timeout_seconds)
        self._jobs.put(None)

    def check(self, *, last: bool = False) -> None:
        """End the run when too many saves in a row have failed, or, with `last`, when the newest one did.

        Raises:
            CheckpointError: on every rank alike.
        """
        if last and self._failures:
            error = CheckpointError(
                f"the last checkpoint was not saved: {self._last_error}; the same command goes on from the one before"
            )
        elif self._failures >= self.config.max_failures:
            error = CheckpointError(
                f"{self._failures} saves in a row failed (--checkpoint.max-failures): {self._last_error}"
            )
        else:
            return
        error.on_all_ranks = True
        raise error

    def _plan(self, snapshot: Snapshot, form: bytes) -> None:
        """Lay out the files over all ranks."""
        plan = local_plan(snapshot.shared, snapshot.own, self._runtime.rank, self._runtime.world_size)
        self._form, self._layout = form, global_layout(self._runtime.gather(plan))
        self._files = {name: ShardFile(held) for name, held in self._layout.files[self._runtime.rank].items()}
        if self.behind is None:
            self.behind = self._choose_behind()

    def _stage(self, snapshot: Snapshot, step: int) -> tuple[Mapping[str, Contents], str | None]:
        """This rank's files, to be called for their bytes, or why there are none: a vote against this save."""
        value_of = partial(piece_of, {**snapshot.shared, **snapshot.own})
        try:
            fault("staging", self._runtime.rank, step)
            return (self._stage_all if self.behind else self._stage_each)(value_of), None
        except Exception as failure:  # no memory, say
            return {}, describe(failure)

    def _choose_behind(self) -> bool:
        """Whether to stage everything: as configured, or where it fits on every rank."""
        needed = sum(file.nbytes for file in self._files.values())
        free = psutil.virtual_memory().available * STAGING_SHARE / self._runtime.topology.local_world_size
        fits = not self._runtime.any_rank(needed > free)()
        return fits if self.config.asynchronous == "auto" else self.config.asynchronous == "on"

    def _stage_all(self, value_of: Callable[[Piece], Tensor]) -> dict[str, Contents]:
        """Copy all files into their buffers now; the thread waits for the device, the step does not."""
        files: dict[str, tuple[ShardFile, Tensor]] = {}
        for index, (name, file) in enumerate(self._files.items()):
            files[name] = file, self._staging.buffer(index, file.nbytes, self._runtime.device)
            file.fill_(files[name][1], value_of)
        copied = self._runtime.event()

        def contents(file: ShardFile, buffer: Tensor) -> memoryview:
            copied()
            return tensor_bytes(buffer[: file.nbytes])

        return {name: partial(contents, *file) for name, file in files.items()}

    def _stage_each(self, value_of: Callable[[Piece], Tensor]) -> dict[str, Contents]:
        """Copy a file when its turn to be written comes, into one of a few buffers that are kept."""
        largest = max((file.nbytes for file in self._files.values()), default=0)
        free = iter(range(self._threads))
        mine = threading.local()

        def contents(file: ShardFile) -> memoryview:
            if not hasattr(mine, "buffer"):
                mine.buffer = self._staging.buffer(next(free), largest, self._runtime.device)
            file.fill_(mine.buffer, value_of)
            self._runtime.wait()
            return tensor_bytes(mine.buffer[: file.nbytes])

        # before the threads, which share them out
        for index in range(self._threads):
            self._staging.buffer(index, largest, self._runtime.device)
        return {name: partial(contents, file) for name, file in self._files.items()}


def form_of(snapshot: Snapshot) -> bytes:
    """A digest of names, dtypes, shapes and kinds: equal forms have equal layouts."""
    digest = hashlib.sha256()
    for name, tensor in (*snapshot.shared.items(), *snapshot.own.items()):
        placements = getattr(tensor, "placements", "")
        digest.update(f"{name}\0{dtype_name(tensor)}\0{tuple(tensor.shape)}\0{placements}\n".encode())
    return digest.digest()
