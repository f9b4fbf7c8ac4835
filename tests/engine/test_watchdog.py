"""Ranks that do not get on: which one is named, what ends, and what is no hang."""

import json
import re
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from support.harness import ROOT
from support.launching import LAUNCH, environment, run

from distkit.engine.endings import Cause, Ending, look_for_the_stuck
from distkit.engine.watchdog import watch
from distkit.runtime import Topology
from distkit.runtime.heartbeat import Heartbeat
from distkit.runtime.position import NUM_CELLS, PHASE, SAVING, STATE, STEP, WAITS, Peer, Phase, State
from distkit.runtime.process import Runtime

FLAGS = ["--run-dir", "run", "--num-steps", "8", "--report-every", "2", "--checkpoint.enabled",
         "--checkpoint.save-every", "2", "--timeout-seconds", "60"]  # fmt: skip
#: A recipe of tests/support/tiny.py whose ranks meet in different collectives in step 5.
MISMATCH = """
from dataclasses import replace
from itertools import count
import torch
import torch.distributed as dist
from distkit import main
from support import tiny
calls = count(1)
def compute_loss(config, model, batch):
    if next(calls) == 5:
        if dist.get_rank() == 0:
            dist.all_reduce(torch.zeros(7))
        else:
            dist.all_gather([torch.zeros(3)] * 2, torch.zeros(3))
    return tiny.compute_loss(config, model, batch)
main(replace(tiny.RECIPE, compute_loss=compute_loss))
"""
#: One whose steps are slow.
SLOW = """
import time
from dataclasses import replace
from distkit import main
from support import tiny
def compute_loss(config, model, batch):
    time.sleep(0.5)
    return tiny.compute_loss(config, model, batch)
main(replace(tiny.RECIPE, compute_loss=compute_loss))
"""


def peer(rank: int, phase: Phase, step: int, *, waits: bool = False, sentence: str = "", saving: int = 0) -> Peer:
    cells = [0] * NUM_CELLS
    cells[PHASE], cells[STEP], cells[WAITS], cells[SAVING] = phase, step, waits, saving
    return Peer(rank, f"node{rank}", 1, "", False, cells, sentence)


def named(*ranks: Peer) -> str:
    return look_for_the_stuck(list(ranks), ranks[0]).what_happened


def test_who_waits_for_nobody_is_named_with_its_line() -> None:
    waiting = peer(0, Phase.STEP, 6, waits=True, sentence="in all_reduce")
    working = peer(1, Phase.STEP, 6, sentence="in read (data.py:3)")
    assert named(waiting, working) == "rank 1 on node1 has been in step 6 for 0 s, in read (data.py:3)"
    assert named(working, waiting) == "rank 1 on node1 has been in step 6 for 0 s, in read (data.py:3)"


def test_of_those_that_wait_for_nobody_the_last_is_named() -> None:
    assert named(peer(0, Phase.STEP, 6), peer(1, Phase.DATA, 6)).startswith("rank 1 on node1 has been in step 6 (data)")
    assert named(peer(0, Phase.STEP, 6), peer(1, Phase.STEP, 6, saving=4)).startswith(
        "rank 1 on node1 has been in the save of step 4"
    )


def test_ranks_in_different_collectives_wait_for_each_other() -> None:
    ranks = [
        peer(0, Phase.STEP, 6, waits=True, sentence="in all_reduce"),
        peer(1, Phase.STEP, 6, waits=True, sentence="in barrier"),
        peer(2, Phase.STEP, 6, waits=True, sentence="in barrier"),
    ]
    cause = look_for_the_stuck(ranks[1:], ranks[0])
    assert cause.what_happened == (
        "all ranks wait for each other: rank 0 in step 6 in all_reduce; ranks 1, 2 in step 6 in barrier"
    )
    assert "the same collectives in the same order" in cause.what_to_do
    assert (cause.rank, cause.phase, cause.step, cause.retryable) == (None, "step", 6, False)


def test_ranks_in_one_collective_that_does_not_end_blame_the_network() -> None:
    ranks = [peer(rank, Phase.STEP, 6, waits=True, sentence="in all_reduce") for rank in range(2)]
    cause = look_for_the_stuck(ranks, ranks[0])
    assert cause.what_happened == "all ranks wait for each other: ranks 0, 1 in step 6 in all_reduce"
    assert "network between node0, node1" in cause.what_to_do
    assert cause.retryable


