"""Iterable data sets, read in order through torchdata's StatefulDataLoader: the only data without a sample stream.

Contract C1 does not hold here: samples have no numbers, so the data set decides the order, the position in it is
state, and that state belongs to one rank. A run can be resumed with the same world size and batch split only.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch.utils.data import default_collate

from distkit.config import BatchSplit
from distkit.config.check import require
from distkit.data.batch import Batch, check_batch, to_device
from distkit.data.collate import ADVICE, Collate, why_no_batch
from distkit.data.reading.endless import Build, EndlessSamples
from distkit.data.reading.worker_process import end_workers, iterator_of, take_over_signal, waiting_for
from distkit.data.stream.draws import Draws
from distkit.data.stream.stream import microbatch_start
from distkit.errors import ConfigError, DataError
from distkit.json_files import parse_object
from distkit.runtime.local_ranks import die_with_owner
from distkit.runtime.seeding import derive_seed
from distkit.runtime.signals import ignore_stop_signals

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
        StatefulDataLoader,
    )


@dataclass(frozen=True, kw_only=True)
class IterableData:
    """What a recipe's `build_dataset` returns for data without numbers; see `IterableSource`.

    Args:
        build: makes the data set of a rank, `build(rank, world_size)`.
        samples_per_epoch: what counts as one epoch, >= 1: for the length of a run, schedules and reports.
        augment: run on the device with draws keyed by position.
        collate: makes a batch of a list of samples, for those that must be padded; None: torch's default_collate.
    """

    build: Build
    samples_per_epoch: int
    augment: Callable[[Batch, Draws], Batch] | None = None
    collate: Collate | None = None

    def __post_init__(self) -> None:
        size = self.samples_per_epoch
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise DataError("samples_per_epoch of IterableData is no number of samples", expected="an integer >= 1",
                            got=repr(size)[:60])  # fmt: skip

    def __len__(self) -> int:
        return self.samples_per_epoch

    def describe(self) -> str:
        """One line for people."""
        return f"iterable, {self.samples_per_epoch:,} samples an epoch; the world size may not change on resume"


@dataclass(kw_only=True)
class IterableSource:
    """Microbatches from iterable data sets, in order, for ever; the world size may not change on resume.

    `build(rank, world_size)` gives the share of one rank, a `torch.utils.data.IterableDataset`. The shares must be
    disjoint and together the whole set: take every world_size-th sample or file. With worker processes a share must be
    divided once more, by `torch.utils.data.get_worker_info()`, as for any torch DataLoader; and where processes are
    spawned, `build` must be picklable. The data set is iterated again when it ends, after `set_epoch(epoch)` where it
    has that; a microbatch may hold samples of two epochs, and none is dropped. With `state_dict` and
    `load_state_dict` on the data set or on its iterator a resume costs nothing; without, the samples of the epoch are
    read again. Its randomness must come from the epoch or its own state: torch's global generator is not restored.

    Args:
        build: makes the data set of a rank; called in the process that reads.
        seed: of worker processes and of per-sample draws.
        split: how a global batch is cut.
        rank: this process.
        device: where batches are wanted.
        channels_last: lay out 4-dim tensors as NHWC.
        augment: run on the device with draws keyed by position (C1); None: nothing.
        num_workers: processes that read; 0: this one.
        prefetch_depth: batches that a worker makes ready ahead, >= 1.
        collate: makes a batch of a list of samples; None: torch's default_collate.

    Raises:
        ConfigError: torchdata is not installed, or a number is out of range.
    """

    build: Build
    seed: int
    split: BatchSplit
    rank: int
    device: torch.device
    channels_last: bool = False
    augment: Callable[[Batch, Draws], Batch] | None = None
    num_workers: int = 0
    prefetch_depth: int = 2
    collate: Collate | None = None
    _next: int = field(default=0, init=False)
    _is_new: bool = field(default=True, init=False)
    _restored: object = field(default=None, init=False)
    _batches: Iterator[Batch] | None = field(default=None, init=False)
    _loader: StatefulDataLoader | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, "data.num_workers", "an integer >= 0", self.num_workers, "2")
        require(self.prefetch_depth >= 1, "data.prefetch_depth", "an integer >= 1", self.prefetch_depth, "2")
        _stateful_loader()

    def microbatch(self, step: int, accum_index: int) -> Batch:
        """This rank's microbatch `accum_index` of global batch `step`, on the device.

        Raises:
            ConfigError: it is not the one after the last; there is no way back and no way to skip.
            DataError: the data set is empty.
        """
        number = step * self.split.accum_steps + accum_index
        if number != self._next:
            raise ConfigError(
                "an iterable data set can only be read in order",
                expected=f"step {self._next // self.split.accum_steps}, or the state saved before that step",
                got=f"step {step}, microbatch {accum_index}",
            )
        batches = self._started()
        with waiting_for(batches):
            batch = next(batches)
        self._next += 1
        if self._is_new:
            check_batch(
                batch, self.split.microbatch_size, "collate of IterableData" if self.collate else "IterableData"
            )
        if self.augment is None:
            self._is_new = False
            return to_device(batch, self.device, self.channels_last)
        start = microbatch_start(step, self.split, self.rank, accum_index)
        positions = torch.arange(start, start + self.split.microbatch_size, device=self.device)
        batch = self.augment(to_device(batch, self.device), Draws(self.seed, positions))
        if self._is_new:
            check_batch(batch, self.split.microbatch_size, "augment of IterableData")
        self._is_new = False
        return to_device(batch, self.device, self.channels_last)

    def first(self) -> Batch:
        """The first microbatch, from a data set of its own, read in this process.

        Raises:
            DataError: the data set is empty.
        """
        with closing(replace(self, num_workers=0)) as source:
            return source.microbatch(0, 0)

    def state_dict(self) -> dict[str, object]:
        """This rank's position, ready for JSON; batches that workers prefetched do not count as read.

        Raises:
            DataError: the data set's own state is more than JSON holds.
        """
        loader = self._restored if self._loader is None else self._loader.state_dict()
        state = {**self._layout(), "next": self._next, "loader": loader}
        try:
            saved = parse_object(json.dumps(state).encode(), finite=False)
        except (TypeError, ValueError) as error:
            raise _not_json(error) from error
        if saved != state:
            raise _not_json("keys that are not strings, or tuples")
        return saved

    def check_state_dict(self, state: Mapping[str, object]) -> None:
        """Refuse a state that does not fit, and change nothing.

        Raises:
            ConfigError: it was taken with another world size, batch split, rank or number of workers.
        """
        for name, now in self._layout().items():
            if state.get(name) != now:
                raise ConfigError(
                    f"an iterable data set cannot be resumed with a different {name}",
                    expected=f"{name} {state.get(name)}, as in the checkpoint",
                    got=f"{name} {now}",
                    fix=f"start it with {name} {state.get(name)}; only map-style and token sets can change it",
                )

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where the same rank's `state_dict` was taken.

        Raises:
            ConfigError: as `check_state_dict`.
        """
        self.check_state_dict(state)
        self.close()
        self._restored = state["loader"]
        self._next = cast(int, state["next"])

    def close(self) -> None:
        """End the worker processes; the position is kept."""
        loader, batches = self._loader, self._batches
        self._loader = self._batches = None
        try:
            if loader is not None:
                self._restored = loader.state_dict()
        finally:
            end_workers(batches)

    def _layout(self) -> dict[str, int]:
        return {
            "world_size": self.split.world_size,
            "rank": self.rank,
            "microbatch_size": self.split.microbatch_size,
            "accum_steps": self.split.accum_steps,
            "num_workers": self.num_workers,
        }

    def _started(self) -> Iterator[Batch]:
        if self._batches is None:
            if self.num_workers:
                take_over_signal()
            with warnings.catch_warnings():
                # torchdata 0.11 calls torch.set_vital, which torch 2.15 deprecates.
                warnings.filterwarnings("ignore", message=".*set_vital")
                self._loader = _stateful_loader()(
                    EndlessSamples(self.build, self.rank, self.split.world_size),
                    batch_size=self.split.microbatch_size,
                    num_workers=self.num_workers,
                    prefetch_factor=self.prefetch_depth if self.num_workers else None,
                    collate_fn=self.collate or collated,
                    pin_memory=self.device.type == "cuda",
                    # Of its own, because torch's global one belongs to the model; another one on each rank and after
                    # each resume, or random transforms would repeat.
                    generator=torch.Generator().manual_seed(derive_seed(self.seed, "iterable", self.rank, self._next)),
                    worker_init_fn=partial(_start_worker, os.getpid()),
                )
            if self._restored is not None:
                self._loader.load_state_dict(self._restored)
            self._batches = iterator_of(self._loader)
        return self._batches


def collated(samples: list[object]) -> Batch:
    """torch's batch of `samples`.

    Raises:
        DataError: it makes none of them.
    """
    try:
        return cast(Batch, default_collate(samples))
    except Exception as error:
        if "shared memory" in str(error):
            raise
        reason = why_no_batch(samples, [f"sample {number} of it" for number in range(len(samples))])
        raise DataError(f"samples of IterableData do not make a batch: {reason or str(error).splitlines()[0]}",
                        expected=f"tensors of one shape, numbers, tuples and dicts of them; for others {ADVICE}") \
            from error  # fmt: skip


def _start_worker(owner: int, _worker_id: int) -> None:
    die_with_owner(owner)
    ignore_stop_signals()


def _not_json(got: object) -> DataError:
    return DataError(
        "an iterable data set has a state that a checkpoint cannot hold",
        expected="state_dict() of numbers, strings, lists, None, and dicts with string keys",
        got=got,
    )


def _stateful_loader() -> type[StatefulDataLoader]:
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise ConfigError(
            "iterable data sets need torchdata",
            expected="torchdata 0.10 or later",
            got=error,
            fix="pip install 'distkit[streaming]'",
        ) from error
    return StatefulDataLoader  # type: ignore[no-any-return, unused-ignore]
