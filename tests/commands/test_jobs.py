"""`distkit jobs`: which directories are runs, and how each stands."""

import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from distkit.checkpoint.format import step_name
from distkit.commands import run
from distkit.commands.jobs import ago, find_runs
from distkit.engine.lease import Lease


@pytest.fixture(autouse=True)
def no_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)


Facts = Mapping[str, object]


def make(folder: str, status: Facts | None = None, submission: Facts | None = None) -> Path:
    path = Path("runs", folder)
    path.mkdir(parents=True)
    if status is not None:
        (path / "status.json").write_text(json.dumps({"attempt": 1, "step": 0, **status}))
    if submission is not None:
        (path / "submissions" / "1").mkdir(parents=True)
        (path / "submissions" / "1" / "submission.json").write_text(json.dumps(submission))
    return path


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert run(["jobs", "--json"]) == 0
    return {row.pop("run"): row for row in json.loads(capsys.readouterr().out)}


def test_each_state_has_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    make("gpt/a", {"state": "completed", "step": 1200, "num_steps": 1200, "attempt": 3, "job": "7"})
    running = make("gpt/b", {"state": "running", "num_steps": 50, "job": "8"})
    (running / "metrics.jsonl").write_text('{"step": 17}\n')
    killed = make("gpt/c", {"state": "running", "step": 5})
    (killed / "checkpoints" / step_name(5)).mkdir(parents=True)
    make("gpt/d", None, {"jobs": ["9", "10"], "submitted": "2026-11-30T10:00:00+00:00"})
    stopped, submitted = {"state": "preempted", "retryable": True}, "2026-11-30T10:00:00+00:00"
    before, after = "2026-11-29T10:00:00+00:00", "2026-11-30T11:00:00+00:00"
    make("gpt/e", {**stopped, "step": 9, "job": "6", "began": before}, {"jobs": ["11"], "submitted": submitted})
    make("gpt/f", {**stopped, "job": "11", "began": after}, {"jobs": ["11"], "submitted": submitted})
    lease = Lease.acquire(running)
    found = rows(capsys)
    lease.release()
    known = {name.removeprefix("runs/gpt/"): (row["state"], row["job"], row["step"], row["num_steps"], row["attempts"])
             for name, row in found.items()}  # fmt: skip
    assert known == {
        "a": ("completed", "7", 1200, 1200, 3), "b": ("running", "8", 17, 50, 1), "c": ("killed", None, 5, None, 1),
        "d": ("submitted", "9", 0, None, 0), "e": ("preempted", "11", 9, None, 1), "f": ("preempted", "11", 0, None, 1),
    }  # fmt: skip
    assert all(row["scheduler"] is None for row in found.values())
    assert "goes on" in str(found["runs/gpt/c"]["verdict"])


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    make("gpt/a", {"state": "completed", "step": 1200, "num_steps": 1200, "attempt": 3, "job": "7"})
    cause = {"rank": 0, "phase": "step", "step": 7}
    failed = {"state": "failed", "step": 7, "attempt": 1, "cause": cause, "reason": "ValueError: [bold]x", "saved": -1}
    worse = make("gpt/a run with a rather long name, which nobody should have to read in several pieces",
                 {**failed, "attempt": 2})  # fmt: skip
    (worse / "attempts.jsonl").write_text(json.dumps(failed))
    assert run(["jobs"]) == 0
    header, first, second, verdict = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "job", "state", "step", "attempts", "last", "seen", "scheduler"]
    assert first.split()[:7] == ["runs/gpt/a", "7", "completed", "1,200", "of", "1,200", "3"]
    assert second.startswith(f"{worse}  ")
    assert second.removeprefix(str(worse)).split()[:3] == ["failed", "7", "2"]
    assert verdict.startswith(f"{worse} fails each time in step 7 (2 times)")
    assert "ValueError: [bold]x" in verdict


def test_a_run_that_cannot_be_read_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make("a", {"state": "completed"})
    (make("b", {"state": "completed"}) / "checkpoints").mkdir()
    listdir = os.listdir

    def refused(path: Path) -> list[str]:  # root may read everything
        if str(path) == "runs/b/checkpoints":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refused)
    assert [row["state"] for row in rows(capsys).values()] == ["completed", "unreadable"]
    assert run(["jobs"]) == 0
    assert "runs/b runs/b/checkpoints cannot be read" in capsys.readouterr().out


def test_where_runs_are_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    inner = make("gpt/a", {"state": "completed"})
    (inner / "checkpoints").mkdir()
    (inner / "checkpoints" / "status.json").touch()
    make("deep/er/still", {"state": "completed"})
    (Path("runs") / "notes").mkdir()
    assert [str(path) for path in find_runs(Path("runs"))] == ["runs/deep/er/still", "runs/gpt/a"]
    assert [str(path) for path in find_runs(inner)] == ["runs/gpt/a"]
    assert run(["jobs", "runs/notes"]) == 0
    assert capsys.readouterr().out == "no run in runs/notes\n"
    assert run(["jobs", "nowhere"]) == 2
    assert "distkit jobs FOLDER" in capsys.readouterr().err


def test_what_squeue_says_is_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    make("a", {"state": "preempted", "job": "7", "retryable": True})
    make("b", {"state": "completed", "job": "8"})
    make("c", {"state": "completed"})
    (tmp_path / "squeue").write_text("#!/bin/sh\necho '7|PENDING|BeginTime'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [row["scheduler"] for row in rows(capsys).values()] == ["PENDING (BeginTime)", "gone", None]


def test_how_long_ago() -> None:
    now = time.time()
    said = [ago(None), ago(now + 60), ago(now - 90), ago(now - 7300), ago(now - 200_000)]
    assert said == ["", "0 s ago", "1 min ago", "2 h ago", "2 d ago"]
