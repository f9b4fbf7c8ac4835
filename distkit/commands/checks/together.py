"""What only all ranks can see: each function is called on every rank, and they exchange something inside."""

from __future__ import annotations

import contextlib
import statistics
import time
import uuid
from typing import TypeVar

from distkit.commands.checks.disk import nearest_folder
from distkit.commands.checks.finding import Context, Finding, Level, counted, in_words
from distkit.errors import shorten

T = TypeVar("T")
#: What is added up: 16 MiB of fp32.
NUM_ELEMENTS = 2**22
REPEATS = 5
#: Skew from which logs and file times mislead, and from which a run misses the end of its job.
SKEW_WARNING_SECONDS, SKEW_ERROR_SECONDS = 1.0, 30.0


def gathered(value: T, context: Context) -> list[T]:
    """Every rank's `value`, in the order of ranks."""
    import torch.distributed as dist

    values: list[T | None] = [None] * context.topology.world_size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all_gather_object fills every place


def hosts(context: Context) -> list[Finding]:
    """Whether each node has as many ranks as its ranks are told."""
    told = gathered((context.node, context.local_world_size), context)
    if context.topology.rank != 0:
        return []
    nodes = [node for node, _ in told]
    wrong = sorted({(node, nodes.count(node), local) for node, local in told if nodes.count(node) != local})
    if wrong:
        said = "; ".join(f"{node} has {counted(count, 'rank')}, which are told {local}" for node, count, local in wrong)
        return [Finding("nodes", "warning", said, "one launcher per node, with the same number of ranks on each")]
    return [Finding("nodes", "ok", f"{len(nodes)} ranks on {shorten(dict.fromkeys(nodes))}")]


def all_reduce(context: Context) -> list[Finding]:
    """Add up whole numbers, which has one right answer, and measure the bandwidth; on gloo, and on NCCL with GPUs."""
    import torch

    on_gpu = context.device != "cpu" and torch.cuda.is_available()
    found = _all_reduce("gloo", "cpu", context)
    if all(gathered(on_gpu, context)):
        found += _all_reduce("nccl", f"cuda:{context.topology.local_rank}", context)
    return found


def _all_reduce(backend: str, device: str, context: Context) -> list[Finding]:
    import torch
    import torch.distributed as dist

    world, rank = context.topology.world_size, context.topology.rank
    if backend == "nccl":
        torch.cuda.set_device(device)
    group = dist.new_group(backend=backend)
    assert isinstance(group, dist.ProcessGroup)  # every rank belongs to it
    pattern = torch.arange(NUM_ELEMENTS, dtype=torch.float32, device=device) % 7
    expected = pattern * (world * (world + 1) // 2)
    seconds, right = [], True
    for _ in range(1 + REPEATS):
        values = pattern * (rank + 1)
        dist.barrier(group)
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        right = torch.equal(values, expected) and right  # this waits for the device
        seconds.append(time.perf_counter() - started)
    dist.destroy_process_group(group)
    if not right:
        return [Finding("all-reduce", "error", f"{backend}: the sum over all ranks is wrong on rank {rank}",
                        "exclude this node, and have its network and memory checked")]  # fmt: skip
    if rank != 0:
        return []
    nbytes, typical = 4 * NUM_ELEMENTS, statistics.median(seconds[1:])
    bus = 2 * (world - 1) / world * nbytes / typical
    message = f"{backend}: right sum over {world} ranks; {in_words(nbytes)} in {typical * 1e3:.3g} ms"
    return [Finding("all-reduce", "ok", f"{message}, {in_words(bus)}/s on the bus")]


def clocks(context: Context) -> list[Finding]:
    """The clocks of the nodes against that of rank 0, each read when a barrier ends."""
    import torch.distributed as dist

    readings = []
    for _ in range(REPEATS):
        dist.barrier()
        readings.append(time.time())
    by_rank = gathered((context.node, readings), context)
    if context.topology.rank != 0:
        return []
    ahead = {node: statistics.median(theirs - mine for theirs, mine in zip(times, readings, strict=True))
             for node, times in reversed(by_rank)}  # fmt: skip
    return judge_skew(ahead)


def judge_skew(ahead: dict[str, float]) -> list[Finding]:
    """Findings of seconds by which the clock of each node is ahead of rank 0's."""
    worst = max(ahead, key=lambda node: abs(ahead[node]))
    skew = abs(ahead[worst])
    if skew < SKEW_WARNING_SECONDS:
        return [
            Finding("clocks", "ok", f"they agree within {SKEW_WARNING_SECONDS:g} s on {counted(len(ahead), 'node')}")
        ]
    message = f"the clock of {worst} is {skew:.1f} s {'ahead of' if ahead[worst] > 0 else 'behind'} rank 0's"
    level: Level = "error" if skew >= SKEW_ERROR_SECONDS else "warning"
    return [Finding("clocks", level, f"{message}: file times and the end of a job are misjudged",
                    f"timedatectl on {worst}: NTP must be active")]  # fmt: skip


def shared_folder(context: Context) -> list[Finding]:
    """Whether every rank sees in the run directory what rank 0 writes there."""
    import torch.distributed as dist

    mark = nearest_folder(context.run_dir) / f".tmp-doctor-{uuid.uuid4().hex[:8]}"
    written = False
    if context.topology.rank == 0:
        with contextlib.suppress(OSError):  # `checkpoints` says why
            mark.touch()
            written = True
    written, mark = gathered((written, mark), context)[0]
    seen = mark.exists()
    dist.barrier()
    if written and context.topology.rank == 0:
        with contextlib.suppress(OSError):
            mark.unlink()
    blind = [rank for rank, one in enumerate(gathered(seen, context)) if not one]
    if context.topology.rank != 0 or not written:
        return []
    if blind:
        ranks = shorten(map(str, blind))
        return [Finding("shared folder", "error", f"{mark.parent}: rank {ranks} cannot see what rank 0 writes there",
                        "a --run-dir on a file system that all nodes share")]  # fmt: skip
    return [Finding("shared folder", "ok", f"every rank sees {mark.parent}")]
