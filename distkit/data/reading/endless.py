"""The samples of one rank from an iterable data set, started again whenever it ends, with a place that can be saved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distkit.errors import DataError

Samples: TypeAlias = "IterableDataset[object]"
Build: TypeAlias = Callable[[int, int], Samples]
"""build(rank, world_size) -> the share of that rank."""


_END = object()


@runtime_checkable
class _Stateful(Protocol):
    def state_dict(self) -> object: ...

    def load_state_dict(self, state: object) -> None: ...


class EndlessSamples(IterableDataset[object]):
    """The data set of one rank, started again whenever it ends; it is built in the process that reads it.

    Its state is the epoch, how many samples of it were given, and the state of the data set and of its iterator where
    they have one. Without either the samples that were given are read again and dropped.
    """

    def __init__(self, build: Build, rank: int, world_size: int) -> None:
        self.build = build
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._given = 0
        self._samples: Samples | None = None
        self._iterator: Iterator[object] = iter(())

    def __iter__(self) -> EndlessSamples:
        if self._samples is None:
            self._samples = check_share(self.build(self.rank, self.world_size))
            self._start(0)
        return self

    def __next__(self) -> object:
        """The next sample.

        Raises:
            DataError: a whole epoch has none.
        """
        try:
            sample = next(self._iterator)
        except StopIteration:
            if self._given == 0:
                raise self._empty() from None
            self._start(self._epoch + 1)
            return next(self)
        self._given += 1
        return sample

    def state_dict(self) -> dict[str, object]:
        """Its position; later samples do not change what was returned."""
        own = cast(object, self._iterator) is not self._samples
        return {
            "epoch": self._epoch,
            "given": self._given,
            "samples": _state_of(self._samples),
            "iterator": _state_of(self._iterator) if own else None,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go to where `state_dict` was taken.

        Raises:
            DataError: the epoch has become shorter than the place in it.
        """
        if self._samples is None or self._given:
            self._samples = self.build(self.rank, self.world_size)
        self._epoch, self._given = cast(int, state["epoch"]), cast(int, state["given"])
        self._set_epoch(self._epoch)
        restored = _restore(self._samples, state["samples"])
        self._iterator = iter(self._samples)
        if not (_restore(self._iterator, state["iterator"]) or restored):
            self._skip(self._given)

    def _skip(self, count: int) -> None:
        for i in range(count):
            if next(self._iterator, _END) is _END:
                raise DataError(
                    f"an iterable data set has become shorter at rank {self.rank}",
                    expected=f"at least {count} samples in epoch {self._epoch}, as before the restart",
                    got=i,
                )

    def _start(self, epoch: int) -> None:
        self._epoch, self._given = epoch, 0
        self._set_epoch(epoch)
        self._iterator = iter(cast(Samples, self._samples))

    def _set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self._samples, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def _empty(self) -> DataError:
        worker = get_worker_info()
        where = f"rank {self.rank}" + (f", worker {worker.id} of {worker.num_workers}" if worker else "")
        return DataError(
            f"an iterable data set has no sample in epoch {self._epoch} at {where}",
            expected="at least one sample for every rank and worker",
            got=type(self._samples).__name__,
            fix="--data.num-workers 1, or more shards" if worker else None,
        )


def check_share(samples: object) -> Samples:
    """What `build` of IterableData returned.

    Raises:
        DataError: nothing that gives samples one after the other.
    """
    others = (type, nn.Module, Tensor, np.ndarray, str, bytes, Mapping, Set, DataLoader)
    if isinstance(samples, others) or not hasattr(samples, "__iter__"):
        raise DataError("build of IterableData returned no iterable data set", got=f"a {type(samples).__name__}",
                        expected="a torch.utils.data.IterableDataset of samples")  # fmt: skip
    return cast(Samples, samples)


def _state_of(value: object) -> object:
    return copy.deepcopy(value.state_dict()) if isinstance(value, _Stateful) else None


def _restore(value: object, state: object) -> bool:
    """Whether `value` took the state."""
    if state is None or not isinstance(value, _Stateful):
        return False
    value.load_state_dict(state)
    return True
