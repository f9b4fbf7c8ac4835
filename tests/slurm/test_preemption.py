"""What a cluster does to a run in the middle, on a real SLURM: it goes on, and ends with the same bits."""

import json
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.harness import ROOT, run_recipe_cli
from support.slurm import Cluster, running_cluster, set_up, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.distributed, pytest.mark.timeout(240)]

PACED = ROOT / "tests" / "support" / "paced.py"
FLAGS = ["--run-dir", "run", "--num-steps", "60", "--device", "cpu", "--precision", "fp32"]
SLOWLY = ["--pause-seconds", "0.1"]


def status(project: Path) -> Mapping[str, Any]:
    return json.loads((project / "run" / "status.json").read_text())  # type: ignore[no-any-return]


def last_step(project: Path) -> int:
    """The step of the last report; 0 where there is none."""
    metrics = project / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def is_running(project: Path, attempt: int) -> bool:
    """True once `attempt` has done some steps of its own."""
    now = status(project) if (project / "run" / "status.json").exists() else {}
    return (now.get("attempt"), now.get("state")) == (attempt, "running") and last_step(project) >= now["step"] + 3


def submit(cluster: Cluster, project: Path, *words: str) -> str:
    sbatch = [word for word in words if word.startswith("--")]
    script = [word for word in words if not word.startswith("--")]
    options = [f"--max-requeues={number}" for number in script]
    return cluster.submit(*sbatch, "slurm/train.sbatch", *options, str(PACED), *FLAGS, *SLOWLY, cwd=project)


def interrupt(cluster: Cluster, project: Path, job: str, attempt: int, what: Callable[[], object]) -> None:
    """Do `what` in the middle of an attempt, and wait until that has ended."""

    def runs() -> bool:
        cluster.hurry(job)
        return is_running(project, attempt)

    wait_for(runs, f"attempt {attempt}", 60)
    what()
    wait_for(lambda: status(project)["state"] != "running", f"end of attempt {attempt}", 40)


def train_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "train"]


def digest_undisturbed(folder: Path, world_size: int, *flags: str) -> str:
    folder.mkdir()
    ended = run_recipe_cli([*FLAGS, *flags], folder, recipe=PACED, world_size=world_size)
    assert {rank.returncode for rank in ended} == {0}
    return str(json.loads((folder / "run" / "summary.json").read_text())["state_digest"])


def check_completed(project: Path, attempts: int, world_size: int) -> None:
    assert (status(project)["state"], status(project)["step"], status(project)["attempt"]) == (
        "completed",
        60,
        attempts,
    )
    digest = json.loads((project / "run" / "summary.json").read_text())["state_digest"]
    assert digest == digest_undisturbed(project / "undisturbed", world_size)


def test_two_nodes_go_on_after_signals_to_ranks_to_the_script_and_a_requeue(cluster: Cluster, project: Path) -> None:
    job = submit(cluster, project, "--nodes=2")
    interrupts = (
        ("SIGUSR1", ["scancel", "--signal=USR1", job]),
        ("SIGUSR1", ["scancel", "--batch", "--signal=USR1", job]),
        ("SIGTERM", ["scontrol", "requeue", job]),
    )
    for attempt, (name, command) in enumerate(interrupts, 1):
        interrupt(cluster, project, job, attempt, lambda command=command: cluster.call(*command))
        said = status(project)
        assert (said["state"], said["attempt"]) == ("preempted", attempt)
        # to all ranks, or to the one whose signal was sooner than the other; the step may have been saved anyway
        stopped = rf"stopped after step {said['step']} \({name} to .*\); (saved: )?the same command continues"
        assert re.match(stopped, said["reason"])
        assert (project / "run" / "checkpoints" / f"step-{said['step']:09d}" / "MANIFEST.json").exists()
    assert cluster.wait(job) == "COMPLETED"
    assert cluster.field(job, "Restarts") == "3"
    check_completed(project, 4, 2)


def test_signals_that_come_before_the_ranks_listen_are_not_lost(cluster: Cluster, project: Path) -> None:
    job = submit(cluster, project, "--nodes=2")

    def begins(restarts: int) -> bool:
        cluster.hurry(job)
        return (cluster.field(job, "JobState"), cluster.field(job, "Restarts")) == ("RUNNING", str(restarts))

    # while the script plans, launchers import torch, and ranks do
    for restarts, (seconds, option) in enumerate([(0.1, ["--batch"]), (2.0, ["--batch"]), (2.0, []), (4.0, [])]):
        wait_for(partial(begins, restarts), f"start {restarts}", 60)
        time.sleep(seconds)
        cluster.call("scancel", *option, "--signal=USR1", job)
    assert cluster.wait(job) == "COMPLETED"
    assert cluster.field(job, "Restarts") == "4"
    check_completed(project, status(project)["attempt"], 2)
    assert not list(project.glob(".distkit-stop-*"))


