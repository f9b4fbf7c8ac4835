"""Which process this is, read from what the launcher left in the environment. No torch: a wrong launch fails early."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from distkit.errors import LaunchError
from distkit.runtime.local_ranks import LOOPBACK

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
#: (world size, rank, local rank, local world size) as Open MPI and MVAPICH2 name them.
MPI_NAMES = (
    (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The processes of a run and this one's place among them."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = "python"
    master_addr: str | None = None
    master_port: int | None = None

    @property
    def is_main_process(self) -> bool:
        """True on rank 0, the one that prints and writes."""
        return self.rank == 0


def read_topology(env: Mapping[str, str]) -> Topology:
    """Read the launcher's variables: torchrun and accelerate, then srun, then mpirun, else one process.

    Raises:
        LaunchError: the variables contradict each other, or more processes were asked for than started.
    """
    if "WORLD_SIZE" in env:
        return _from_torchrun(env)
    if _slurm_step_size(env) > 1:
        return _from_srun(env)
    for names in MPI_NAMES:
        if names[0] in env and _number(env, names[0], "mpirun") > 1:
            return _from_mpirun(env, names)
    guard_single_process(env)
    return Topology(launcher="accelerate" if "ACCELERATE_MIXED_PRECISION" in env else "python")


def rank_for_messages(env: Mapping[str, str]) -> int:
    """This process's rank as far as it can be told from variables that `read_topology` may refuse; else 0."""
    for name in ("RANK", "SLURM_PROCID", *(names[1] for names in MPI_NAMES)):
        if env.get(name, "").isdigit():
            return int(env[name])
    return 0


def node_name(env: Mapping[str, str]) -> str:
    """This machine, as SLURM calls it where it has a say."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def threads_from_env(env: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS; None where it is unset or 1, which launchers write unasked.

    Raises:
        LaunchError: it is not a number.
    """
    # OpenMP takes a list, one number per level of nesting
    text = (env.get("OMP_NUM_THREADS") or "1").partition(",")[0].strip()
    if not text.isdigit():
        raise LaunchError(f"OMP_NUM_THREADS={text} is not a number", expected="a number of threads",
                          fix="unset OMP_NUM_THREADS, or --num-threads 2")  # fmt: skip
    return int(text) if int(text) > 1 else None


def guard_single_process(env: Mapping[str, str]) -> None:
    """Raise LaunchError when a launcher was asked for several processes and started this one alone.

    `accelerate launch --num_processes 2` writes MASTER_ADDR but no WORLD_SIZE when it falls back to one process.
    """
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        raise LaunchError(
            "accelerate launch was asked for several processes and started one",
            expected="as many processes as --num_processes says",
            got="1 process (its CPU and no-GPU paths start only one)",
            fix="torchrun --nproc-per-node N RECIPE, or accelerate launch --multi_gpu --num_processes N RECIPE",
        )
    tasks = _number(env, "SLURM_NTASKS", "SLURM") if "SLURM_NTASKS" in env else 1
    if tasks > 1 and "SLURM_JOB_ID" in env and _slurm_step_size(env) == 0:
        raise LaunchError(
            f"SLURM gave this job {tasks} tasks, but this process was started alone",
            expected=f"{tasks} processes",
            got="1 process outside of any srun step",
            fix="srun python RECIPE, or ask for one task with --ntasks=1",
        )


def _number(env: Mapping[str, str], name: str, launcher: str) -> int:
    value = env.get(name)
    if value is None or not value.isdigit():
        raise LaunchError(
            f"{launcher} started this process with a {name} that is not a rank or a count",
            expected=f"{name} to be a whole number",
            got="nothing" if value is None else value,
            fix="torchrun --nproc-per-node N RECIPE, or unset what the launcher left in the environment",
        )
    return int(value)


def _optional(env: Mapping[str, str], name: str, launcher: str, default: int) -> int:
    return _number(env, name, launcher) if name in env else default


def _from_torchrun(env: Mapping[str, str]) -> Topology:
    launcher = "accelerate" if "ACCELERATE_MIXED_PRECISION" in env else "torchrun"
    world_size, rank = _number(env, "WORLD_SIZE", launcher), _number(env, "RANK", launcher)
    if rank >= world_size:
        raise LaunchError(f"RANK={rank} is not below WORLD_SIZE={world_size}", fix="torchrun --nproc-per-node N RECIPE")
    if world_size > 1:
        for name in RENDEZVOUS:
            if name not in env:
                raise LaunchError(
                    f"WORLD_SIZE={world_size} but {name} is not set: the ranks cannot find each other",
                    expected="the address and port of rank 0 in MASTER_ADDR and MASTER_PORT",
                    fix="torchrun --nproc-per-node N RECIPE",
                )
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=_optional(env, "LOCAL_RANK", launcher, rank),
        local_world_size=_optional(env, "LOCAL_WORLD_SIZE", launcher, world_size),
        launcher=launcher,
        master_addr=env.get("MASTER_ADDR"),
        master_port=_number(env, "MASTER_PORT", launcher) if "MASTER_PORT" in env else None,
    )


def _slurm_step_size(env: Mapping[str, str]) -> int:
    """Tasks of the srun step this process belongs to; 0 outside of one."""
    inside = "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env
    return _number(env, "SLURM_STEP_NUM_TASKS", "srun") if inside else 0


def _from_srun(env: Mapping[str, str]) -> Topology:
    node, job = _number(env, "SLURM_NODEID", "srun"), _number(env, "SLURM_JOB_ID", "srun")
    local_sizes = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    hosts = env.get("SLURM_STEP_NODELIST", "")
    if node >= len(local_sizes) or not hosts:
        raise LaunchError(
            "srun did not say where its tasks are",
            expected="SLURM_STEP_TASKS_PER_NODE and SLURM_STEP_NODELIST in the environment",
            got=f"{env.get('SLURM_STEP_TASKS_PER_NODE')} and {hosts or None}",
            fix="srun python RECIPE",
        )
    return Topology(
        rank=_number(env, "SLURM_PROCID", "srun"),
        world_size=_slurm_step_size(env),
        local_rank=_number(env, "SLURM_LOCALID", "srun"),
        local_world_size=local_sizes[node],
        launcher="srun",
        master_addr=env.get("MASTER_ADDR") or (LOOPBACK if len(local_sizes) == 1 else _first_host(hosts)),
        # Any port that all tasks of a job derive alike and two jobs on a node rarely share.
        master_port=_optional(env, "MASTER_PORT", "srun", 20_000 + job % 20_000),
    )


def tasks_per_node(text: str) -> list[int]:
    """SLURM's `2(x3),1` -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    return counts


def _first_host(nodelist: str) -> str:
    if "[" not in nodelist:
        return nodelist.split(",")[0]
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise LaunchError(
            f"cannot tell the first host of SLURM's node list {nodelist}",
            expected="scontrol on this node, or MASTER_ADDR set by the batch script",
            got=error,
            fix="export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)",
        ) from error


def _from_mpirun(env: Mapping[str, str], names: tuple[str, str, str, str]) -> Topology:
    world_size, rank, local_rank, local_world_size = (_number(env, name, "mpirun") for name in names)
    if "MASTER_ADDR" not in env and local_world_size != world_size:
        raise LaunchError(
            "mpirun started ranks on several machines, and MASTER_ADDR is not set",
            expected="the host name of rank 0 in MASTER_ADDR",
            fix="mpirun -x MASTER_ADDR=HOST …",
        )
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        launcher="mpirun",
        master_addr=env.get("MASTER_ADDR", LOOPBACK),
        master_port=_optional(env, "MASTER_PORT", "mpirun", 29_500),
    )
