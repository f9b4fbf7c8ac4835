"""Real command lines on what is hostile: one message and the right exit code, on one rank and on two."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.harness import Ended, run_recipe_cli
from support.hostile import UGLY, remove
from support.writing import rehash, reseal

from distkit.checkpoint.format import step_name

TINY = Path(__file__).parents[1] / "support" / "tiny.py"
FLAGS = ["--num-steps", "8", "--checkpoint.enabled", "--checkpoint.save-every", "4", "--checkpoint.keep-last", "None",
         "--timeout-seconds", "30"]  # fmt: skip
CLAIM = b'{"state": "completed", "step": 1000000000, "attempt": 1}'
NEWEST = f"checkpoints/{step_name(8)}"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps on two ranks."""
    run = tmp_path_factory.mktemp("pristine") / "run"
    ended = train(run, 2)
    assert [one.returncode for one in ended] == [0, 0], ended
    return run


def train(run: Path, world_size: int, *flags: str) -> list[Ended]:
    """The recipe's command line, as it is typed again after a kill."""
    return run_recipe_cli([*FLAGS, "--run-dir", str(run), *flags], run.parent, recipe=TINY, world_size=world_size,
                          timeout=60)  # fmt: skip


def command(*argv: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "distkit", *argv], capture_output=True, timeout=60)


def put(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda run: (remove(run / name), (run / name).write_bytes(data))


def make(name: str, how: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda run: (remove(run / name), how(run / name))


def bad_state(run: Path) -> None:
    (run / NEWEST / "state.json").write_text("[]")
    rehash(run / NEWEST, "state.json")


def many_boxes(run: Path) -> None:
    """44^3 boxes that overlap."""

    def change(manifest: dict[str, object]) -> None:
        entry = manifest["tensors"]["model/0.weight"]  # type: ignore[index]
        shard, places = entry["shards"][0], [(a, b, c) for a in range(44) for b in range(44) for c in range(44)]
        entry["shape"] = [44, 44, 44]
        entry["shards"] = [{**shard, "key": str(at), "offsets": [min(i, 42) for i in at], "shape": [2, 2, 2]}
                           for at in places]  # fmt: skip

    reseal(run / NEWEST, change)


#: What is done to a run, the exit code of the same command again on two ranks with 12 steps, and what it says.
CASES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "state": (bad_state, 0, "state.json is not a JSON object, but a list"),
    "boxes": (many_boxes, 0, "do not fill it exactly once"),
    "status-claims": (put("status.json", CLAIM), 0, "is of step 8"),
    "weights-folder": (make("weights.safetensors", Path.mkdir), 2, "weights.safetensors is not a regular file"),
    "metrics-fifo": (make("metrics.jsonl", os.mkfifo), 2, "metrics.jsonl is not a regular file"),
    "lease-fifo": (make("lease.json", os.mkfifo), 2, "is not a regular file"),
    "stop-folder": (make("STOP", Path.mkdir), 0, ""),
    "ugly": (lambda run: (run / f"checkpoints/x{UGLY[:5]}").mkdir(), 0, ""),
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_taken_up_or_refused_by_all_ranks_alike(name: str, pristine: Path, tmp_path: Path) -> None:
    damage, code, says = CASES[name]
    run = tmp_path / "run"
    shutil.copytree(pristine, run, symlinks=True)
    damage(run)
    listed = command("checkpoint", "verify", str(run))
    assert listed.returncode == (name in ("state", "boxes"))
    for argv in (["show"], ["jobs"], ["checkpoint", "list"]):
        seen = command(*argv, str(run))
        assert b"Traceback" not in seen.stderr
        assert b"\x1b" not in seen.stdout + seen.stderr
    ended = train(run, 2, "--num-steps", "12")
    assert [one.returncode for one in ended] == [code, code], ended
    said = [one.stderr for one in ended]
    assert says in said[0]
    assert not any("Traceback" in text or "\x1b" in text for text in said)
    assert said[1] == ""
    assert len(said[0].splitlines()) < 10


BREAKS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from dataclasses import replace
from support import tiny
from distkit.entry import main

def compute_loss(config, model, batch):
    if Path({path!r}).parent.is_dir():  # not yet for the batch before the first step
        Path({path!r}).mkdir(exist_ok=True)
    return tiny.compute_loss(config, model, batch)

main(replace(tiny.RECIPE, compute_loss=compute_loss))
"""


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["weights.safetensors", "summary.json"])
def test_what_rank_zero_cannot_write_at_the_end_ends_all_ranks_alike(name: str, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", tmp_path / "breaks.py"
    recipe.write_text(BREAKS.format(tests=str(Path(__file__).parents[1]), path=str(run / name)))
    ended = run_recipe_cli(["--num-steps", "5", "--run-dir", str(run)], tmp_path, recipe=recipe, world_size=2)
    assert [one.returncode for one in ended] == [1, 1], ended
    assert "Traceback" not in ended[0].stderr
    (line,) = ended[0].stderr.splitlines()
    assert f"cannot write {run / name}: Is a directory" in line
    assert ended[1].stderr == ""
    assert '"state": "failed"' in (run / "status.json").read_text()


@pytest.mark.parametrize("what", ["fifo", "deep", "folder", "twice"])
def test_a_configuration_that_is_none_is_refused_at_once(what: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if what in ("fifo", "folder"):
        (os.mkfifo if what == "fifo" else os.mkdir)(file)
    else:
        file.write_text("[" * 10**6 if what == "deep" else '{"seed": 1, "seed": 2}')
    (ended,) = run_recipe_cli(["--config", str(file)], tmp_path, recipe=TINY, timeout=30)
    assert ended.returncode == 2
    assert f"--config {file} cannot be read" in ended.stderr
    assert len(ended.stderr.splitlines()) < 6
    assert list(tmp_path.iterdir()) == [file]
