"""slurm/*.sbatch on a real SLURM of two nodes: what runs, what is repeated, and what is not."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.harness import ROOT, run_recipe_cli
from support.launching import TINY, write_text
from support.slurm import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.distributed, pytest.mark.timeout(200)]

PACED = str(ROOT / "tests" / "support" / "paced.py")
#: As in many containers there is no command of SLURM inside; it notes what of the environment comes in.
CONTAINER = """#!/bin/sh
echo "${SECRET-none} $NCCL_LOADED $(($SLURM_JOB_END_TIME / 1000000))" >> inside
PATH=/nowhere exec "$@"
"""
#: `module`, as sites define it, using a variable that is not set.
MODULE = {"BASH_FUNC_module%%": '() { export NCCL_LOADED="$UNSET$1-$2"; }'}
CPU = ["--device", "cpu", "--precision", "fp32"]


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def how(cluster: Cluster, job: str) -> Mapping[str, str]:
    return {name: cluster.field(job, name) for name in ("JobState", "ExitCode", "Restarts")}


def test_two_nodes_train_one_run_in_a_container_on_a_staged_copy(cluster: Cluster, project: Path) -> None:
    data = project / "data"
    data.mkdir()
    text = write_text(data)
    container = project / "container.sh"
    container.write_text(CONTAINER)
    container.chmod(0o755)
    (project / "slurm" / "site.toml").unlink()
    (project / "slurm" / "site.toml").write_text(
        f'container = ["{container}"]\ninterface = "lo"\nscratch = "$SCRATCH_HERE"\nmodules = ["cuda/12"]\n'
    )
    flags = [*TINY, *CPU, "--num-steps", "6", "--run-dir", "runs/mine"]
    job = cluster.submit(
        "--nodes=2", "--time=10", "slurm/train.sbatch", "--stage", str(data), "recipes/gpt.py", "--text", str(text),
        *flags, cwd=project, env={"SCRATCH_HERE": str(project / "disk"), "SECRET": "x", **MODULE},
    )  # fmt: skip
    uninterrupted = run_recipe_cli(
        ["--text", str(text), *flags[:-1], "runs/alone"], project, recipe=ROOT / "recipes" / "gpt.py", world_size=2
    )
    assert [rank.returncode for rank in uninterrupted] == [0, 0]
    assert cluster.wait(job) == "COMPLETED"
    assert how(cluster, job)["ExitCode"] == "0:0"
    output = (project / f"distkit-{job}.out").read_text()
    assert (output.count("copied to"), output.count("is there already")) == (1, 1)
    assert "slurm: runs/mine is completed, step 6" in output
    assert (project / "inside").read_text().splitlines() == [f"none load-cuda/12 {int(time.time()) // 10**6}"] * 4
    run = project / "runs" / "mine"
    assert read(run / "config.json")["text"].startswith(str(project / "disk"))
    assert read(run / "environment.json")["world_size"] == 2
    assert read(run / "environment.json")["local_world_size"] == 1
    alone = read(project / "runs" / "alone" / "summary.json")
    assert read(run / "summary.json")["state_digest"] == alone["state_digest"]


def test_a_rank_that_hangs_ends_the_job_and_the_next_attempt_goes_on(cluster: Cluster, project: Path) -> None:
    hang = {"DISTKIT_FAULT": "step:1:7:hang"}
    flags = [PACED, *CPU, "--watchdog-seconds", "5"]
    job = cluster.submit("--nodes=2", "slurm/train.sbatch", *flags, cwd=project, env=hang)
    # the second attempt hangs in the same step, and makes no progress
    assert cluster.wait(job) == "FAILED"
    assert cluster.field(job, "Restarts") == "1"
    run = project / "runs" / "paced" / f"slurm-{job}"
    cause = read(run / "status.json")["cause"]
    assert (cause["rank"], cause["phase"], cause["step"], cause["retryable"]) == (1, "step", 7, True)
    assert "has been in step 7 for" in cause["what_happened"]
    assert "faults.py" in (run / "stacks-rank-1.txt").read_text()
    # without the fault it goes on from there
    after = cluster.submit("--nodes=2", "slurm/train.sbatch", PACED, *CPU, "--run-dir", str(run), cwd=project)
    assert cluster.wait(after) == "COMPLETED"


def test_what_fails_is_not_repeated_for_ever(cluster: Cluster, project: Path) -> None:
    def submit(fault: str, *words: str, options: Sequence[str] = ()) -> str:
        env = {"DISTKIT_FAULT": fault} if fault else {}
        return cluster.submit(*options, "slurm/train.sbatch", *words, *CPU, cwd=project, env=env)

    raises, wrong = submit("step:0:7:raise", PACED), submit("", PACED, "--optim.lr", "much")
    # a rank for each of the job's two GPUs, which SLURM believes in
    gpus = cluster.call("python", "-m", "distkit", "slurm", "options", "--gpus", "2", cwd=project).split()
    dies = submit("step:1:7:kill", PACED, options=gpus)
    nowhere = submit("", "recipes/nowhere.py")
    ended = {job: (cluster.wait(job), cluster.field(job, "Restarts")) for job in (raises, wrong, dies, nowhere)}
    assert ended == {raises: ("FAILED", "0"), wrong: ("FAILED", "0"), dies: ("FAILED", "1"), nowhere: ("FAILED", "0")}
    says = {job: (project / f"distkit-{job}.out").read_text() for job in ended}
    assert "failed at step 7: the run failed in step 7: RuntimeError: DISTKIT_FAULT at step" in says[raises]
    assert f"slurm-{wrong} was not begun by this job" in says[wrong]
    assert "--optim.lr" in says[wrong]
    assert "there is no recipe recipes/nowhere.py" in says[nowhere]
    # both attempts, and why there is no third
    assert f"runs/paced/slurm-{dies} failed at step" in says[dies]
    assert says[dies].count("it goes on from the checkpoint of step 5") == 1
    assert says[dies].count("without a new checkpoint since the attempt before: the newest is that of step 5") == 1


def test_a_chain_goes_on_where_the_job_before_ended_and_ends_when_the_run_is_done(
    cluster: Cluster, project: Path
) -> None:
    (project / "chain.toml").write_text('continuation = "chain"')

    def submit(env: Mapping[str, str]) -> str:
        return cluster.submit(
            "--dependency=singleton", "--job-name=mine", "slurm/train.sbatch", "--site", "chain.toml", PACED,
            "--run-dir", "runs/mine", *CPU, cwd=project, env=env,
        )  # fmt: skip

    first, second, third = submit({"DISTKIT_FAULT": "step:0:7:kill"}), submit({}), submit({})
    assert [cluster.wait(job) for job in (first, second, third)] == ["FAILED", "COMPLETED", "CANCELLED"]
    assert [cluster.field(job, "Restarts") for job in (first, second)] == ["0", "0"]
    assert cluster.field(first, "ExitCode") == "75:0"
    assert "was killed: it goes on from the checkpoint of step 5" in (project / f"mine-{first}.out").read_text()
    status = read(project / "runs" / "mine" / "status.json")
    assert (status["state"], status["attempt"], status["step"]) == ("completed", 2, 20)
