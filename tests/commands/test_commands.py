"""The `distkit` command."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.writing import default_state, write_checkpoint

import distkit
from distkit.checkpoint.digest import state_digest
from distkit.checkpoint.format import step_name
from distkit.commands import run
from distkit.engine.lease import Lease


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "usage: distkit" in capsys.readouterr().out
    assert run([]) == 2
    assert run(["version"]) == 0
    assert capsys.readouterr().out.endswith(f"{distkit.__version__}\n")


@pytest.mark.parametrize("argv", [["--help"], ["checkpoint", "--help"], ["generate", "--help"], ["version"]])
def test_a_reader_that_has_seen_enough_is_no_error(argv: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run([sys.executable, "-m", "distkit", *argv], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, b"")


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = {"state": "failed", "step": 30, "reason": "ValueError: x", "attempt": 1}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert run(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "failed at step 30" in out
    assert "ValueError: x" in out
    (tmp_path / "summary.json").write_text(json.dumps({"best": {"top1": 0.75, "step": 10.0}, "state_digest": "ab"}))
    assert run(["show", str(tmp_path)]) == 0
    assert "top1 0.75" in capsys.readouterr().out


def test_show_lists_the_ledger_of_the_newest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": "failed", "step": 30, "reason": None, "attempt": 1}))
    for step, text in ((10, "garbage"), (20, json.dumps({"parts": {"skips": {"skips": [{"step": 7, "why": "so"}]}}}))):
        (tmp_path / "checkpoints" / step_name(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / step_name(step) / "state.json").write_text(text)
    assert run(["show", str(tmp_path)]) == 0
    assert "skipped step 7: so" in capsys.readouterr().out
    (tmp_path / "checkpoints" / step_name(20) / "state.json").unlink()
    (tmp_path / "checkpoints" / step_name(30)).mkdir()
    (tmp_path / "checkpoints" / step_name(30) / "state.json").write_text("garbage")
    assert run(["show", str(tmp_path)]) == 0
    assert "skipped" not in capsys.readouterr().out


def test_show_a_run_that_is_running_and_one_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "step": 0, "reason": None, "attempt": 1}))
    assert run(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no process is running it: it was killed" in out
    assert "nothing saved yet" in out
    (tmp_path / "checkpoints" / step_name(500)).mkdir(parents=True)
    lease = Lease.acquire(tmp_path)
    assert run(["show", str(tmp_path)]) == 0
    lease.release()
    out = capsys.readouterr().out
    assert f"runs as process {os.getpid()} on " in out
    assert "saved at step 500" in out


def test_show_gives_a_verdict_over_the_attempts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cause = {"rank": 0, "host": "a", "phase": "step", "step": 7}
    attempt = {"state": "failed", "step": 7, "reason": "ValueError: x", "cause": cause, "retryable": False}
    lines = [json.dumps({**attempt, "attempt": number}) for number in (1, 2)]
    (tmp_path / "attempts.jsonl").write_text("\n".join(lines))
    (tmp_path / "status.json").write_text(json.dumps({**attempt, "attempt": 3}))
    assert run(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "  attempts: 3\n" in out
    assert "  verdict: fails each time in step 7 (3 times), without a new checkpoint" in out
    (tmp_path / "status.json").write_text(json.dumps({**attempt, "state": "running", "attempt": 4}))
    lease = Lease.acquire(tmp_path)
    assert run(["show", str(tmp_path)]) == 0
    lease.release()
    assert "  verdict: is running; a file STOP" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["shwo", "x"], "distkit show"),
        (["show"], "one run directory"),
        (["show", "nowhere"], "nowhere"),
        (["version", "x"], "no argument"),
        (["slurm", "plna"], "invalid choice"),
        (["submit"], "RECIPE"),
        (["submit", "nowhere.py", "--node", "2"], "unrecognized arguments"),
        (["jobs", "a", "b"], "unrecognized arguments"),
        (["data"], "pack|show|verify"),
        (["data", "pakc"], "invalid choice"),
        (["data", "pack", "nowhere"], "OUT"),
        (["data", "pack", "nowhere", "out"], "no folder nowhere"),
        (["data", "pack", "nowhere", "out", "--split", "val"], "--split"),
        (["data", "pack", "nowhere", "out", "--workers", "0"], "--workers"),
        (["data", "show", "nowhere"], "nowhere"),
        (["data", "verify", "nowhere"], "nowhere"),
        (["checkpoint"], "list|show|verify|diff|digest|prune|export"),
        (["checkpoint", "lsit"], "invalid choice"),
        (["checkpoint", "list"], "RUN"),
        (["checkpoint", "list", "nowhere"], "nothing there"),
        (["checkpoint", "show", "nowhere"], "nothing there"),
        (["checkpoint", "show", ".", "--tensor"], "--tensor"),
        (["checkpoint", "verify", "nowhere"], "nothing there"),
        (["checkpoint", "diff", "nowhere"], "B"),
        (["checkpoint", "diff", "nowhere", "nowhere"], "nothing there"),
        (["checkpoint", "diff", "a", "b", "--limit", "0"], "0 is not 1 or more"),
        (["checkpoint", "digest", "nowhere"], "nothing there"),
        (["checkpoint", "prune", "nowhere"], "--keep-last"),
        (["checkpoint", "prune", "nowhere", "--keep-last", "1"], "nothing there"),
        (["checkpoint", "prune", "nowhere", "--keep-last", "-1"], "-1 is not 1 or more"),
        (["checkpoint", "prune", "nowhere", "--keep-last", "one"], "one"),
        (["checkpoint", "prune", "nowhere", "--keep-last", "1", "--keep-best", "1"], "--metric, --mode is missing"),
        (["checkpoint", "prune", "nowhere", "--keep-last", "1", "--metric", "loss"], "--keep-best, --mode is missing"),
        (["checkpoint", "export", "nowhere"], "OUT.safetensors"),
        (["checkpoint", "export", "nowhere", "out.safetensors"], "nothing there"),
        (["checkpoint", "export", "nowhere", "out.safetensors", "--max-shard-size", "5"], "nothing there"),
        (["checkpoint", "export", "nowhere", "out.safetensors", "--max-shard-size", "big"], "--max-shard-size 5GB"),
        (["checkpoint", "export", "nowhere", "out.safetensors", "--dtype", "int8"], "--dtype"),
    ],
)
def test_wrong_lines(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) < 10


def test_a_broken_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{", "[]", "{}", "[" * 200_000):
        (tmp_path / "status.json").write_text(text)
        assert run(["show", str(tmp_path)]) == 2
        assert "status.json" in capsys.readouterr().err
    (tmp_path / "status.json").unlink()
    os.mkfifo(tmp_path / "status.json")
    assert run(["show", str(tmp_path)]) == 2
    assert "not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["show", "checkpoint list", "checkpoint verify", "checkpoint digest"])
def test_a_directory_that_may_not_be_read_is_named(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "status.json").write_text(json.dumps({"state": "running", "step": 0}))
    listdir = os.listdir

    def refused(path: Path) -> list[str]:  # root, who runs tests in containers, may read everything
        if str(path).endswith("checkpoints"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refused)
    assert run([*verb.split(), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "checkpoints cannot be read" in error
    assert "Permission denied" in error


def test_pack_show_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        path = tmp_path / "flowers" / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    out = tmp_path / "out"
    assert run(["data", "pack", str(tmp_path / "flowers"), str(out), "--split", "test", "--workers", "1"]) == 0
    assert "test: 6 raw images 3x8x8, 2 classes" in capsys.readouterr().out
    file = str(out / "test")
    assert run(["data", "show", file]) == 0
    shown = capsys.readouterr().out
    assert "flowers, test" in shown
    assert "class 0, class 1" in shown
    assert run(["data", "verify", file]) == 0
    shard = out / "test" / "images-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-25] ^= 1  # the last pixel: 6 checksums of 4 bytes follow
    shard.write_bytes(data)
    assert run(["data", "verify", file]) == 1
    error = capsys.readouterr().err
    assert f"{shard.name} is damaged" in error
    assert "class 1/5.png" in error
    assert run(["data", "show", str(out)]) == 2
    assert f"distkit data show {file}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run(["data", "pack", "--help"])
    assert ended.value.code == 0
    assert "--overwrite" in capsys.readouterr().out


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 5, 10 and 15; the weights of the last differ."""
    run_dir = tmp_path / "run"
    for step, world_size in ((5, 1), (10, 3), (15, 2)):
        tensors = {"model/fc.weight": torch.full((6, 2), float(step // 15)), "optimizer/fc.weight/step": torch.ones(())}
        tensors["ema/fc.weight"] = torch.full((6, 2), 0.5)
        last = {"step": float(step), "loss": abs(step - 9.0)}
        state = default_state(step, world_size)
        state["parts"]["trackers"]["last"] = last
        write_checkpoint(run_dir / "checkpoints", step, tensors, world_size=world_size, state=state)
    return run_dir


def test_looking_at_checkpoints(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = saved / "checkpoints" / step_name(15)
    assert run(["checkpoint", "list", str(saved)]) == 0
    assert "loss 6  <- newest" in capsys.readouterr().out
    assert run(["checkpoint", "list", str(saved), "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)["checkpoints"]] == [5, 10, 15]
    assert run(["checkpoint", "show", str(saved), "--tensors"]) == 0
    assert "model/fc.weight  float32 [6, 2]" in capsys.readouterr().out
    assert run(["checkpoint", "digest", str(newest)]) == 0
    learned = {"model/fc.weight": torch.ones(6, 2), "optimizer/fc.weight/step": torch.ones(())}
    assert capsys.readouterr().out == state_digest(learned) + "\n"


def test_verifying_checkpoints(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["checkpoint", "verify", str(saved), "--all"]) == 0
    assert capsys.readouterr().out.count("verified") == 3
    shard = next((saved / "checkpoints" / step_name(10)).glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(["checkpoint", "verify", str(saved)]) == 0
    assert run(["checkpoint", "verify", str(saved), "--all"]) == 1
    assert f"damaged: {shard.parent}: {shard.name} has " in capsys.readouterr().out
    assert run(["checkpoint", "show", str(shard.parent)]) == 0
    (shard.parent / "MANIFEST.json").write_text("{}")
    capsys.readouterr()
    assert run(["checkpoint", "show", str(shard.parent)]) == 1
    assert "MANIFEST.json" in capsys.readouterr().err


def test_comparing_checkpoints(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved / "checkpoints"
    assert run(["checkpoint", "diff", str(folder / step_name(15)), str(saved)]) == 0
    assert capsys.readouterr().out == "equal, bit for bit\n"
    assert run(["checkpoint", "diff", str(folder / step_name(5)), str(saved), "--limit", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("model/fc.weight float32 [6, 2]: 12 of 12 elements differ, max abs 1, max relative 1, "
                        "first at [0, 0]: 0.0 and 1.0")  # fmt: skip
    assert lines[1:] == [
        "state.json: parts.progress.step: 5 and 15",
        "... and 4 more",
        "ignored: state.json: parts.clock.samples: 40 and 120",
        "different",
    ]


def test_pruning_checkpoints(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["checkpoint", "prune", str(saved), "--keep-last", "1"]
    best = ["--keep-best", "1", "--metric", "loss", "--mode", "min"]
    names = [step_name(step) for step in (5, 10, 15)]
    assert run([*command, *best]) == 0
    assert sorted(os.listdir(saved / "checkpoints")) == names
    assert "--yes" in capsys.readouterr().out
    assert run([*command, *best, "--yes"]) == 0
    assert sorted(os.listdir(saved / "checkpoints")) == names[1:]
    lease = Lease.acquire(saved)
    assert run([*command, "--yes"]) == 2
    lease.release()
    assert f"process {os.getpid()}" in capsys.readouterr().err
    assert run([*command, "--keep-every", "5", "--yes"]) == 0
    assert sorted(os.listdir(saved / "checkpoints")) == names[1:]
    assert run([*command, "--yes"]) == 0
    assert os.listdir(saved / "checkpoints") == names[2:]


def test_exporting_a_checkpoint(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.safetensors"
    command = ["checkpoint", "export", str(saved), str(out)]
    assert run(command) == 0
    assert torch.equal(load_file(out)["fc.weight"], torch.ones(6, 2))
    assert run(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run([*command, "--overwrite", "--ema", "--dtype", "bf16", "--max-shard-size", "5GB"]) == 0
    assert torch.equal(load_file(out)["fc.weight"], torch.full((6, 2), 0.5, dtype=torch.bfloat16))


def test_the_command_as_a_module_without_torch(saved: Path) -> None:
    code = "import sys, distkit.commands as c\ncode = c.run(sys.argv[1:])\nassert 'torch' not in sys.modules, code"
    for words in (["checkpoint", "list", str(saved)], ["checkpoint", "verify", str(saved)]):
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)
    argv = [sys.executable, "-m", "distkit", "checkpoint", "--help"]
    text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert all(verb in text for verb in ("list", "show", "verify", "diff", "digest", "prune", "export"))