def test_a_requeued_job_goes_on_with_fewer_nodes_and_with_more(cluster: Cluster, project: Path) -> None:
    # without randomness of a rank's own, losses on any number of ranks agree to rounding
    keyed = ["--dropout", "0"]
    job = cluster.submit("--nodes=2", "slurm/train.sbatch", str(PACED), *FLAGS, *SLOWLY, *keyed, cwd=project)

    def requeue(nodes: int) -> None:
        cluster.call("scontrol", "requeue", job)
        wait_for(lambda: cluster.field(job, "JobState") == "PENDING", "requeue", 40)
        cluster.call("scontrol", "update", f"JobId={job}", f"NumNodes={nodes}", f"NumTasks={nodes}")

    for attempt, (nodes, then) in enumerate(((2, 1), (1, 2)), 1):
        interrupt(cluster, project, job, attempt, lambda then=then: requeue(then))
        assert status(project)["state"] == "preempted"
        assert json.loads((project / "run" / "environment.json").read_text())["world_size"] == nodes
    assert cluster.wait(job) == "COMPLETED"
    assert (status(project)["state"], status(project)["attempt"]) == ("completed", 3)
    assert json.loads((project / "run" / "environment.json").read_text())["world_size"] == 2
    digest_undisturbed(project / "undisturbed", 2, *keyed)
    straight, moved = train_lines(project / "undisturbed"), train_lines(project)
    assert [line["step"] for line in moved] == list(range(1, 61))
    for line, other in zip(moved, straight, strict=True):
        # the moments of the indices of a step's samples
        assert (line["samples"], line["indices"], line["squares"]) == (8, other["indices"], other["squares"])
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_the_limit_holds_a_cancelled_job_stays_cancelled_and_a_stopped_one_stopped(
    cluster: Cluster, project: Path
) -> None:
    first = submit(cluster, project, "1")
    interrupt(cluster, project, first, 1, lambda: cluster.call("scancel", "--signal=TERM", first))
    assert status(project)["state"] == "preempted"
    interrupt(cluster, project, first, 2, lambda: cluster.call("scancel", "--signal=INT", first))
    assert "SIGINT" in status(project)["reason"]
    assert (cluster.wait(first), cluster.field(first, "Restarts")) == ("FAILED", "1")
    assert "it was started again 1 times: not again" in (project / f"distkit-{first}.out").read_text()

    second = submit(cluster, project)
    interrupt(cluster, project, second, 3, lambda: cluster.call("scancel", second))
    assert status(project)["state"] == "preempted"
    assert (cluster.wait(second), cluster.field(second, "Restarts")) == ("CANCELLED", "0")

    third = submit(cluster, project)
    interrupt(cluster, project, third, 4, (project / "run" / "STOP").touch)
    assert "a file STOP" in status(project)["reason"]
    assert (cluster.wait(third), cluster.field(third, "Restarts")) == ("COMPLETED", "0")

    last = submit(cluster, project)
    assert cluster.wait(last) == "COMPLETED"
    check_completed(project, 5, 1)


#: Options of sbatch, and why a run with them stops: SLURM signals up to a minute early, and looks every half minute.
#: CONT means nothing to a script: the run itself watches the end of its job.
LIMITS = {
    "--time=2 --signal=B:USR1@100": "(SIGUSR1)",
    "--time=2 --signal=USR1@100": "(SIGUSR1)",
    "--time=1 --signal=B:CONT@1": "(the end of the SLURM job is near)",
}


def test_time_limits_and_a_dead_node(project: Path) -> None:
    """Both are a matter of waiting for SLURM, so they wait together."""
    with running_cluster() as cluster:
        limited = []
        for number, (options, reason) in enumerate(LIMITS.items()):
            folder = project / f"limited-{number}"
            set_up(folder)
            words = [*options.split(), "--nodelist=node1", "slurm/train.sbatch", str(PACED), *FLAGS, *SLOWLY]
            limited.append((folder, cluster.submit(*words, "--num-steps", "5000", cwd=folder), reason))
        job = submit(cluster, project, "--nodes=2")
        wait_for(lambda: is_running(project, 1) and last_step(project) > 6, "step 7", 60)
        cluster.kill_node("node2")
        wait_for(lambda: cluster.field(job, "Restarts") == "1", "requeue", 60)
        assert status(project)["state"] != "completed"
        cluster.start_node("node2")

        for folder, other, reason in limited:
            wait_for(lambda other=other: cluster.field(other, "Restarts") == "1", f"requeue of job {other}", 100)
            said = (folder / f"distkit-{other}.out").read_text()
            assert re.search(r"preempted at step (\d+) \(.*: it goes on from the checkpoint of step \1$", said, re.M)
            assert reason in said
            cluster.call("scancel", other)

        # it lost the steps since the last checkpoint, and no bit
        assert cluster.wait(job) == "COMPLETED"
        check_completed(project, 2, 2)
