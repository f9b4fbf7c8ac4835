"""`distkit submit` and `distkit jobs` on a real SLURM: from a recipe to a run that is done."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.harness import ROOT, run_recipe_cli
from support.slurm import Cluster, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.distributed, pytest.mark.timeout(240)]

PACED = ROOT / "tests" / "support" / "paced.py"
FLAGS = ["--num-steps", "40", "--device", "cpu", "--precision", "fp32"]
SLOWLY = ["--pause-seconds", "0.1"]
#: A recipe of two files, as a person may have it.
RECIPE = "from distkit import main\nfrom helper_of_mine import RECIPE\n\nif __name__ == '__main__':\n    main(RECIPE)\n"


def distkit(cluster: Cluster, project: Path, *words: str) -> str:
    return cluster.call("python", "-m", "distkit", *words, cwd=project)


def submit(cluster: Cluster, project: Path, *words: str) -> tuple[str, ...]:
    """The numbers of the jobs."""
    said = distkit(cluster, project, "submit", *words)
    found = re.match(r"submitted jobs? ([\d, ]+):", said)
    assert found, said
    return tuple(found[1].split(", "))


def jobs(cluster: Cluster, project: Path) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in json.loads(distkit(cluster, project, "jobs", "--json"))}


def attempts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def digest(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["state_digest"])


def undisturbed(folder: Path, world_size: int, *flags: str) -> str:
    folder.mkdir()
    ended = run_recipe_cli([*FLAGS, *flags, "--run-dir", "run"], folder, recipe=PACED, world_size=world_size)
    assert {rank.returncode for rank in ended} == {0}
    return digest(folder / "run")


def test_what_was_submitted_runs_over_two_nodes_whatever_is_edited_afterwards(cluster: Cluster, project: Path) -> None:
    mine = project / "mine"
    mine.mkdir()
    shutil.copy(PACED, mine / "helper_of_mine.py")
    (mine / "mine.py").write_text(RECIPE)
    options = ["--nodes", "2", "--time", "0:10:00", "--sbatch=--hold"]
    words = ["mine/mine.py", *options, "--", "--run-dir", "runs/a b", *FLAGS]
    (job,) = submit(cluster, project, *words)
    waiting = jobs(cluster, project)["runs/a b"]
    assert (waiting["job"], waiting["state"], waiting["attempts"]) == (job, "submitted", 0)
    assert waiting["scheduler"] == "PENDING (JobHeldUser)"
    assert f"submitted as job {job}, not begun yet" in distkit(cluster, project, "show", "runs/a b")
    refused = cluster.call("bash", "-c", '! python -m distkit "$@" 2>&1', "x", "submit", *words, cwd=project)
    assert f"scancel {job}" in refused

    for file in mine.iterdir():
        file.write_text("raise SystemExit('an edit')")
    (project / "slurm" / "site.toml").unlink()
    cluster.call("scontrol", "release", job)
    assert cluster.wait(job) == "COMPLETED", (project / "runs" / "a b" / f"job-{job}.out").read_text()
    run = project / "runs" / "a b"
    (only,) = attempts(run)
    assert (only["attempt"], only["state"], only["from_step"], only["to_step"]) == (1, "completed", 0, 40)
    assert (only["hosts"], only["ranks"], only["job"], only["exit_code"]) == (["node1", "node2"], 2, job, 0)
    assert json.loads((run / "recipe" / "source.json").read_text())["file"] == str(mine / "helper_of_mine.py")
    assert digest(run) == undisturbed(project / "undisturbed", 2)
    assert "is completed, step 40" in (run / f"job-{job}.out").read_text()
    line = next(line for line in distkit(cluster, project, "jobs").splitlines() if line.startswith("runs/a b "))
    assert re.match(rf"runs/a b +{job} +completed +40 of 40 +1 +\d+ (s|min) ago +COMPLETED$", line)


def test_a_requeued_submission_goes_on_and_each_attempt_has_its_line(cluster: Cluster, project: Path) -> None:
    (job,) = submit(cluster, project, str(PACED), "--", "--run-dir", "runs/mine", *FLAGS, *SLOWLY)
    run = project / "runs" / "mine"
    wait_for(lambda: jobs(cluster, project).get("runs/mine", {}).get("step", 0) >= 8, "step 8", 60)
    row = jobs(cluster, project)["runs/mine"]
    assert (row["state"], row["scheduler"], row["num_steps"], row["attempts"]) == ("running", "RUNNING", 40, 1)
    assert f"verdict: is running on node1 in job {job}" in distkit(cluster, project, "show", "runs/mine")
    cluster.call("scontrol", "requeue", job)
    wait_for((run / "attempts.jsonl").exists, "line of the first attempt", 60)
    wait_for(lambda: jobs(cluster, project)["runs/mine"]["scheduler"].startswith("PENDING"), "job in the queue", 60)
    row = jobs(cluster, project)["runs/mine"]
    assert (row["state"], row["job"], row["attempts"]) == ("preempted", job, 1)
    said = distkit(cluster, project, "show", "runs/mine")
    assert "verdict: goes on; the same command goes on from the checkpoint" in said

    assert cluster.wait(job) == "COMPLETED"
    first, last = attempts(run)
    assert (first["state"], first["exit_code"], first["job"], first["hosts"]) == ("preempted", 75, job, ["node1"])
    assert "SIGTERM" in first["reason"]
    assert first["to_step"] == first["saved"] == last["from_step"]
    assert (last["attempt"], last["state"], last["to_step"], last["job"]) == (2, "completed", 40, job)
    assert digest(run) == undisturbed(project / "undisturbed", 1)
    row = jobs(cluster, project)["runs/mine"]
    assert (row["state"], row["step"], row["attempts"], row["scheduler"]) == ("completed", 40, 2, "COMPLETED")


def test_a_node_that_fails_each_time_a_chain_that_gets_nowhere_and_a_refusal(cluster: Cluster, project: Path) -> None:
    """They wait together."""
    words = [str(PACED), "--nodes", "2", "--", "--run-dir", "runs/bad-node", *FLAGS]
    env = {"DISTKIT_FAULT": "start-up:1:0:kill"}
    said = cluster.call("python", "-m", "distkit", "submit", *words, cwd=project, env=env)
    (job,) = re.findall(r"submitted job (\d+):", said)

    (project / "slurm" / "site.toml").unlink()
    (project / "slurm" / "site.toml").write_text('continuation = "chain"\n')
    words = [str(PACED), "--chain", "3", "--", "--run-dir", "runs/mine", *FLAGS]
    env = {"DISTKIT_FAULT": "step:0:7:kill"}
    said = cluster.call("python", "-m", "distkit", "submit", *words, cwd=project, env=env)
    (numbers,) = re.findall(r"submitted jobs ([\d, ]+):", said)
    first, second, third = numbers.split(", ")
    # the fault is in the environment of all: two attempts die in one step, and that is enough
    assert [cluster.wait(job, 150) for job in (first, second, third)] == ["FAILED", "FAILED", "CANCELLED"]
    assert [line["state"] for line in attempts(project / "runs" / "mine")] == ["killed"]
    row = jobs(cluster, project)["runs/mine"]
    assert (row["state"], row["attempts"], row["job"]) == ("killed", 2, second)
    assert "makes no progress" in row["verdict"]

    assert (cluster.wait(job, 150), cluster.field(job, "Restarts")) == ("FAILED", "1")
    run = project / "runs" / "bad-node"
    says = "fails each time on node2 (2 times), without a new checkpoint since the attempt before: there is none"
    output = (run / f"job-{job}.out").read_text()
    assert says in output
    assert "leave it out: #SBATCH --exclude=node2" in output
    assert [(line["failed_on"], line["cause"]["phase"], line["hosts"]) for line in attempts(run)] == [
        ("node2", "start-up", ["node1", "node2"])
    ] * 2

    (project / "slurm" / "site.toml").write_text('partition = "nowhere"\n')
    words = ["submit", str(PACED), "--", "--run-dir", "runs/never", *FLAGS]
    refused = cluster.call("bash", "-c", '! python -m distkit "$@" 2>&1', "x", *words, cwd=project)
    assert "invalid partition specified: nowhere" in refused
    assert not (project / "runs" / "never").exists()
