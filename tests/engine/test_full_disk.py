"""Real disks that are full or read-only: the old checkpoint stays, training goes on, all ranks agree (C4, C7)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import free_port, rank_environment

TINY = Path(__file__).parents[1] / "support" / "tiny.py"
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting a small disk needs root"),
]
# each checkpoint has about 40 KB: 5,056 bytes of torch's generator and 10 KB of python's and numpy's on each rank
FLAGS = [
    "--checkpoint.enabled",
    "--checkpoint.save-every",
    "5",
    "--checkpoint.keep-last",
    "None",
    "--checkpoint.keep-best",
    "None",
    "--report-every",
    "5",
]  # as it is typed


def on_disk(
    folder: Path, mount: str, argv: list[str], world_size: int = 2, recipe: Path = TINY
) -> list[tuple[int, str]]:
    """Run the tiny recipe with `mount` done in a namespace of its own; what lies there is copied to folder/out."""
    disk, out = folder / "disk", folder / "out"
    disk.mkdir(exist_ok=True)
    launch = (
        "import subprocess, sys, os, json\n"
        "envs, argv = json.loads(sys.argv[1]), sys.argv[2:]\n"
        "ranks = [subprocess.Popen([sys.executable, *argv], env={**os.environ, **e}, stdout=subprocess.DEVNULL,\n"
        "                          stderr=subprocess.PIPE, text=True) for e in envs]\n"
        "errors = [rank.communicate(timeout=100)[1] for rank in ranks]\n"
        "print(json.dumps([[rank.returncode, error] for rank, error in zip(ranks, errors)]))\n"
    )
    port = free_port()
    envs = [{**rank_environment(rank, world_size, port), "OMP_NUM_THREADS": "1"} for rank in range(world_size)]
    script = f'{mount} && shift && "$@"; code=$?; cp -r {disk} {out}; exit $code'
    command = [sys.executable, "-c", launch, json.dumps(envs), str(recipe), *argv, "--run-dir", str(disk / "run")]
    run = subprocess.run(["unshare", "--mount", "sh", "-c", script, "sh", "", *command], capture_output=True, text=True,
                         timeout=120, cwd=folder)  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [(code, error) for code, error in json.loads(run.stdout)]


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    lines = (folder / "out" / "run" / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("how", ["on", "off"])
def test_a_full_disk_ends_no_run_before_its_time(how: str, tmp_path: Path) -> None:
    from distkit.checkpoint.verify import verify

    # room for the run's own files and two checkpoints: the third fails, and so do all later ones
    mount = f"mount -t tmpfs -o size=220k tmpfs {tmp_path / 'disk'}"
    ranks = on_disk(tmp_path, mount, [*FLAGS, "--checkpoint.async", how, "--checkpoint.max-failures", "9"])
    told = {event["step"]: event.get("error") for event in events(tmp_path, "checkpoint")}
    assert told[5] is None
    assert "No space left on device" in str(told[20])
    saved = sorted((tmp_path / "out" / "run" / "checkpoints").iterdir())
    assert [int(path.name[5:]) for path in saved] == [step for step, error in told.items() if error is None]
    assert [verify(path).step for path in saved]
    assert len(events(tmp_path, "train")) == 4  # to the end
    # and then it is not called completed: its last state is on no disk
    assert [code for code, _ in ranks] == [1, 1]
    assert "the last checkpoint was not saved" in ranks[0][1]
    assert json.loads((tmp_path / "out" / "run" / "status.json").read_text())["state"] == "failed"


FILLS = """
import contextlib, os, sys, time
from dataclasses import replace

sys.path.insert(0, os.environ["TINY"])
from support import tiny
from distkit import main

calls = 0


def compute_loss(config, model, batch):
    global calls
    calls += 1
    if calls == 9 and os.environ["RANK"] == "0":
        while not (config.run_dir / "checkpoints" / "step-000000005").exists():
            time.sleep(0.01)
        with open(config.run_dir.parent / "fill", "wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
    return tiny.compute_loss(config, model, batch)


if __name__ == "__main__":
    main(replace(tiny.RECIPE, compute_loss=compute_loss))
"""


@pytest.mark.parametrize("how", ["on", "off"])
def test_a_disk_without_one_free_block_hides_nothing(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY", str(TINY.parents[1]))
    (tmp_path / "fills.py").write_text(FILLS)
    mount = f"mount -t tmpfs -o size=300k tmpfs {tmp_path / 'disk'}"
    argv = [*FLAGS, "--checkpoint.async", how, "--checkpoint.max-failures", "9"]
    ranks = on_disk(tmp_path, mount, argv, recipe=tmp_path / "fills.py")
    assert [code for code, _ in ranks] == [1, 1]
    assert "No space left on device" in ranks[0][1]
    assert "Traceback" not in ranks[0][1]
    assert ranks[0][1].count("\n") < 10, ranks[0][1]
    run = tmp_path / "out" / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000005"]
    assert not list(run.glob(".tmp-*"))
    # written over in place
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert "No space left on device" in status["reason"]


def test_a_read_only_directory_is_refused_before_step_1(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk} && mkdir {disk}/run && mount -o remount,ro {disk}"
    ranks = on_disk(tmp_path, mount, FLAGS)
    assert [code for code, _ in ranks] == [2, 2]
    assert "Read-only file system" in ranks[0][1] or "not writable" in ranks[0][1]
    assert ranks[0][1].count("\n") < 10
    assert list((tmp_path / "out" / "run").iterdir()) == []


def test_a_read_only_folder_of_checkpoints_is_refused_before_step_1(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    mount = (
        f"mount -t tmpfs -o size=1m tmpfs {disk} && mkdir -p {disk}/run/checkpoints && "
        f"mount -t tmpfs -o ro,size=1m tmpfs {disk}/run/checkpoints"
    )
    ranks = on_disk(tmp_path, mount, FLAGS)
    assert [code for code, _ in ranks] == [2, 2]
    assert "Read-only file system" in ranks[0][1]
    assert not (tmp_path / "out" / "run" / "metrics.jsonl").exists()
