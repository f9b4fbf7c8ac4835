"""One rank of two ends in every way, in every phase: the other one, status.json and the launcher name it (C6)."""

import json
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.harness import ROOT
from support.launching import LAUNCH, environment, run

from distkit.engine.endings import dead, own_cause, waits_for_others
from distkit.errors import RankFailedError
from distkit.runtime import Topology
from distkit.runtime.position import Peer, Phase
from distkit.runtime.process import Runtime

HOST = socket.gethostname()
TINY = str(ROOT / "tests" / "support" / "tiny.py")
FLAGS = [
    "--run-dir", "run", "--num-steps", "8", "--eval-every", "4", "--checkpoint.enabled", "--checkpoint.save-every", "4",
    "--report-every", "2",
]  # fmt: skip
#: What ends a rank that hangs: the watchdog, or the timeout of what the other one waits in.
WATCHDOG = ["--timeout-seconds", "60", "--watchdog-seconds", "6"]
TIMEOUT = ["--timeout-seconds", "6", "--watchdog-seconds", "None"]
#: Point of the fault -> its step, the name of the phase, and the words for it.
PHASES = {
    "start-up": (0, "start-up", "in start-up"),
    "data": (6, "data", "in step 6 (data)"),
    "step": (6, "step", "in step 6"),
    "evaluation": (4, "evaluation", "in the evaluation after step 4"),
    "save": (4, "save", "in the save of step 4"),
}
#: Action -> what is said of it.
WAYS = {
    "raise": "RuntimeError: DISTKIT_FAULT",
    "exit": "called sys.exit(3)",
    "exit0": "ended with exit code 0",
    "kill": "was killed by SIGKILL",
    "segv": "was killed by SIGSEGV",
    "stop": "is stopped (SIGSTOP)",
    "oom": "ran out of memory",
    "hang": "has been",
    "hang_gil": "no sign of life",
}
TELLING = [("data", "raise"), ("step", "kill")]


def check(folder: Path, point: str, action: str, rank: int = 1, bound: Sequence[str] = WATCHDOG) -> None:
    step, phase, words = PHASES[point]
    env = environment({"DISTKIT_FAULT": f"{point}:{rank}:{step}:{action}", "GRACE_SECONDS": "5",
                       "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})  # fmt: skip
    # `run` fails when a process is left
    done = run([str(LAUNCH / "local.sh"), "-n", "2", TINY, *FLAGS, *bound], folder, env, timeout=200)
    assert done.returncode not in (0, 2)
    lines = done.stderr.splitlines()
    survivor = [line for line in lines if line.startswith(f"distkit: error (rank {1 - rank}): ")][-1]
    for line in (survivor, lines[-1]):
        assert f"rank {rank} on {HOST}" in line
        assert WAYS[action] in line
        assert words in line
    assert lines[-1].startswith("launch/local.sh: ")
    status = json.loads((folder / "run" / "status.json").read_text())
    cause = status["cause"]
    assert (status["state"], cause["rank"], cause["host"], cause["phase"]) == ("failed", rank, HOST, phase)
    assert WAYS[action] in cause["what_happened"]


@pytest.mark.distributed
@pytest.mark.parametrize(("point", "action"), TELLING)
def test_the_first_cause_is_named(point: str, action: str, tmp_path: Path) -> None:
    check(tmp_path, point, action)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("action", WAYS)
@pytest.mark.parametrize("point", PHASES)
def test_the_first_cause_is_named_in_every_phase(point: str, action: str, tmp_path: Path) -> None:
    check(tmp_path, point, action)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("action", WAYS)
def test_rank_0_is_named_by_the_other(action: str, tmp_path: Path) -> None:
    check(tmp_path, "step", action, rank=0)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("point", PHASES)
def test_a_rank_that_hangs_is_named_when_the_timeout_is_sooner(point: str, tmp_path: Path) -> None:
    check(tmp_path, point, "hang", bound=TIMEOUT)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (signal.SIGKILL, "rank 1 on node7 was killed by SIGKILL in step 12 (data)"),
        (signal.SIGSEGV | 0x80, "rank 1 on node7 was killed by SIGSEGV in step 12 (data)"),
        (0, "rank 1 on node7 ended with exit code 0 in step 12 (data), before the run was done"),
        (3 << 8, "rank 1 on node7 ended with exit code 3 in step 12 (data), before the run was done"),
        (None, "rank 1 on node7 is gone, last seen in step 12 (data): it was killed, or ended without a word"),
    ],
)
def test_a_process_that_has_ended_is_named(status: int | None, words: str) -> None:
    peer = Peer(1, "node7", 1, "", True, [Phase.DATA, 12])
    cause = dead(peer, status)
    assert (cause.what_happened, cause.rank, cause.phase, cause.step) == (words, 1, "data", 12)


def test_an_exception_is_named_with_its_place() -> None:
    runtime = Runtime(topology=Topology(rank=1, world_size=2), device=None)  # type: ignore[arg-type]
    runtime.position.enter(Phase.EVALUATION, 20)
    assert own_cause(ValueError("bad"), runtime).what_happened == (
        f"rank 1 on {HOST} failed in the evaluation after step 20: ValueError: bad"
    )


def test_errors_of_collectives_blame_another_rank() -> None:
    assert waits_for_others(RuntimeError("[gloo/pair.cc] Timed out waiting 5000ms")) == (True, True)
    assert waits_for_others(RuntimeError("[gloo/pair.cc] Connection closed by peer")) == (False, True)
    assert waits_for_others(RankFailedError("rank 1 failed")) == (False, True)
    assert waits_for_others(ValueError("gloo")) == (False, False)
