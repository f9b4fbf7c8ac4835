"""torchrun's elastic agent starts ranks again in the same job, as many as there are: the run keeps its samples."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.harness import ROOT, free_port, run_recipe_cli
from support.launching import end, environment, marked

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PACED = ROOT / "tests" / "support" / "paced.py"
FLAGS = ["--run-dir", "run", "--num-steps", "30", "--device", "cpu", "--precision", "fp32"]
#: Without randomness of a rank's own, losses on any number of ranks agree to rounding.
KEYED = ["--dropout", "0"]


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "run" / name).read_text())  # type: ignore[no-any-return]


def lines(folder: Path) -> list[dict[str, Any]]:
    """What was trained, step by step; `indices` and `squares` tell which samples a step had."""
    every = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["event"] == "train"]


def last_step(folder: Path) -> int:
    metrics = folder / "run" / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    return max((event["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")
                for event in [json.loads(line)] if event["event"] == "train"), default=0)  # fmt: skip


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.1)


def undisturbed(folder: Path, *flags: str) -> Path:
    """The same run on two ranks, which nobody disturbs."""
    folder.mkdir()
    ended = run_recipe_cli([*FLAGS, *flags], folder, recipe=PACED, world_size=2)
    assert {rank.returncode for rank in ended} == {0}
    return folder


@contextlib.contextmanager
def agents(folder: Path, **env: str) -> Iterator[tuple[Callable[[Sequence[str]], subprocess.Popen[bytes]], str]]:
    """What starts agents of torchrun in `folder`, and the mark of their processes; none is left."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    settings = environment({"PYTHONPATH": path, "TORCHELASTIC_USE_AGENT_STORE": "", **env})
    processes: list[subprocess.Popen[bytes]] = []

    def start(options: Sequence[str]) -> subprocess.Popen[bytes]:
        with open(folder / f"agent-{len(processes)}.log", "wb") as log:
            processes.append(subprocess.Popen(["torchrun", *options], cwd=folder, env=settings, stdout=log, stderr=log))
        return processes[-1]

    mark = settings["DISTKIT_TEST_MARK"]
    try:
        yield start, mark
        wait_for(lambda: not marked(mark), "end of all processes", 10)
    finally:
        end(marked(mark))
        for process in processes:
            process.wait()


def kill_rank(mark: str, rank: int) -> None:
    (process,) = [one for one in marked(mark) if one.environ().get("RANK") == str(rank) and str(PACED) in one.cmdline()]
    process.kill()


def test_ranks_that_are_killed_are_started_again_by_the_agent(tmp_path: Path) -> None:
    straight = undisturbed(tmp_path / "undisturbed")
    command = ["--standalone", "--max-restarts", "2", "--nproc-per-node", "2", str(PACED), *FLAGS]
    with agents(tmp_path) as (start, mark):
        agent = start([*command, "--pause-seconds", "0.2"])
        for victim, step in ((1, 8), (0, 18)):
            wait_for(lambda step=step: last_step(tmp_path) >= step, f"step {step}")
            kill_rank(mark, victim)
            wait_for(lambda: read(tmp_path, "status.json")["state"] == "failed", "failure", 30)
            status = read(tmp_path, "status.json")
            assert (status["cause"]["rank"], status["retryable"]) == (victim, True)
        assert agent.wait(100) == 0, (tmp_path / "agent-0.log").read_text()
    status = read(tmp_path, "status.json")
    assert (status["state"], status["attempt"]) == ("completed", 3)
    assert not (tmp_path / "run" / "lease.json").exists()
    assert read(tmp_path, "summary.json")["state_digest"] == read(straight, "summary.json")["state_digest"]


def test_nodes_go_and_come_and_every_step_has_its_samples(tmp_path: Path) -> None:
    straight = lines(undisturbed(tmp_path / "undisturbed", *KEYED))
    endpoint = f"localhost:{free_port()}"
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test", "--local-addr",
                  "localhost", "--rdzv-conf",
                  "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"]  # fmt: skip
    command = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", *rendezvous, str(PACED), *FLAGS]
    # an agent that joins a store that another one has opened waits in it for ever: see launch/README.md
    with agents(tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as (start, _):
        argv = [*command, *KEYED, "--pause-seconds", "0.5"]
        first = start(argv)
        wait_for(lambda: first.poll() is None, "first agent")
        time.sleep(1)  # the first one opens the rendezvous
        second = start(argv)
        wait_for(lambda: last_step(tmp_path) >= 4, "step 4 on two nodes")
        assert read(tmp_path, "environment.json")["world_size"] == 2
        # its rank notices, and with it the other one; the step is saved
        second.kill()
        wait_for(lambda: read(tmp_path, "environment.json")["world_size"] == 1, "one node")
        wait_for(lambda: last_step(tmp_path) >= 10, "step 10 on one node")
        third = start(argv)
        wait_for(lambda: read(tmp_path, "environment.json")["world_size"] == 2, "two nodes again")
        assert (first.wait(100), third.wait(20)) == (0, 0), (tmp_path / "agent-0.log").read_text()
    assert read(tmp_path, "status.json")["state"] == "completed"
    moved = lines(tmp_path)
    assert [line["step"] for line in moved] == list(range(1, 31))
    for line, other in zip(moved, straight, strict=True):
        assert (line["samples"], line["indices"], line["squares"]) == (8, other["indices"], other["squares"])
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_ranks_over_which_the_batch_does_not_divide_are_refused_with_numbers_that_do(tmp_path: Path) -> None:
    flags = [*FLAGS, "--num-steps", "5"]
    assert {rank.returncode for rank in run_recipe_cli(flags, tmp_path, recipe=PACED, world_size=2)} == {0}
    flags = [*FLAGS, "--num-steps", "6"]
    refused = run_recipe_cli(flags, tmp_path, recipe=PACED, world_size=3)
    assert {rank.returncode for rank in refused} == {2}
    assert refused[0].stderr.splitlines() == [
        "distkit: error: the run in run does not go on with 3 ranks",
        "  expected: ranks over which its global batch of 8 divides",
        "  got:      3 ranks",
        "  type:     start 2 or 4 ranks",
    ]
    assert read(tmp_path, "status.json")["step"] == 5
    assert {rank.returncode for rank in run_recipe_cli(flags, tmp_path, recipe=PACED, world_size=4)} == {0}
    assert read(tmp_path, "status.json")["step"] == 6
