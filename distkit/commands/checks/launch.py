"""Ranks against what the launcher and SLURM were asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping

from distkit.commands.checks.finding import Context, Finding, counted
from distkit.runtime.topology import tasks_per_node

NAME = "launch"


def launch(context: Context) -> list[Finding]:
    """The launcher's variables, SLURM's tasks and CPUs per task."""
    if context.launch_error is not None:
        what, *rest = context.launch_error.splitlines()
        fix = next((line.partition(":")[2].strip() for line in rest if "type:" in line), "torchrun, srun or python")
        return [Finding(NAME, "error", what, fix)]
    found = [] if "SLURM_JOB_ID" not in context.env else [*_tasks(context), *_cpus(context.env)]
    return found or [Finding(NAME, "ok", _described(context))]


def _described(context: Context) -> str:
    world, nodes = context.topology.world_size, context.num_nodes
    ranks = "1 process" if world == 1 else f"{world} ranks on {counted(nodes, 'node')}"
    job = context.env.get("SLURM_JOB_ID")
    return f"{ranks}, started by {context.topology.launcher}" + (f" in SLURM job {job}" if job else "")


def _tasks(context: Context) -> list[Finding]:
    env, topology = context.env, context.topology
    nodes = _count(env, "SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    local = context.local_world_size
    step = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _count(env, "SLURM_NODEID") or 0
    tasks = step[node] if node < len(step) else 1
    if topology.launcher != "srun" and topology.world_size > 1 and tasks > 1:
        message = (
            f"srun started {tasks} tasks on this node, and each of them is a launcher with {counted(local, 'rank')}"
        )
        return [Finding(NAME, "error", message, f"srun --ntasks-per-node=1 for {topology.launcher}, "
                        "or srun python RECIPE without it")]  # fmt: skip
    if nodes and topology.world_size > 1 and topology.world_size != nodes * local and topology.launcher != "srun":
        message = f"{counted(nodes, 'node')} with {counted(local, 'rank')} each, and WORLD_SIZE={topology.world_size}"
        return [Finding(NAME, "error", message,
                        f"torchrun --nnodes {nodes} --nproc-per-node {local}, once on each node")]  # fmt: skip
    per_node = _count(env, "SLURM_NTASKS_PER_NODE")
    if per_node and per_node != local and (topology.launcher == "srun" or per_node > 1):
        message = (
            f"SLURM was asked for {counted(per_node, 'task')} per node, and this node has {counted(local, 'rank')}"
        )
        return [Finding(NAME, "warning", message, f"--ntasks-per-node={local}, or {per_node} ranks per node")]
    in_step, in_job = _count(env, "SLURM_STEP_NUM_NODES"), _count(env, "SLURM_JOB_NUM_NODES")
    if in_step and in_job and in_step < in_job:
        return [Finding(NAME, "warning", f"this step uses {in_step} of the {in_job} nodes of its job",
                        f"srun --nodes={in_job}, unless other steps use them")]  # fmt: skip
    return []


def _cpus(env: Mapping[str, str]) -> list[Finding]:
    """Since SLURM 22.05 srun does not take --cpus-per-task from the job."""
    asked = _count(env, "SLURM_CPUS_PER_TASK")
    in_step = "SLURM_STEP_ID" in env and "SLURM_PROCID" in env
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked and in_step and mine < asked:
        message = f"SLURM was asked for {asked} CPUs per task, and this process may use {mine}"
    elif asked and not in_step and "SRUN_CPUS_PER_TASK" not in env:
        message = f"the job asks for {asked} CPUs per task, and srun does not take this from the job"
    else:
        return []
    return [Finding(NAME, "warning", message, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun")]


def _count(env: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is set to a whole number."""
    return next((int(env[name]) for name in names if env.get(name, "").isdecimal()), None)
