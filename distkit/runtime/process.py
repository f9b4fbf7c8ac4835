"""The one place that knows processes and devices."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from distkit.config import TrainConfig
from distkit.errors import ConfigError, LaunchError, RankFailedError, RendezvousError
from distkit.runtime.heartbeat import Heartbeat
from distkit.runtime.local_ranks import is_loopback, stay_on_loopback
from distkit.runtime.position import Position
from distkit.runtime.rendezvous import meet
from distkit.runtime.seeding import derive_seed, seed_everything
from distkit.runtime.topology import Topology, threads_from_env

T = TypeVar("T")
#: On a busy machine gloo may need seconds to connect ranks that have met.
LEAST_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """This process: its rank, its device, and how it talks to the others.

    `cpu_group` is a gloo group of its own beside the device group: what is agreed on it (votes, errors, names)
    never waits for the device and never mixes with the collectives of a step. It is None for one process.
    `launcher` is the process that started this one, None where a person may have.
    """

    topology: Topology
    device: torch.device
    cpu_group: ProcessGroup | None = None
    timeout: datetime.timedelta = datetime.timedelta(minutes=30)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    launcher: int | None = None

    @property
    def rank(self) -> int:
        """This process among all."""
        return self.topology.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.topology.world_size

    @cached_property
    def position(self) -> Position:
        """Where this process is in the run; written in the step, so looked up once."""
        return self.heartbeat.position

    @property
    def is_main_process(self) -> bool:
        """True on rank 0."""
        return self.topology.is_main_process

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place, on the device; returns it without waiting."""
        if self.cpu_group is not None:
            dist.all_reduce(tensor)
        return tensor

    def with_own_group(self) -> Runtime:
        """The same process with a CPU side group of its own, for collectives of another thread; all ranks together."""
        if self.cpu_group is None:
            return self
        return replace(self, cpu_group=_gloo_group(self.timeout))

    def event(self) -> Callable[[], None]:
        """Mark what is queued on the device now; the function that is returned waits for it, in any thread."""
        if self.device.type != "cuda":
            self.wait()
            return lambda: None
        # who waits in another thread leaves the core to this one
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize

    def wait(self) -> None:
        """Wait for what is queued on the device; never between two reports of a step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (any picklable object), in the order of ranks, on every rank."""
        if self.cpu_group is None:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values  # type: ignore[return-value]  # all_gather_object fills every place

    def any_rank(self, flag: bool) -> Callable[[], bool]:
        """Ask all ranks; the function that is returned waits for the answer, True when one of them has `flag`."""
        if self.cpu_group is None:
            return lambda: flag
        answer = torch.tensor(int(flag), dtype=torch.int32)
        work = dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.cpu_group, async_op=True)

        def wait() -> bool:
            assert work is not None  # a rank that is asked belongs to the group
            work.wait()
            return bool(answer.item())

        return wait

    def same_everywhere(self, numbers: Sequence[int]) -> bool:
        """Whether all ranks give the same `numbers`, equally many; waits for the others."""
        if self.cpu_group is None:
            return True
        own = torch.tensor([*numbers, *(-number for number in numbers)], dtype=torch.int64)
        dist.all_reduce(own, dist.ReduceOp.MAX, group=self.cpu_group)
        greatest, least = own.chunk(2)
        return torch.equal(greatest, -least)

    def cores(self) -> int:
        """This rank's share of the machine's cores, at least 1."""
        return available_cores(self.topology.local_world_size)

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank."""
        if self.cpu_group is None:
            return value
        box: list[T] = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    @contextmanager
    def raise_on_all_ranks(self, what: str) -> Iterator[None]:
        """All ranks leave the block, or all raise the first rank's error (C6).

        Only for blocks without collectives inside: a rank that failed would leave the others waiting in them.
        """
        error: BaseException | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.cpu_group is None:
            if error is not None:
                raise error
            return
        failures = self.gather(None if error is None else (type(error), str(error)))
        first, failure = next(((rank, one) for rank, one in enumerate(failures) if one is not None), (0, None))
        if failure is None:
            return
        kind, message = failure
        if error is None or first != self.rank:
            refusal = issubclass(kind, ConfigError)
            error = (
                kind(message)
                if refusal
                else RankFailedError(f"rank {first} failed while {what}: {kind.__name__}: {message}")
            )
        if isinstance(error, ConfigError):
            error.on_all_ranks = True
        raise error

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others, so that a download or a cache is made once.

        An exception of rank 0 does not keep the others waiting: they run the block themselves and meet it too.
        """
        if self.cpu_group is not None and not self.is_main_process:
            dist.barrier(group=self.cpu_group)
        try:
            yield
        finally:
            if self.cpu_group is not None and self.is_main_process:
                dist.barrier(group=self.cpu_group)

    def close(self) -> None:
        """Leave the process groups; nothing can be sent afterwards."""
        self.heartbeat.close()
        if self.cpu_group is not None and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(name: str, topology: Topology) -> torch.device:
    """`auto` takes cuda, then mps (one process only), then cpu; a device that is not there is a ConfigError."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps and topology.world_size == 1 else "cpu"
    if name == "cuda":
        count = torch.cuda.device_count() if cuda else 0
        if topology.local_world_size > count:
            raise LaunchError(
                f"this machine shows {count} CUDA devices, and {topology.local_world_size} of its processes want one",
                expected="at most one process a device",
                got=f"processes: {topology.local_world_size}",
                fix=f"--nproc-per-node {count}" if count else "--device cpu",
            )
        return torch.device("cuda", topology.local_rank)
    if name == "mps":
        if not mps or topology.world_size > 1:
            raise LaunchError("--device mps", expected="Apple silicon and one process",
                              got=f"{topology.world_size} processes, mps {'' if mps else 'not '}available",
                              fix="--device cpu")  # fmt: skip
        return torch.device("mps")
    return torch.device("cpu")


def choose_num_threads(num_threads: int | None, local_world_size: int) -> int:
    """Threads of one rank on the CPU.

    Launchers set OMP_NUM_THREADS=1 unasked, so 1 counts as not chosen; `num_threads` 1 says it on purpose.
    """
    return num_threads or threads_from_env(os.environ) or available_cores(local_world_size)


def available_cores(local_world_size: int = 1) -> int:
    """The cores this process may use, divided over the ranks of the machine; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size)


