"""Whether a job goes on: what is retried, within which limits."""

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from distkit.commands import run
from distkit.commands.slurm.outcome import Before, decide, read_before
from distkit.engine.endings import Cause, dead, look_for_the_silent, own_cause
from distkit.errors import ConfigError, RankFailedError, RankSilentError, TrainingError
from distkit.runtime import Topology
from distkit.runtime.position import NUM_CELLS, PHASE, STATE, STEP, Peer, Phase, State
from distkit.runtime.process import Runtime

KILLED = "rank 1 on node-7 was killed by SIGKILL in step 3"


def write(run_dir: Path, status: Mapping[str, object], step: int | None = None) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "status.json").write_text(
        json.dumps({"step": 12, "reason": None, "cause": None, "retryable": None, **status})
    )
    if step is not None:
        (run_dir / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)


def outcome(run_dir: Path, before: str = "0:-1", **options: object) -> tuple[int, str]:
    settings = {"job": "7", "num_requeues": 0, "max_requeues": 10, **options}
    decision = decide(run_dir, Before.parse(before), **settings)  # type: ignore[arg-type]
    return decision.exit_code, decision.why


def test_a_completed_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    write(tmp_path, {"state": "completed", "attempt": 1})
    assert outcome(tmp_path)[0] == 0
    assert outcome(tmp_path, "1:12")[0] == 0


def test_a_preempted_run_goes_on(tmp_path: Path) -> None:
    write(tmp_path, {"state": "preempted", "attempt": 3, "reason": "SIGUSR1", "retryable": True}, 12)
    code, why = outcome(tmp_path, "2:9")
    assert code == 75
    assert "preempted at step 12 (SIGUSR1): it goes on from the checkpoint of step 12" in why


def test_what_its_owner_stopped_stays_stopped(tmp_path: Path) -> None:
    reason = "stopped after step 12 (a file STOP in the run directory); saved"
    write(tmp_path, {"state": "preempted", "attempt": 3, "reason": reason, "retryable": False}, 12)
    code, said = outcome(tmp_path, "2:9")
    assert code == 0
    assert reason in said


def test_not_without_progress_except_after_the_first_attempt(tmp_path: Path) -> None:
    write(tmp_path, {"state": "preempted", "attempt": 3, "reason": "SIGUSR1", "retryable": True}, 12)
    assert outcome(tmp_path, "2:12")[0] == 75
    write(tmp_path, {"state": "failed", "attempt": 3, "reason": KILLED, "retryable": True})
    code, why = outcome(tmp_path, "2:12")
    assert code == 1
    assert "without a new checkpoint since the attempt before: the newest is that of step 12" in why
    other = tmp_path / "other"
    write(other, {"state": "failed", "attempt": 1, "reason": KILLED, "retryable": True})
    assert outcome(other)[0] == 75
    write(other, {"state": "failed", "attempt": 2, "reason": KILLED, "retryable": True})
    assert "there is none" in outcome(other, "1:-1")[1]


def test_not_beyond_the_limit(tmp_path: Path) -> None:
    write(tmp_path, {"state": "preempted", "attempt": 3, "retryable": True}, 12)
    assert outcome(tmp_path, num_requeues=9)[0] == 75
    code, why = outcome(tmp_path, num_requeues=10)
    assert code == 1
    assert "started again 10 times" in why
    assert outcome(tmp_path, max_requeues=0)[0] == 1


def test_an_attempt_that_was_not_begun_is_not_repeated_unless_it_was_told_to_stop(tmp_path: Path) -> None:
    write(tmp_path, {"state": "preempted", "attempt": 3, "retryable": True}, 12)
    for run_dir, before in ((tmp_path, "3:12"), (tmp_path / "nowhere", "0:-1")):
        code, why = outcome(run_dir, before)
        assert code == 1
        assert "its output says why" in why
        assert outcome(run_dir, before, told="USR1")[0] == 75
        assert outcome(run_dir, before, killed=True)[0] == 75


def test_what_another_job_has_begun_is_its_business(tmp_path: Path) -> None:
    write(tmp_path, {"state": "preempted", "attempt": 1, "retryable": True, "job": "8"}, 12)
    assert outcome(tmp_path) == (1, f"{tmp_path} is the business of job 8 by now")
    assert outcome(tmp_path, "1:12")[0] == 1  # begun before this job
    assert outcome(tmp_path, job="8")[0] == 75
    assert outcome(tmp_path, job=None)[0] == 75


def test_a_run_that_says_running_was_killed_unless_another_job_has_it(tmp_path: Path) -> None:
    write(tmp_path, {"state": "running", "attempt": 1})
    assert outcome(tmp_path)[0] == 75
    (tmp_path / "lease.json").write_text('{"job": "7"}')
    assert outcome(tmp_path)[0] == 75
    (tmp_path / "lease.json").write_text('{"job": "8"}')
    assert outcome(tmp_path) == (1, f"{tmp_path} is running in job 8")


