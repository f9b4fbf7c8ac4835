"""The plan of a batch script: what follows from the site, the job and the arguments."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import ROOT

from distkit.commands import run
from distkit.commands.slurm.plan import Plan, debug_plan, environment_list, sweep_flags, train_plan
from distkit.commands.slurm.site import Site
from distkit.errors import ConfigError

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
TASK = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("my recipe.py").touch()
    return "my recipe.py"


def test_one_launcher_for_the_nodes_and_ranks_of_the_job(recipe: str) -> None:
    site = Site(interface="lo", python="python3", container=("apptainer", "exec", "i.sif"), srun=("--mpi=none",))
    env = {**JOB, "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "8"}
    plan = train_plan(site, env, recipe, ["--seed", "1"])
    *launcher, port, module, rank, name, run_dir_flag, run_dir, seed, one = plan.variables["ranks"]
    assert launcher == ["apptainer", "exec", "i.sif", "python3", "-m", "torch.distributed.run", "--nnodes=2",
                        "--nproc-per-node=4", "--master-addr=127.0.0.1"]  # fmt: skip
    assert port.startswith("--master-port=")
    assert (module, rank) == ("--module", "distkit.commands.slurm.rank")
    assert [name, run_dir_flag, run_dir, seed, one] == [recipe, "--run-dir", "runs/my recipe/slurm-7", "--seed", "1"]
    assert plan.variables["srun_options"] == ("--mpi=none",)
    assert plan.exports["GLOO_SOCKET_IFNAME"] == plan.exports["NCCL_SOCKET_IFNAME"] == "lo"
    assert plan.exports["SRUN_CPUS_PER_TASK"] == "8"
    again = train_plan(site, {**env, "NCCL_SOCKET_IFNAME": "ib1"}, recipe, [], ranks=3)
    assert "NCCL_SOCKET_IFNAME" not in again.exports
    assert "--nproc-per-node=3" in again.variables["ranks"]


def test_bash_reads_what_is_printed(recipe: str) -> None:
    hostile = 'it\'s $HOME `id` "x"\n* '
    plan = Plan({"word": hostile, "words": [hostile, "", "b"], "none": ()}, {"GIVEN": hostile})
    script = f'set -u\n{plan.to_bash()}\npython3 -c "import os,sys,json; print(json.dumps([sys.argv[1:], ' \
             'os.environ[\'GIVEN\']]))" "$word" "${#words[@]}" "${#none[@]}" "${words[@]}"'  # fmt: skip
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == [[hostile, "3", "0", hostile, "", "b"], hostile]


def test_the_environment_of_ranks_is_a_list_of_names() -> None:
    env = dict.fromkeys(["PATH", "LC_ALL", "NCCL_DEBUG", "RANK", "MASTER_PORT", "AWS_SECRET", "MY_A", "TORCHELASTIC_X"])
    assert environment_list(Site(environment=("MY_*",)), env) == "LC_ALL,MY_A,NCCL_DEBUG,PATH"  # type: ignore[arg-type]


def test_the_run_directory_is_the_same_in_each_attempt(recipe: str) -> None:
    def run_dir(flags: list[str], env: dict[str, str], **options: Path) -> object:
        return train_plan(Site(), {**JOB, **env}, recipe, flags, **options).variables["run_dir"]  # type: ignore[arg-type]

    assert run_dir([], {"SLURM_RESTART_COUNT": "3"}) == "runs/my recipe/slurm-7"
    assert run_dir([], TASK) == "runs/my recipe/slurm-5_2"
    assert run_dir(["--run-dir", "a"], {}) == run_dir(["--run-dir=a"], {}) == "a"
    Path("sweep").write_text("--seed 1\n# a comment\n\n--run-dir 'the second' --seed 2\n")
    assert run_dir([], TASK, sweep=Path("sweep")) == "the second"
    assert train_plan(Site(), {**JOB, **TASK}, recipe, []).variables["job"] == "5_2"


def test_how_the_run_stood_before(recipe: str) -> None:
    checkpoints = Path("there/checkpoints/step-000000030")
    checkpoints.mkdir(parents=True)
    Path("there/status.json").write_text('{"state": "preempted", "step": 30, "attempt": 2}')
    plan = train_plan(Site(max_requeues=5), JOB, recipe, ["--run-dir", "there"])
    assert (plan.variables["before"], plan.variables["max_requeues"]) == ("2:30", "5")
    assert train_plan(Site(), JOB, recipe, ["--run-dir", "new"]).variables["before"] == "0:-1"


def test_staging_moves_the_flags_that_name_the_folder(recipe: str, tmp_path: Path) -> None:
    Path("data/train").mkdir(parents=True)
    site = Site(scratch="$NODE_DISK/x")
    os.environ["NODE_DISK"] = str(tmp_path / "disk")
    try:
        flags = ["--data.root=data", "--tokens", "data/train", "--note", "database", "--other=./data"]
        plan = train_plan(site, {**JOB, "USER": "me"}, recipe, flags, stage_from="data")
    finally:
        del os.environ["NODE_DISK"]
    copy = str(plan.variables["stage_to"])
    assert copy.startswith(str(tmp_path / "disk/x/distkit-me/data-"))
    assert plan.variables["ranks"][-6:] == [
        f"--data.root={copy}",
        "--tokens",
        f"{copy}/train",
        "--note",
        "database",
        "--other=./data",
    ]


def test_debugging_is_one_process_without_a_run_directory(recipe: str) -> None:
    plan = debug_plan(Site(python="py"), JOB, recipe, ["--seed", "2"])
    assert plan.variables["process"] == ["py", recipe, "--seed", "2", "--debug"]
    assert debug_plan(Site(python="py"), JOB, recipe, ["--debug"]).variables["process"] == ["py", recipe, "--debug"]


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (["nowhere.py"], {}, "no recipe nowhere.py"),
        (["--rank", "2", "my recipe.py"], {}, "unrecognized arguments: --rank"),
        (["--ranks", "0", "my recipe.py"], {}, "0 is not 1 or more"),
        (["my recipe.py"], {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set"),
        (["my recipe.py"], {"SLURM_RESTART_COUNT": "101"}, "requeued 101 times"),
        (["--sweep", "sweep", "my recipe.py"], {}, "sbatch --array"),
        (["--sweep", "nowhere", "my recipe.py"], TASK, "cannot read the sweep"),
        (["--sweep", "sweep", "my recipe.py"], {**TASK, "SLURM_ARRAY_TASK_ID": "3"}, "--array=1-2"),
        (["--sweep", "sweep", "my recipe.py"], TASK, "quotes in pairs"),
        (["--sweep", "sweep", "my recipe.py", "--run-dir", "x"], TASK, "one for each task"),
        (["--stage", "data", "my recipe.py", "--root", "data"], {}, "scratch"),
        (["--site", "chain.toml", "my recipe.py"], {}, "a chain needs --run-dir"),
        (["--site", "chain.toml", "--sweep", "sweep", "my recipe.py"], TASK, "cannot be a chain"),
        (["--site", "nowhere.toml", "my recipe.py"], {}, "no site profile"),
        (["--site", "scratch.toml", "--stage", "data", "my recipe.py", "--seed", "1"], {}, "no flag of the recipe"),
        (["--site", "scratch.toml", "--stage", "data2", "my recipe.py"], {}, "is no folder"),
        (["--site", "unset.toml", "--stage", "data", "my recipe.py"], {}, "$NOT_SET_HERE"),
    ],
)
def test_a_mistake_ends_it_before_anything_starts(
    words: list[str],
    env: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("slurm").mkdir()
    Path("slurm/site.toml").touch()
    Path("chain.toml").write_text('continuation = "chain"')
    Path("scratch.toml").write_text('scratch = "."')
    Path("unset.toml").write_text('scratch = "$NOT_SET_HERE"')
    Path("sweep").write_text("--seed 1\n--text 'half\n")
    Path("data").mkdir()
    for name, value in {**JOB, **env}.items():
        monkeypatch.setenv(name, value)
    assert run(["slurm", "plan", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) < 10


def test_the_command_prints_a_plan(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("site.toml").write_text('modules = ["cuda/12 x"]')
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    assert run(["slurm", "plan", "--site", "site.toml", "--max-requeues", "3", recipe, "--ranks", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "modules=('cuda/12 x')" in lines
    assert "max_requeues=3" in lines
    (ranks,) = (line for line in lines if line.startswith("ranks="))
    assert shlex.split(ranks)[-2:] == ["--ranks", "9)"]
    assert run(["slurm", "debug-plan", "--site", "site.toml", recipe]) == 0
    assert f"'{recipe}' --debug" in capsys.readouterr().out
    assert run(["slurm", "environment", "--site", "site.toml"]) == 0
    assert "PATH" in capsys.readouterr().out.strip().split(",")
    assert run(["slurm", "options", "--site", "site.toml", "--gpus", "2"]) == 0
    assert capsys.readouterr().out == "--gpus-per-node=2\n"


def test_a_line_of_a_sweep() -> None:
    Path("sweep").write_text("\n# first\n--a 'b c'\n\n  --d=e  \n")
    assert sweep_flags(Path("sweep"), 1) == ["--a", "b c"]
    assert sweep_flags(Path("sweep"), 2) == ["--d=e"]
    with pytest.raises(ConfigError):
        sweep_flags(Path("sweep"), 0)


def test_it_needs_nothing_but_the_standard_library(recipe: str) -> None:
    """The batch script's Python may be another one than the ranks', which is in a container."""
    Path("site.toml").touch()
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **JOB}
    for words in (["plan", "--site", "site.toml", recipe], ["requeue", "nowhere", "--max-requeues", "1"]):
        command = [sys.executable, "-S", "-m", "distkit", "slurm", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (int(words[0] == "requeue"), "")
