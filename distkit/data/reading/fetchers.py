"""Two ways to read vectorised data sets: in the training thread, or ahead of it in another thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Protocol

import torch
from torch.utils.data import default_collate

from distkit.data.batch import Batch, check_batch, map_tensors, to_device
from distkit.data.collate import collate_of
from distkit.data.dataset import Augments, Dataset, MapDataset
from distkit.data.stream.draws import Draws
from distkit.data.stream.requests import Request
from distkit.errors import TrainingError


class Batches(Protocol):
    """Answers to a sequence of requests, in their order."""

    def __next__(self) -> Batch:
        """The next batch, on the training device."""

    def close(self) -> None:
        """Stop reading; no thread and no process is left. May be called twice."""


class Fetcher(Protocol):
    """A placement: reads the requested samples."""

    def open(self, requests: Iterator[Request]) -> Batches:
        """Start to answer `requests`."""


class BatchMaker:
    """Request -> batch: fetch, augment on `device`, lay out. Never waits for the device.

    Args:
        dataset: what to read.
        seed: of every per-sample draw.
        device: where the batch is augmented and wanted.
        channels_last: lay out 4-dim tensors as NHWC.
    """

    def __init__(self, dataset: Dataset, seed: int, device: torch.device, channels_last: bool) -> None:
        self.dataset, self.seed, self.device, self.channels_last = dataset, seed, device, channels_last
        self._augment = dataset.augment if isinstance(dataset, Augments) else None
        self._is_new = True
        # a copy from other memory may wait for the device
        self._read = self._read_pinned if device.type == "cuda" else self._read_plain

    def __call__(self, request: Request) -> Batch:
        """The finished batch."""
        return self.finish(self._read(request), request)

    def _read_plain(self, request: Request) -> Batch:
        return self.dataset.fetch(torch.from_numpy(request.indices))

    def _read_pinned(self, request: Request) -> Batch:
        return self.dataset.fetch(torch.from_numpy(request.indices).pin_memory())

    def finish(self, batch: Batch, request: Request) -> Batch:
        """A fetched batch, moved, augmented and laid out.

        Raises:
            DataError: the first one has not as many samples as were asked for.
        """
        if self._is_new:
            check_batch(batch, len(request.indices), who_makes(self.dataset))
        if self._augment is not None:
            draws = Draws(self.seed, request.positions(self.device))
            batch = self._augment(to_device(batch, self.device), draws)
            if self._is_new:
                check_batch(batch, len(request.indices), f"{type(self.dataset).__name__}.augment")
        self._is_new = False
        return to_device(batch, self.device, self.channels_last)


def who_makes(dataset: object) -> str:
    """The method that batches of a data set come from."""
    if not isinstance(dataset, MapDataset):
        return f"{type(dataset).__name__}.fetch"
    own = collate_of(dataset.samples) is not default_collate
    return f"{type(dataset.samples).__name__}.{'collate' if own else '__getitem__'}"


class InlineFetcher:
    """Placement `device`: data that is at hand needs no reading ahead."""

    def __init__(self, make: BatchMaker) -> None:
        self._make = make

    def open(self, requests: Iterator[Request]) -> Batches:
        """Batches are made on request."""
        return _InlineBatches(self._make, requests)


class _InlineBatches:
    def __init__(self, make: BatchMaker, requests: Iterator[Request]) -> None:
        self._make, self._requests = make, requests

    def __next__(self) -> Batch:
        return self._make(next(self._requests))

    def close(self) -> None:
        """Nothing is open."""


class HostFetcher:
    """Placement `host`: a thread gathers and augments on the CPU, and copies to the device on a side stream.

    Args:
        make: makes batches on the CPU.
        device: where they go.
        depth: batches made ahead, >= 1.
        timeout_seconds: a batch that takes longer ends the run, > 0.
    """

    def __init__(self, make: BatchMaker, device: torch.device, depth: int, timeout_seconds: float = 1800.0) -> None:
        self._make, self._device, self._depth, self._timeout_seconds = make, device, depth, timeout_seconds

    def open(self, requests: Iterator[Request]) -> Batches:
        """Start the thread."""
        return _AheadBatches(self._make, requests, self._device, self._depth, self._timeout_seconds)


class _End:
    """What the thread leaves behind when it stops: nothing more to read, or why it could not."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _AheadBatches:
    def __init__(
        self,
        make: BatchMaker,
        requests: Iterator[Request],
        device: torch.device,
        depth: int,
        timeout_seconds: float,
    ) -> None:
        self._make, self._requests, self._device, self._timeout_seconds = make, requests, device, timeout_seconds
        self._ready: queue.Queue[tuple[Batch, torch.cuda.Event | None] | _End] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._hangs = False
        self._side = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = threading.Thread(target=self._work, name="distkit-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        end = _End(None)
        try:
            # grad mode and the current device belong to a thread
            with torch.no_grad(), torch.cuda.device(self._device) if self._side else contextlib.nullcontext():
                for request in self._requests:
                    if not self._put(self._copy(self._make(request))):
                        return
        except BaseException as error:
            end = _End(error)
        self._put(end)

    def _put(self, item: tuple[Batch, torch.cuda.Event | None] | _End) -> bool:
        """Hand over an item when there is room; False when nobody wants it any more."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return True
        return False

    def _copy(self, batch: Batch) -> tuple[Batch, torch.cuda.Event | None]:
        if self._side is None:
            return to_device(batch, self._device), None
        pinned = map_tensors(lambda tensor: tensor.pin_memory(), batch)
        with torch.cuda.stream(self._side):
            moved = to_device(pinned, self._device)
            # the event also keeps the pinned source from being reused: torch's host allocator waits for its stream
            return moved, self._side.record_event()

    def __next__(self) -> Batch:
        try:
            item = self._ready.get(timeout=self._timeout_seconds)
        except queue.Empty as error:
            self._hangs = True
            raise TrainingError(
                f"reading a batch took longer than {self._timeout_seconds:g} s\n"
                "  check: what the data set waits for (a network drive, a lock), or raise --timeout-seconds"
            ) from error
        if isinstance(item, _End):
            self._ready.put(item)  # asking again gives the same answer
            if item.error is not None:
                raise item.error
            raise StopIteration
        batch, copied = item
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            map_tensors(lambda tensor: _used_on(tensor, current), batch)
        return batch

    def close(self) -> None:
        """Stop the thread and wait for it; what it has made is dropped. One that hangs ends with the process."""
        self._stop.set()
        if not self._hangs:
            self._thread.join()


def _used_on(tensor: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    """Tell the allocator that memory from the side stream is in use on `stream`."""
    tensor.record_stream(stream)
    return tensor