def failure(attempt: int, step: int, saved: int) -> dict[str, object]:
    """A line of attempts.jsonl: rank 1 on node7 was killed."""
    cause = {"rank": 1, "host": "node7", "phase": "step", "step": step, "what_to_do": ""}
    return {"attempt": attempt, "state": "failed", "step": step, "saved": saved, "hosts": ["node1", "node7"],
            "reason": f"rank 1 on node7 was killed in step {step}", "retryable": True, "cause": cause,
            "failed_on": "node7"}  # fmt: skip


def test_a_host_that_fails_each_time_is_named(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_text(json.dumps(failure(1, 7, 5)))
    write(tmp_path, failure(2, 13, 10), 10)
    code, why = outcome(tmp_path, "1:5")
    assert code == 75
    assert why.endswith("it fails each time on node7: leave it out: #SBATCH --exclude=node7")
    assert "it goes on from the checkpoint of step 10" in why


def test_what_fails_in_the_same_step_is_not_repeated_even_with_progress(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_text(json.dumps(failure(1, 13, 5)))
    write(tmp_path, failure(2, 13, 10), 10)
    code, why = outcome(tmp_path, "1:5")
    assert code == 1
    assert "fails each time in step 13 (2 times): rank 1 on node7 was killed in step 13" in why


def runtime() -> Runtime:
    topology = Topology(rank=0, world_size=2, local_world_size=1, launcher="torchrun")
    return Runtime(topology=topology, device=torch.device("cpu"))


def peer(phase: Phase = Phase.STEP) -> Peer:
    cells = [0] * NUM_CELLS
    cells[PHASE], cells[STEP], cells[STATE] = phase, 3, State.RUNNING
    return Peer(1, "node-7.cluster", 4, "", False, cells)


def silent(late: bool, seen: float) -> Cause:
    mine, other = runtime(), peer(Phase.EVALUATION)
    other.seen = other.since = time.monotonic() - seen
    mine.heartbeat.peers.append(other)
    cause = look_for_the_silent(mine, late)
    assert cause is not None
    return cause


def failed(error: BaseException) -> Cause:
    mine = runtime()
    mine.position.enter(Phase.STEP, 3)
    return own_cause(error, mine)


@pytest.mark.parametrize(
    "cause",
    [
        dead(peer(), signal.SIGKILL), dead(peer(), signal.SIGSEGV), dead(peer(), None), silent(False, 100.0),
        silent(True, 0.0), failed(RankSilentError("ranks [1, 3] do not say where to stop")),
    ],
    ids=["killed", "crashed", "gone", "no sign of life", "late", "silent at a stop"],
)  # fmt: skip
def test_what_a_rank_could_not_help_is_retried(tmp_path: Path, cause: Cause) -> None:
    write(tmp_path, {"state": "failed", "attempt": 1, "reason": cause.what_happened, "retryable": cause.retryable})
    assert outcome(tmp_path)[0] == 75


@pytest.mark.parametrize(
    "cause",
    [
        failed(ValueError("rank 1 on node-7 was killed by SIGKILL")), failed(TrainingError("the disk is full")),
        failed(ConfigError("--lr 1")), failed(SystemExit(3)), failed(KeyboardInterrupt()), failed(MemoryError("x")),
        dead(peer(), 3 << 8), failed(RankFailedError("rank 1 failed while building the data: ValueError: x")),
    ],
    ids=["ValueError", "TrainingError", "ConfigError", "exit", "interrupt", "MemoryError", "exited", "another's"],
)  # fmt: skip
def test_what_the_recipe_did_is_not(tmp_path: Path, cause: Cause) -> None:
    write(tmp_path, {"state": "failed", "attempt": 1, "reason": cause.what_happened, "retryable": cause.retryable})
    code, why = outcome(tmp_path)
    assert code == 1
    assert cause.what_happened in why


def test_before_is_read_and_written(tmp_path: Path) -> None:
    assert str(read_before(tmp_path)) == "0:-1"
    write(tmp_path, {"state": "running", "attempt": 2}, 40)
    assert str(read_before(tmp_path)) == "2:40"
    assert Before.parse("2:40") == read_before(tmp_path)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    write(tmp_path, {"state": "preempted", "attempt": 1, "retryable": True}, 12)
    assert run(["slurm", "requeue", str(tmp_path), "--max-requeues", "3"]) == 75
    assert capsys.readouterr().out.startswith(f"slurm: {tmp_path} was preempted at step 12")
    assert run(["slurm", "requeue", str(tmp_path), "--max-requeues", "2"]) == 1
    for wrong in (["--before", "3"], ["--before", "x:3"], ["--max-requeues", "-1"], []):
        assert run(["slurm", "requeue", str(tmp_path), "--max-requeues" if wrong else "--told", "2", *wrong]) == 2
        assert "distkit slurm requeue" in capsys.readouterr().err