def watched(ending: Ending, seconds: float, moves: float | None, for_seconds: float) -> bool:
    """Whether the watchdog has ended a rank that moves every `moves` seconds."""
    done = threading.Event()
    thread = threading.Thread(target=watch, args=(ending, seconds, done))
    thread.start()
    end = time.monotonic() + for_seconds
    while time.monotonic() < end and thread.is_alive():
        time.sleep(moves or for_seconds)
        ending.runtime.position.cells[STEP] += moves is not None
    ended = not thread.is_alive()
    done.set()
    thread.join()
    return ended


@pytest.fixture
def ending(tmp_path: Path) -> Ending:
    runtime = Runtime(topology=Topology(), device=None, heartbeat=Heartbeat())  # type: ignore[arg-type]
    runtime.position.enter(Phase.STEP, 3)
    return Ending(runtime, ends_process=False)


def test_a_hang_of_a_single_process_is_told(ending: Ending, capfd: pytest.CaptureFixture[str]) -> None:
    assert watched(ending, 0.4, None, 2.0)
    assert "has been in step 3 for" in (ending.runtime.heartbeat.cause or "")
    err = capfd.readouterr().err
    assert "distkit: error (rank 0): rank 0 on" in err
    assert "test_watchdog.py" in err  # there is no directory for the stacks yet


def test_steps_that_get_on_are_no_hang(ending: Ending) -> None:
    assert not watched(ending, 1.0, 0.1, 3.0)
    assert ending.runtime.heartbeat.cause is None


def test_a_single_process_may_start_for_long(ending: Ending) -> None:
    ending.runtime.position.enter(Phase.START_UP, 0)
    assert not watched(ending, 0.4, None, 2.0)


def test_a_rank_that_cannot_finish_its_ending_is_ended(ending: Ending, capfd: pytest.CaptureFixture[str]) -> None:
    heartbeat = ending.runtime.heartbeat
    heartbeat.ask(json.dumps(asdict(Cause(1, "node1", "step", 3, "it broke", ""))))
    ending.runtime.position.cells[STATE] = State.ENDING
    assert watched(ending, 0.4, None, 2.0)
    assert "it broke" in capfd.readouterr().err


def recipe(folder: Path, text: str) -> str:
    (folder / "my_recipe.py").write_text(text)
    return str(folder / "my_recipe.py")


def env(**more: str) -> dict[str, str]:
    return environment({"GRACE_SECONDS": "5", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **more})


@pytest.mark.distributed
def test_different_collectives_end_soon_and_both_are_named(tmp_path: Path) -> None:
    command = [str(LAUNCH / "local.sh"), "-n", "2", recipe(tmp_path, MISMATCH), *FLAGS, "--watchdog-seconds", "4"]
    done = run(command, tmp_path, env(), timeout=60)
    cause = json.loads((tmp_path / "run" / "status.json").read_text())["cause"]
    assert done.returncode == 1
    called = r"\(gloo:{0} of \[{1}\]\), called from compute_loss \(my_recipe.py:\d+\)"
    for words in (r"rank 0 in step 5 in all_reduce " + called.format("all_reduce", 7),
                  r"rank 1 in step 5 in all_gather " + called.format("all_?gather", 3)):  # fmt: skip
        assert re.search(words, cause["what_happened"])
    assert cause["what_to_do"].startswith("every rank must call the same collectives")
    assert done.stderr.splitlines()[-1].startswith("launch/local.sh: all ranks wait for each other")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_hang_of_a_run_in_one_process_ends_it(tmp_path: Path) -> None:
    tiny = str(ROOT / "tests" / "support" / "tiny.py")
    command = [sys.executable, tiny, *FLAGS, "--watchdog-seconds", "4"]
    done = run(command, tmp_path, env(DISTKIT_FAULT="step:0:5:hang"), timeout=60)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (done.returncode, status["state"], status["retryable"]) == (1, "failed", True)
    assert "faults.py" in (tmp_path / "run" / "stacks-rank-0.txt").read_text()
    again = run([*command, "--watchdog-seconds", "None"], tmp_path, env(), timeout=60)
    assert again.returncode == 0


@pytest.mark.slow
@pytest.mark.distributed
def test_a_long_step_of_many_microbatches_is_no_hang(tmp_path: Path) -> None:
    # 8 x 0.5 s a step: longer than the watchdog's time, while the microbatches get on
    command = [sys.executable, recipe(tmp_path, SLOW), *FLAGS, "--num-steps", "4", "--watchdog-seconds", "2",
               "--microbatch-size", "1"]  # fmt: skip
    done = run(command, tmp_path, env(), timeout=120)
    assert done.returncode == 0, done.stderr