def set_determinism(on: bool) -> None:
    """Deterministic kernels where torch has them (a warning names an operation that has none), or the fastest ones.

    See torch.use_deterministic_algorithms; cuBLAS reads its workspace setting when CUDA starts.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on, warn_only=True)
    # filling fresh memory with NaN finds bugs and costs time in every step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not on


def start(config: TrainConfig, topology: Topology) -> Runtime:
    """Set the device, join the process groups, seed. Undo with `Runtime.close()`."""
    launcher = os.getppid() if topology.launcher != "python" else None
    device = choose_device(config.device, topology)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    set_determinism(config.deterministic)
    if device.type == "cpu":
        threads = choose_num_threads(config.num_threads, topology.local_world_size)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    timeout = datetime.timedelta(seconds=config.timeout_seconds)
    cpu_group = None
    if topology.world_size > 1:
        _join(topology, device, timeout, config.start_timeout_seconds)
        store = dist.distributed_c10d._get_default_store()
        heartbeat = Heartbeat(topology.rank, topology.world_size, store)
        cpu_group = _gloo_group(timeout)
    else:
        heartbeat = Heartbeat(beats=True)
    seed_everything(derive_seed(config.seed, "rank", topology.rank))
    return Runtime(topology=topology, device=device, cpu_group=cpu_group, timeout=timeout, heartbeat=heartbeat,
                   launcher=launcher)  # fmt: skip


def _join(topology: Topology, device: torch.device, timeout: datetime.timedelta, start_seconds: float) -> None:
    """Join the device group (nccl or gloo).

    Raises:
        RendezvousError: the ranks did not find each other, or cannot reach each other.
    """
    os.environ.update(
        RANK=str(topology.rank),
        WORLD_SIZE=str(topology.world_size),
        LOCAL_RANK=str(topology.local_rank),
        LOCAL_WORLD_SIZE=str(topology.local_world_size),
        MASTER_ADDR=str(topology.master_addr),
        MASTER_PORT=str(topology.master_port),
    )
    if is_loopback(str(topology.master_addr)):
        stay_on_loopback(os.environ)
    on_gpu = device.type == "cuda"
    store = meet(topology, start_seconds, timeout.total_seconds())
    store.set_timeout(timeout)
    # all ranks are there, and have to connect; gloo takes five times as long to find that it cannot
    connecting = datetime.timedelta(seconds=max(LEAST_CONNECT_SECONDS, start_seconds / 5))
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=topology.rank,
                                world_size=topology.world_size, timeout=connecting,
                                device_id=device if on_gpu else None)  # fmt: skip
    except RuntimeError as error:
        raise RendezvousError(
            f"rank {topology.rank} on {socket.gethostname()} met the others at {topology.master_addr}:"
            f"{topology.master_port}, and cannot connect to them: {str(error).splitlines()[0]}; on hosts with several "
            "networks set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the one between them (distkit doctor)"
        ) from error
    # under another name before torch 2.15
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(timeout)
    if dist.get_world_size() != topology.world_size:
        raise LaunchError("the process group has another size than the launcher said",
                          expected=f"{topology.world_size} ranks", got=f"{dist.get_world_size()} ranks",
                          fix="start every rank with the same launcher")  # fmt: skip


def _gloo_group(timeout: datetime.timedelta) -> ProcessGroup:
    """A further gloo group of all ranks, made by all of them together."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, ProcessGroup)  # new_group returns a marker only to ranks left out, and none is
    return group
