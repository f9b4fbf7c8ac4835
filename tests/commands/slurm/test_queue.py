"""squeue, where it does not answer as it should; tests/slurm has a real one."""

from pathlib import Path

import pytest

from distkit.commands.slurm.queue import ask_queue, is_queued


def squeue(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "squeue"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_no_squeue_and_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_queue(["7"]) is None
    squeue(tmp_path, "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", monkeypatch)
    assert ask_queue(["7"]) is None
    assert ask_queue([]) == {}
    monkeypatch.setattr("distkit.commands.slurm.queue.TIMEOUT_SECONDS", 0.2)
    squeue(tmp_path, "exec sleep 60", monkeypatch)
    assert ask_queue(["7"]) is None


def test_jobs_are_asked_for_once_and_a_forgotten_one_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue(tmp_path, f'echo "$@" >> {tmp_path}/calls; echo "7|RUNNING|None"; echo " 9|PENDING|Resources"', monkeypatch)
    assert ask_queue(["9", "7", "9", "8"]) == {"7": "RUNNING", "9": "PENDING (Resources)"}
    assert (tmp_path / "calls").read_text().splitlines() == ["--noheader --states=all --format=%A|%T|%r --jobs=7,8,9"]
    squeue(tmp_path, "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", monkeypatch)
    assert ask_queue(["7"]) == {}


def test_what_is_still_in_the_queue() -> None:
    assert all(map(is_queued, ("RUNNING", "PENDING (Dependency)", "REQUEUED", "COMPLETING", "SUSPENDED (None)")))
    assert not any(map(is_queued, ("COMPLETED", "FAILED (NonZeroExitCode)", "TIMEOUT (TimeLimit)")))
