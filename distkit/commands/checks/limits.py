"""What data workers need against what this node and its limits give: shared memory, cores, memory, processes."""

from __future__ import annotations

import math
import os
import resource
import shutil
from pathlib import Path

import psutil

from distkit.commands.checks import cgroup
from distkit.commands.checks.finding import Context, Finding, counted, in_words

#: A batch in /dev/shm: a hundred images of 224 x 224 in fp32 have 57 MiB.
BATCH_BYTES = 2**26
#: With less in /dev/shm not even batches of small images pass.
LEAST_BYTES = 2**24
#: Batches that a worker prepares ahead (`--data.prefetch-depth`).
PREFETCH_DEPTH = 2
#: Descriptors that a DataLoader's worker takes in its rank: its pipes, its sentinel, batches on their way.
FILES_PER_WORKER = 8
SHARED_MEMORY = Path("/dev/shm")


def workers_of(context: Context) -> int:
    """Data workers of one rank: the given number, or what `--data.num-workers None` starts."""
    from distkit.runtime.process import available_cores

    return available_cores(context.local_world_size) if context.data_workers is None else context.data_workers


def _crew(ranks: int, workers: int) -> str:
    return f"{counted(ranks, 'rank')} with {counted(workers, 'data worker')}" + (" each" if ranks > 1 else "")


def shared_memory(context: Context) -> list[Finding]:
    """/dev/shm against the batches that data workers hand over in it."""
    if not SHARED_MEMORY.is_dir():
        return [Finding("shared memory", "ok", "this system has no /dev/shm")]
    free, workers = shutil.disk_usage(SHARED_MEMORY).free, workers_of(context) * context.local_world_size
    need = workers * PREFETCH_DEPTH * BATCH_BYTES
    message = f"/dev/shm has {in_words(free)} free"
    if free >= max(need, LEAST_BYTES):
        return [Finding("shared memory", "ok", message)]
    remedy = "docker run --shm-size=16g (or --ipc=host), mount -o remount,size=16g /dev/shm, or fewer data workers"
    if free < LEAST_BYTES:
        return [Finding("shared memory", "error", f"{message}: data workers hand over their batches there", remedy)]
    message += f"; {counted(workers, 'data worker')} may hold {in_words(need)} in batches of {in_words(BATCH_BYTES)}"
    return [Finding("shared memory", "warning", message, remedy)]


def cores(context: Context) -> list[Finding]:
    """Affinity and CPU quota against ranks and data workers."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, ranks, workers = cgroup.limits().cpus, context.local_world_size, workers_of(context)
    message = f"{allowed} of {os.cpu_count()} cores for {_crew(ranks, workers)}"
    found = []
    if ranks > allowed:
        found.append(
            Finding("cores", "warning", message, f"--cpus-per-task, or at most {counted(allowed, 'rank')} per node")
        )
    elif ranks * workers > allowed:
        found.append(Finding("cores", "warning", message, f"--data.num-workers {max(1, allowed // ranks)}, or more "
                             "cores (--cpus-per-task, taskset)"))  # fmt: skip
    if quota is not None and quota < allowed:
        many = max(1, math.floor(quota / ranks))
        found.append(Finding("cores", "warning", f"the control group gives the time of {quota:g} of {allowed} cores: "
                             "threads and workers that are chosen by cores would be too many",
                             f"--num-threads {many} --data.num-workers {many}"))  # fmt: skip
    return found or [Finding("cores", "ok", message)]


def memory(context: Context) -> list[Finding]:
    """Memory of this node and of its control group against ranks and data workers, then the copy of an async save."""
    from distkit.checkpoint.saver import STAGING_SHARE

    ranks, workers = context.local_world_size, workers_of(context)
    each, total = psutil.Process().memory_info().rss, psutil.virtual_memory()
    limit = min(total.total, cgroup.limits().memory or total.total)
    need, what = ranks * (1 + workers) * each, _crew(ranks, workers)
    remedy = "fewer --data.num-workers, or more memory (--mem)"
    if need > limit:
        message = f"{what} need about {in_words(need)}, and the limit here is {in_words(limit)}"
        return [Finding("memory", "error", message, remedy)]
    if need > min(limit, total.available):
        message = f"{what} need about {in_words(need)}, and {in_words(total.available)} are free"
        return [Finding("memory", "warning", message, f"{remedy}, or end what else runs here")]
    share = 0 if context.footprint is None else context.footprint.nbytes * ranks // context.topology.world_size
    if share > STAGING_SHARE * (min(limit, total.available) - need):
        message = f"the copy of {in_words(share)} for a save in the background does not fit into half of what is left"
        return [Finding("memory", "warning", f"{message}: training waits for its saves", "more memory (--mem)")]
    return [Finding("memory", "ok", f"{in_words(limit)}; {what} need about {in_words(need)} before model and data")]


def processes(context: Context) -> list[Finding]:
    """Limits of this process: open files, address space, processes and threads."""
    workers, ranks = workers_of(context), context.local_world_size
    found = []
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = psutil.Process().num_fds() + FILES_PER_WORKER * workers
    if files != resource.RLIM_INFINITY and files < need:
        message = f"{files} files may be open, and {counted(workers, 'data worker')} need about {need}"
        found.append(Finding("limits", "error", message, "ulimit -n 65536, or fewer --data.num-workers"))
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        message = f"the address space is limited to {in_words(space)}: CUDA and memory-mapped data need far more of it"
        found.append(Finding("limits", "warning", f"{message} than of memory", "ulimit -v unlimited"))
    threads = ranks * (1 + workers) * psutil.Process().num_threads()
    room = _room_for_threads()
    if room is not None and room < threads:
        message = f"{max(room, 0)} more processes and threads may be started, and {threads} are needed for "
        found.append(Finding("limits", "error", message + _crew(ranks, workers),
                             "ulimit -u, a larger pids.max, or fewer --data.num-workers"))  # fmt: skip
    return found or [Finding("limits", "ok", f"{'unlimited' if files < 0 else files} open files")]


def _room_for_threads() -> int | None:
    """Processes and threads that this user may still start; None: any number."""
    rooms = []
    group = cgroup.limits().processes
    if group is not None:
        rooms.append(group[0] - group[1])
    most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if most != resource.RLIM_INFINITY and os.getuid() != 0:  # root may start any number
        mine = [p.info["num_threads"] or 0 for p in psutil.process_iter(["uids", "num_threads"])
                if p.info["uids"] and p.info["uids"].real == os.getuid()]  # fmt: skip
        rooms.append(most - sum(mine))
    return min(rooms, default=None)
