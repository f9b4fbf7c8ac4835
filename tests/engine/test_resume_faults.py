"""Real ranks, killed at every point of a save, started again with the same command: the run never killed (C3, C4)."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.harness import Ended, run_recipe_cli

from distkit.checkpoint.verify import verify
from distkit.runtime.faults import SAVE_POINTS

TINY = Path(__file__).parents[1] / "support" / "tiny.py"
KILLED = -signal.SIGKILL
# mid-epoch (12 steps each), with accumulation, dropout, BatchNorm, EMA, clipping and fp16 scaling
FLAGS = [
    "--microbatch-size",
    "2",
    "--dropout",
    "0.2",
    "--noise",
    "0.1",
    "--batch-norm",
    "--ema-decay",
    "0.9",
    "--precision",
    "fp16",
    "--optim.name",
    "adamw",
    "--optim.lr",
    "0.01",
    "--max-grad-norm",
    "0.5",
    "--eval-every",
    "6",
    "--report-every",
    "3",
    "--observe.console",
    "--checkpoint.enabled",
    "--checkpoint.save-every",
    "5",
    "--checkpoint.keep-last",
    "1",
    "--checkpoint.keep-best",
    "None",
]  # as it is typed
TIMED = {"samples_per_second", "data_wait_seconds", "seconds", "mfu"}


def train(
    folder: Path, more: Sequence[str] = (), fault: str = "", world_size: int = 2, timeout: float = 120
) -> list[Ended]:
    env = {"DISTKIT_FAULT": fault} if fault else {}
    argv = [*FLAGS, *more, "--run-dir", str(folder / "run")]
    return run_recipe_cli(argv, folder, recipe=TINY, world_size=world_size, env=env, timeout=timeout)


def ended_well(ranks: list[Ended]) -> None:
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(rank.stderr for rank in ranks)


def digest(folder: Path) -> str:
    return str(json.loads((folder / "run" / "summary.json").read_text())["state_digest"])


def metric_lines(folder: Path) -> list[dict[str, object]]:
    events = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in TIMED} for e in events if e["event"] in ("train", "eval")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    ended_well(train(folder))
    return folder


def nothing_half(folder: Path) -> None:
    """What is called a checkpoint verifies, and nothing else is left."""
    for path in (folder / "run" / "checkpoints").iterdir():
        verify(path)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("how", ["on", "off"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ["step", *SAVE_POINTS])
def test_killed_at_any_point_it_ends_the_same(point: str, rank: int, how: str, straight: Path, tmp_path: Path) -> None:
    more = ["--checkpoint.async", how]
    killed = train(tmp_path, more, fault=f"{point}:{rank}:10:kill")
    assert killed[rank].returncode == KILLED, killed[rank].stderr
    assert killed[1 - rank].returncode != 0
    ended_well(train(tmp_path, more))
    nothing_half(tmp_path)
    assert digest(tmp_path) == digest(straight)
    assert metric_lines(tmp_path) == metric_lines(straight)
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.startswith((".", "lease"))) == []


SHARDED = {
    "fsdp": ["--strategy", "fsdp"],
    "zero1": ["--strategy", "zero1"],
    "zero3": ["--strategy", "zero3"],
}
#: In fp32 and without BatchNorm, which not every strategy takes.
PLAIN = ["--precision", "fp32", "--no-batch-norm"]


@pytest.fixture(scope="module", params=SHARDED)
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp(request.param)
    flags = [*PLAIN, *SHARDED[request.param]]
    ended_well(train(folder, flags))
    return flags, folder


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["half_shard:1:10", "before_vote:0:10", "after_manifest:0:10", "after_rename:1:10", "in_retention:0:10"]
)
def test_sharded_runs_killed_at_some_points_end_the_same(
    fault: str, sharded: tuple[list[str], Path], tmp_path: Path
) -> None:
    flags, straight = sharded
    assert train(tmp_path, flags, fault=f"{fault}:kill")[int(fault.split(":")[1])].returncode == KILLED
    ended_well(train(tmp_path, flags))
    nothing_half(tmp_path)
    assert digest(tmp_path) == digest(straight)
    assert metric_lines(tmp_path) == metric_lines(straight)


@pytest.mark.distributed
def test_killed_again_and_again(straight: Path, tmp_path: Path) -> None:
    for point in ("step:1:3", "half_shard:0:5", "after_rename:1:5", "before_vote:1:10", "step:0:14", "staging:1:20"):
        rank = int(point.split(":")[1])
        assert train(tmp_path, fault=f"{point}:kill")[rank].returncode == KILLED, point
    ended_well(train(tmp_path))
    assert digest(tmp_path) == digest(straight)
    assert metric_lines(tmp_path) == metric_lines(straight)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["attempt"] == 7


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["on", "off"])
@pytest.mark.parametrize(("fault", "words"), [
    ("half_shard:1:10:enospc", "rank 1: No space left on device"),
    ("before_manifest:0:10:raise", "rank 0: RuntimeError"),
    ("staging:0:10:raise", "rank 0: "),
])  # fmt: skip
def test_a_save_that_fails_is_told_and_training_goes_on(
    fault: str, words: str, how: str, straight: Path, tmp_path: Path
) -> None:
    ended_well(train(tmp_path, ["--checkpoint.async", how], fault=fault))
    assert digest(tmp_path) == digest(straight)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = {event["step"]: event.get("error") for event in events if event["event"] == "checkpoint"}
    assert set(told) == {5, 10, 15, 20}
    assert [step for step, error in told.items() if error] == [10]
    assert words in told[10]
    nothing_half(tmp_path)


@pytest.mark.distributed
def test_too_many_failures_end_all_ranks_alike(tmp_path: Path) -> None:
    ranks = train(tmp_path, ["--checkpoint.max-failures", "2"], fault="before_fsync:1:*:enospc")
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "2 saves in a row failed" in ranks[0].stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "2 saves in a row" in status["reason"]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.distributed
def test_slow_disks_hold_nothing_up(straight: Path, tmp_path: Path) -> None:
    ended_well(train(tmp_path, ["--checkpoint.async", "on"], fault="before_fsync:0:5:slow"))
    assert digest(tmp_path) == digest(straight)


@pytest.mark.distributed
def test_two_processes_in_one_directory(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    more = ["--num-steps", "3000", "--checkpoint.save-every", "1000", "--report-every", "1000", "--eval-every", "None"]
    (tmp_path / "run").mkdir()
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(train, tmp_path, more, world_size=1) for _ in range(2)]
        ended = [one.result()[0] for one in both]
    assert sorted(one.returncode for one in ended) == [0, 2], [one.stderr for one in ended]
    loser = next(one for one in ended if one.returncode == 2)
    assert "in use by another run" in loser.stderr
    assert re.search(r"kill \d+", loser.stderr)
    assert os.uname().nodename in loser.stderr
    assert loser.stderr.count("\n") < 10


@pytest.mark.distributed
def test_a_malformed_fault_is_refused(tmp_path: Path) -> None:
    ended = train(tmp_path, fault="nowhere:0:1:kill", world_size=1)[0]
    assert ended.returncode == 2
    assert "DISTKIT_FAULT" in ended.stderr
    assert list(tmp_path.iterdir()) == []
