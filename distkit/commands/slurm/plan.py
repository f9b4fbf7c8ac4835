"""What a batch script in slurm/ does in its job, decided before anything starts and printed as bash assignments."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from distkit.commands.parser import run_dir_of
from distkit.commands.slurm.meeting import choose_meeting
from distkit.commands.slurm.outcome import read_before
from distkit.commands.slurm.site import Site
from distkit.commands.slurm.stage import copy_name
from distkit.errors import ConfigError, shorten
from distkit.files import read_regular
from distkit.json_files import MAX_BYTES

#: What ranks inherit of the batch script's environment. SLURM adds its own variables.
ENVIRONMENT = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ", "TMPDIR", "XDG_*", "LD_LIBRARY_PATH",
    "CC", "CXX", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_*", "PYTHON*",
    "CUDA_*", "NVIDIA_*", "ROCR_*", "HIP_*", "ROCM_*", "NCCL_*", "RCCL_*",
    "GLOO_*", "UCX_*", "FI_*", "TORCH_*", "TORCHINDUCTOR_*", "PYTORCH_*", "TRITON_*", "OMP_*", "MKL_*", "KMP_*",
    "PET_SIGNALS_TO_HANDLE", "DISTKIT_*", "HF_*", "WANDB_*", "SSL_CERT_*", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "no_proxy", "APPTAINER*", "SINGULARITY*", "ENROOT_*",
)  # fmt: skip
#: What a launcher starts for each rank.
RANK = "distkit.commands.slurm.rank"


@dataclass(frozen=True)
class Plan:
    """Variables of a batch script by name: words, or lists of words; and those that it exports."""

    variables: Mapping[str, str | Sequence[str]]
    exports: Mapping[str, str]

    def to_bash(self) -> str:
        """For `eval`."""
        lines = [f"{name}={_quoted(value)}" for name, value in self.variables.items()]
        return "\n".join([*lines, *(f"export {name}={_quoted(value)}" for name, value in self.exports.items())])


def _quoted(value: str | Sequence[str]) -> str:
    return shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"


def train_plan(
    site: Site,
    env: Mapping[str, str],
    recipe: str,
    flags: Sequence[str],
    *,
    ranks: int | None = None,
    max_requeues: int | None = None,
    stage_from: str | None = None,
    sweep: Path | None = None,
) -> Plan:
    """The plan of slurm/train.sbatch.

    Args:
        site: the site's profile.
        env: the job's environment.
        recipe, flags: what to train.
        ranks: per node; None: its GPUs, or 1.
        max_requeues: None: the site's.
        stage_from: a folder to copy to local scratch first; flags that name it then name the copy.
        sweep: a file of flags, a line for each task of the job array.

    Raises:
        ConfigError: something in these does not fit.
    """
    _check_recipe(recipe)
    job, limit = _in_job(env, "SLURM_JOB_ID"), site.max_requeues if max_requeues is None else max_requeues
    _check_requeues(env, limit)
    if site.continuation == "chain" and sweep is not None:
        raise ConfigError("a sweep cannot be a chain", expected="jobs that requeue themselves",
                          got='continuation = "chain"', fix='continuation = "requeue" in slurm/site.toml')  # fmt: skip
    task = _in_job(env, "SLURM_ARRAY_TASK_ID", "sbatch --array=1-3 slurm/sweep.sbatch FILE RECIPE") if sweep else ""
    if sweep is not None:
        if run_dir_of(flags) is not None:
            raise ConfigError("one run directory for a whole sweep", expected="one for each task",
                              fix=f"--run-dir DIR on each line of {sweep}, or nowhere")  # fmt: skip
        flags = [*flags, *sweep_flags(sweep, int(task))]
    run_dir, flags = _with_run_dir(site, env, recipe, flags)
    staged = None if stage_from is None else _staged_copy(site, env, stage_from)
    if stage_from is not None and staged is not None:
        flags = moved_to(flags, stage_from, staged)
    nodes = int(_in_job(env, "SLURM_JOB_NUM_NODES"))
    meeting = choose_meeting(nodes, site.interface)
    exports = _exports(env, meeting.interface)
    per_node = str(ranks or env.get("SLURM_GPUS_ON_NODE") or 1)
    python = site.python or sys.executable
    launcher = [python, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={per_node}",
                f"--master-addr={meeting.address}", f"--master-port={meeting.port}", "--module", RANK]  # fmt: skip
    return Plan(
        {
            "job": f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_JOB_ID" in env else job,
            "run_dir": str(run_dir),
            "before": str(read_before(run_dir)),
            "max_requeues": str(limit),
            "continuation": site.continuation,
            "modules": site.modules,
            "stage_from": str(stage_from or ""),
            "stage_to": str(staged or ""),
            "srun_options": site.srun,
            "container": site.container,
            "interpreter": python,
            "ranks": [*site.container, *launcher, recipe, *flags],
        },
        exports,
    )


def debug_plan(site: Site, env: Mapping[str, str], recipe: str, flags: Sequence[str]) -> Plan:
    """The plan of slurm/debug.sbatch: one process, no run directory.

    Raises:
        ConfigError: the recipe is no file, or this is no job.
    """
    _check_recipe(recipe)
    _in_job(env, "SLURM_JOB_ID")
    command = [*site.container, site.python or sys.executable, recipe, *flags]
    return Plan(
        {
            "modules": site.modules,
            "srun_options": site.srun,
            "process": command if "--debug" in flags else [*command, "--debug"],
        },
        _exports(env, "lo"),
    )


def environment_list(site: Site, env: Mapping[str, str]) -> str:
    """The names of `env` that ranks inherit, as srun --export wants them; to be asked when modules are loaded."""
    allowed = (*ENVIRONMENT, *site.environment)
    return ",".join(sorted(name for name in env if any(fnmatchcase(name, pattern) for pattern in allowed)))


def sweep_flags(file: Path, task: int) -> list[str]:
    """The flags on line `task` (from 1) of `file`; empty lines and those that begin with # do not count.

    Raises:
        ConfigError: there is no such file or line.
    """
    try:
        text = read_regular(file, MAX_BYTES).decode()
        numbered = enumerate(map(str.strip, text.splitlines()), 1)
        lines = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the sweep {file}", expected="a text file, the flags of a run on each line",
                          got=error) from error  # fmt: skip
    if not 1 <= task <= len(lines):
        raise ConfigError(f"{file} has {len(lines)} lines of flags, and this is array task {task}",
                          expected=f"tasks from 1 to {len(lines)}", fix=f"sbatch --array=1-{len(lines)} …")  # fmt: skip
    number, line = lines[task - 1]
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError(
            f"line {number} of {file} is not a line of flags", expected="quotes in pairs", got=line
        ) from error


def _check_recipe(recipe: str) -> None:
    if not Path(recipe).is_file():
        raise ConfigError(f"there is no recipe {recipe}", expected="a Python file, after the script's own options",
                          got=f"{Path.cwd() / recipe}", fix="sbatch slurm/train.sbatch recipes/gpt.py")  # fmt: skip


def _in_job(env: Mapping[str, str], name: str, fix: str = "sbatch slurm/train.sbatch RECIPE") -> str:
    if not env.get(name):
        raise ConfigError(f"{name} is not set", expected="to run in a job of SLURM", fix=fix)
    return env[name]


def _check_requeues(env: Mapping[str, str], limit: int) -> None:
    """SLURM also requeues by itself, after the death of a node: then no batch script has looked at the limit."""
    if int(env.get("SLURM_RESTART_COUNT", "0")) > limit:
        raise ConfigError(f"this job was requeued {env['SLURM_RESTART_COUNT']} times", expected=f"at most {limit}",
                          fix="sbatch again with the same --run-dir goes on")  # fmt: skip


def _with_run_dir(site: Site, env: Mapping[str, str], recipe: str, flags: Sequence[str]) -> tuple[Path, list[str]]:
    """The run directory, and the flags with it: an attempt must find that of the attempt before."""
    given = run_dir_of(flags)
    if given is not None:
        return Path(given), list(flags)
    if site.continuation == "chain":
        raise ConfigError("a chain needs --run-dir", expected="one run directory for all its jobs",
                          fix=f"sbatch … slurm/train.sbatch {recipe} --run-dir runs/NAME")  # fmt: skip
    name = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        name = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    run_dir = Path("runs") / Path(recipe).stem / f"slurm-{name}"
    return run_dir, ["--run-dir", str(run_dir), *flags]


def _staged_copy(site: Site, env: Mapping[str, str], source: str) -> Path:
    scratch = os.path.expandvars(site.scratch)
    if not scratch or "$" in scratch:
        raise ConfigError(f"--stage {source}: which folder of a node?", expected="scratch in slurm/site.toml",
                          got=site.scratch or "nothing", fix='scratch = "/tmp"')  # fmt: skip
    return Path(scratch) / f"distkit-{env.get('USER', os.getuid())}" / copy_name(Path(source))


def moved_to(flags: Sequence[str], source: str, copy: Path) -> list[str]:
    """`flags` with the copy in place of `source`, where it is written like that.

    Raises:
        ConfigError: none of them names it.
    """
    moved = []
    for flag in flags:
        option, sign, value = flag.rpartition("=") if flag.startswith("--") else ("", "", flag)
        inside = value == source or value.startswith(f"{source.rstrip('/')}/")
        moved.append(f"{option}{sign}{copy}{value.removeprefix(source.rstrip('/'))}" if inside else flag)
    if moved == list(flags):
        raise ConfigError(f"--stage {source}, but no flag of the recipe names it", expected="the same words in both",
                          got=shorten((flag.partition("=")[0] for flag in flags if flag.startswith("--")), 6),
                          fix=f"--data.root {source}")  # fmt: skip
    return moved


def _exports(env: Mapping[str, str], interface: str) -> dict[str, str]:
    """What the batch script adds to the environment.

    The launchers are told to handle a signal that nobody sends; the batch script lets them ignore the others. See
    `distkit.commands.slurm.rank`.
    """
    exports = {"PET_SIGNALS_TO_HANDLE": "SIGQUIT"}
    if interface:
        exports |= {name: interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in env}
    if "SLURM_CPUS_PER_TASK" in env:
        exports["SRUN_CPUS_PER_TASK"] = env["SLURM_CPUS_PER_TASK"]  # which srun does not inherit since 22.05
    return exports
