"""Buffers of several ranks: a rank's own are saved for each, statistics are rank 0's, others must be the same."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.carry import RECIPE, Carry, Config
from support.harness import ROOT, Ended, run_recipe_cli
from support.strategy_runs import STRATEGIES, curve, on_ranks
from torch import nn

from distkit import load_run, register_rank_buffer
from distkit.config import CheckpointConfig, Constant
from distkit.tensors.buffers import rank_buffers, set_rank_buffers_, shared_buffers

MIDDLE, END = 4, 10
BASE = replace(RECIPE.presets["default"], num_steps=END, report_every=1, timeout_seconds=240, schedule=Constant(),
               checkpoint=CheckpointConfig(save_every=MIDDLE, keep_last=None))  # fmt: skip


def run_cli(folder: Path, kind: str, *argv: str, world_size: int = 2) -> list[Ended]:
    """The recipe with what it carries of one `kind`, on real ranks, in FOLDER/run."""
    folder.mkdir(exist_ok=True)
    flags = ["--kind", kind, "--run-dir", str(folder / "run"), "--num-steps", "6", *argv]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    recipe = ROOT / "tests" / "support" / "carry.py"
    return run_recipe_cli(flags, folder, recipe=recipe, world_size=world_size, env=env)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_rank_goes_on_with_its_own(strategy: str, tmp_path: Path) -> None:
    config = replace(BASE, strategy=strategy)
    straight = on_ranks(2, tmp_path, {"straight": config})["straight"]
    on_ranks(2, tmp_path, {"run": replace(config, num_steps=MIDDLE + 2)})
    resumed = on_ranks(2, tmp_path, {"run": config})["run"]
    assert resumed.digest == straight.digest
    assert {s: v for s, v in curve(resumed).items() if s > MIDDLE + 2} == {
        s: v for s, v in curve(straight).items() if s > MIDDLE + 2
    }
    saved = [load_file(file) for file in sorted((tmp_path / "run" / "checkpoints" / "step-000000010").glob("*.s*"))]
    tensors = {name: tensor for file in saved for name, tensor in file.items()}
    means = [tensors[f"buffer/0000{rank}/mean"] for rank in range(2)]
    assert means[0] != means[1]
    assert tensors["buffer/00001/history"].shape == (5,)
    assert "model/mean" not in tensors


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("kind", "words"), [
    ("shared", ["buffer mean differs between ranks", "other values than on rank 0", "register_rank_buffer"]),
    ("lengths", ["buffer table differs between ranks", "float32 [3] on rank 0", "float32 [4] on rank 1"]),
    ("extra", ["extra state (get_extra_state) of the model differs between ranks"]),
])  # fmt: skip
def test_what_differs_and_is_not_declared_is_named(kind: str, words: list[str], strategy: str, tmp_path: Path) -> None:
    ranks = run_cli(tmp_path, kind, "--strategy", strategy)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert all(word in ranks[0].stderr for word in words), ranks[0].stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["cache", "alike"])
def test_what_is_the_same_or_not_saved_is_no_fault(kind: str, tmp_path: Path) -> None:
    ranks = run_cli(tmp_path, kind, "--batch-norm", "--checkpoint.enabled", "--eval-every", "3")
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr


@pytest.mark.distributed
def test_another_number_of_ranks_begins_again_with_a_word(tmp_path: Path) -> None:
    assert run_cli(tmp_path, "own", "--checkpoint.enabled", "--checkpoint.save-every", "3")[0].returncode == 0
    config, model = load_run(tmp_path / "run", recipe=RECIPE)
    assert isinstance(config, Config)
    assert model.mean != 0, "rank 0's"
    again = ["--checkpoint.enabled", "--num-steps", "8", "--observe.console"]
    (alone,) = run_cli(tmp_path, "own", *again, world_size=1)
    assert alone.returncode == 0, alone.stderr
    assert "begin again, because each rank has its own: buffers mean, scratch" in alone.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_differs_later_is_rank_0s_from_the_save_on_with_a_word(strategy: str, tmp_path: Path) -> None:
    flags = ["--strategy", strategy, "--checkpoint.enabled", "--checkpoint.save-every", "3"]
    flags += ["--schedule.name", "constant", "--schedule.warmup-steps", "0"]
    assert [rank.returncode for rank in run_cli(tmp_path / "whole", "late", *flags)] == [0, 0]
    folder = tmp_path / "again"
    assert run_cli(folder, "late", *flags, "--num-steps", "3")[0].returncode == 0
    assert run_cli(folder, "late", *flags)[0].returncode == 0
    events = [(path / "run" / "metrics.jsonl").read_text() for path in (tmp_path / "whole", folder)]
    assert events[0].count("buffers mean differed between ranks: all have rank 0's now") == 1
    digests = [
        json.loads((p / "run" / "summary.json").read_text())["state_digest"] for p in (tmp_path / "whole", folder)
    ]
    assert digests[0] == digests[1]


def test_a_declaration_goes_with_the_module() -> None:
    module = nn.Sequential(Carry(Config(num_steps=1)), nn.BatchNorm1d(4))
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert rank_buffers(same).keys() == {"0.mean", "0.scratch"}
        assert shared_buffers(same).keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    mean = module[0].mean
    set_rank_buffers_(module, {"0.mean": torch.ones(()), "0.history": torch.arange(3)}, torch.device("cpu"))
    assert module[0].mean is mean
    assert mean == 1, "in place, where the form is the same"
    assert module[0].history.tolist() == [0, 1, 2]
    set_rank_buffers_(module, {"0.history": None}, torch.device("cpu"))
    assert module[0].history is None
    with pytest.raises(KeyError, match="already exists"):
        register_rank_buffer(module[0], "net", torch.zeros(1))
