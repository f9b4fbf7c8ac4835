"""attempts.jsonl: a line for each attempt, however it ended, and none twice."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.harness import ROOT, run_recipe_cli
from support.tiny import BASE, build_run

from distkit.checkpoint.format import step_name
from distkit.engine.attempts import append_ended, last_number, last_step, read_attempts
from distkit.engine.fit import fit
from distkit.engine.run_dir import RunDirectory
from distkit.runtime import node_name

TINY = ROOT / "tests" / "support" / "tiny.py"
FLAGS = ["--run-dir", "run", "--num-steps", "20", "--report-every", "1", "--checkpoint.enabled", "--checkpoint.async",
         "off", "--checkpoint.save-every", "5"]  # fmt: skip
HERE = node_name(os.environ)
CAUSE = {"rank": 1, "host": "h", "phase": "step", "step": 8, "what_happened": "x", "what_to_do": "y", "retryable": True}


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]


def train(folder: Path, fault: str = "", env: dict[str, str] | None = None, world_size: int = 1) -> list[int]:
    env = {"DISTKIT_FAULT": fault, **(env or {})}
    return [done.returncode for done in run_recipe_cli(FLAGS, folder, recipe=TINY, env=env, world_size=world_size)]


def begun(path: Path, step: int, hosts: tuple[str, ...] = ("node1", "node2")) -> RunDirectory:
    """A directory in which an attempt has begun at `step`."""
    directory = RunDirectory(path, writes=True, hosts=hosts)
    directory.claim()
    directory.create({}, {}, None, saves=True)
    directory.write_status("running", step)
    return directory


@pytest.mark.distributed
def test_each_way_to_end_leaves_its_line(tmp_path: Path) -> None:
    assert train(tmp_path, "step:1:7:raise", {"SLURM_JOB_ID": "17"}, world_size=2) == [1, 1]
    assert set(train(tmp_path, "step:*:12:kill", world_size=2)) == {-9}
    assert train(tmp_path, "step:*:13:usr1") == [75]
    # the killed one is told of as soon as the next one has begun
    assert [line["state"] for line in lines(tmp_path / "run")] == ["failed", "killed", "preempted"]
    assert train(tmp_path) == [0]
    first, second, third, last = lines(tmp_path / "run")
    assert [(one["attempt"], one["state"], one["exit_code"]) for one in (first, second, third, last)] == [
        (1, "failed", 1), (2, "killed", None), (3, "preempted", 75), (4, "completed", 0),
    ]  # fmt: skip
    assert (first["from_step"], first["to_step"], first["saved"], first["ranks"], first["job"]) == (0, 7, 5, 2, "17")
    assert (first["cause"]["rank"], first["cause"]["step"], first["failed_on"]) == (1, 7, HERE)
    assert "RuntimeError" in first["reason"]
    assert (second["from_step"], second["saved"], second["job"], second["cause"]) == (5, 10, None, None)
    assert second["reason"] == f"ended without a word after step {second['to_step']}"
    assert second["to_step"] in (11, 12)
    assert (third["from_step"], third["ranks"], third["saved"]) == (10, 1, third["to_step"])
    assert "SIGUSR1" in third["reason"]
    assert (last["from_step"], last["to_step"], last["reason"]) == (third["to_step"], 20, None)
    for one, after in ((first, second), (second, third), (third, last)):
        assert one["hosts"] == [HERE]
        assert one["began"] <= one["ended"] <= after["began"] <= after["ended"]


@pytest.mark.distributed
def test_what_another_rank_said_is_added_by_the_next_attempt(tmp_path: Path) -> None:
    assert train(tmp_path, "step:0:7:kill", world_size=2)[0] == -9
    assert not (tmp_path / "run" / "attempts.jsonl").exists()
    (before,) = read_attempts(tmp_path / "run")
    assert (before.state, before.failed_on, before.retryable) == ("failed", HERE, True)
    assert "rank 0 on" in str(before.reason)
    assert train(tmp_path) == [0]
    assert [(line["attempt"], line["state"]) for line in lines(tmp_path / "run")] == [(1, "failed"), (2, "completed")]
    assert read_attempts(tmp_path / "run")[0] == before


def test_failures_in_start_up_are_attempts_of_their_own(tmp_path: Path) -> None:
    assert set(train(tmp_path, "step:*:7:kill")) == {-9}
    for _ in range(2):
        assert train(tmp_path, "start-up:0:0:raise") == [1]
    first, *others = read_attempts(tmp_path / "run")
    assert (first.state, first.attempt) == ("killed", 1)
    assert [(one.attempt, one.failed_in, one.from_step, one.saved) for one in others] == [
        (2, "start-up", None, 5),
        (3, "start-up", None, 5),
    ]


def test_a_configuration_error_is_no_attempt(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (done,) = run_recipe_cli([*FLAGS, "--eval-every", "0"], tmp_path, recipe=TINY)
    assert done.returncode == 2
    assert list((tmp_path / "run").iterdir()) == []


def test_who_reads_while_it_runs_and_after_a_kill(tmp_path: Path) -> None:
    directory = begun(tmp_path, 10)
    (tmp_path / "checkpoints" / step_name(10)).mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 17}\n{"event": "checkpoint", "step": 15}\n{"ev')
    (running,) = read_attempts(tmp_path, running=True)
    assert (running.state, running.to_step, running.ended, running.hosts) == ("running", 17, None, ("node1", "node2"))
    (killed,) = read_attempts(tmp_path)
    assert (killed.state, killed.to_step, killed.saved, killed.from_step) == ("killed", 17, 10, 10)
    assert killed.reason == "ended without a word after step 17"
    assert killed.ended is not None
    assert not (tmp_path / "attempts.jsonl").exists()
    directory.release()


def test_a_line_is_added_once_and_a_half_one_is_dropped(tmp_path: Path) -> None:
    first = begun(tmp_path, 0)
    first.write_failure(CAUSE, "it failed", 7, exit_code=3)
    first.write_failure({**CAUSE, "rank": 0}, "a later cause", 7)
    first.release()
    assert [(line["reason"], line["failed_on"], line["exit_code"]) for line in lines(tmp_path)] == [
        ("it failed", "node2", 3)
    ]
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('[]\n{"attempt": "x"}\n{"attempt": 2, "sta')
    append_ended(tmp_path)
    second = begun(tmp_path, 5)
    second.write_status("preempted", 9, "SIGTERM", retryable=True)
    second.release()
    append_ended(tmp_path)
    assert [(one.attempt, one.state) for one in read_attempts(tmp_path)] == [(1, "failed"), (2, "preempted")]
    assert all(isinstance(line, dict) for line in lines(tmp_path))


def test_numbers_go_on_without_the_status(tmp_path: Path) -> None:
    first = begun(tmp_path, 0)
    first.write_status("preempted", 3, "SIGTERM", retryable=True)
    first.release()
    (tmp_path / "status.json").write_text("{")
    assert last_number(tmp_path) == 1
    again = begun(tmp_path, 3)
    again.write_status("completed", 9)
    again.release()
    assert [line["attempt"] for line in lines(tmp_path)] == [1, 2]


def test_a_full_disk_ends_no_run_and_the_next_attempt_makes_up_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    first = begun(tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr("distkit.engine.attempts.write_bytes", full)
        first.write_status("preempted", 3, "SIGTERM", retryable=True)
    first.release()
    assert "attempts.jsonl lacks this attempt for now" in capsys.readouterr().err
    assert [one.state for one in read_attempts(tmp_path)] == ["preempted"]
    begun(tmp_path, 3).release()
    assert [line["state"] for line in lines(tmp_path)] == ["preempted"]


def test_what_is_no_attempt_is_left_out(tmp_path: Path) -> None:
    assert read_attempts(tmp_path / "nowhere") == []
    bad = [b"\xff", b"[1]", b'{"attempt": true, "state": "failed"}', b"[" * 200_000]
    (tmp_path / "attempts.jsonl").write_bytes(b"\n".join(bad))
    (tmp_path / "status.json").write_text('{"attempt": 3, "state": "failed", "step": "x", "hosts": 4, "ranks": 2.5}')
    (only,) = read_attempts(tmp_path)
    assert (only.attempt, only.to_step, only.hosts, only.ranks) == (3, 0, (), None)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "attempts.jsonl").unlink()
    os.link(tmp_path / "fifo", tmp_path / "attempts.jsonl")
    (tmp_path / "fifo").rename(tmp_path / "metrics.jsonl")
    assert len(read_attempts(tmp_path)) == 1
    assert last_step(tmp_path) == 0  # and nobody waits for a writer


def test_a_run_that_was_continued_has_two_lines(tmp_path: Path) -> None:
    for num_steps in (4, 6):
        run = build_run(tmp_path, replace(BASE, num_steps=num_steps, checkpoint=replace(BASE.checkpoint, enabled=True)))
        fit(run)
        run.directory.release()
    assert [(line["from_step"], line["to_step"]) for line in lines(tmp_path / "run")] == [(0, 4), (4, 6)]
