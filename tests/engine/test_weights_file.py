"""`--resume FILE --resume.weights-only` on the real command line, under every strategy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.harness import ROOT, Ended, run_recipe_cli

TINY = ROOT / "tests" / "support" / "tiny.py"
#: The weights do not move, so that those at the end are those of the file.
STILL = ["--num-steps", "2", "--report-every", "1", "--optim.lr", "1e-30", "--run-dir", "run", "--observe.console",
         "--schedule.warmup-steps", "0"]  # fmt: skip


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.rand_like(value) for name, value in tiny.build_model(tiny.BASE).state_dict().items()}


def train(folder: Path, *flags: str, ranks: int = 1) -> list[Ended]:
    return run_recipe_cli([*STILL, *flags], folder, recipe=TINY, world_size=ranks, timeout=120)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_weights_arrive_under_every_strategy(strategy: str, tmp_path: Path) -> None:
    ranks, saved = 1 if strategy == "single" else 2, weights()
    if strategy in ("single", "fsdp", "zero1"):
        file = "w.safetensors"
        save_file(saved, tmp_path / file)
    else:
        file = "w.pth"
        torch.save({"state_dict": {f"module.{name}": value for name, value in saved.items()}}, tmp_path / file)
    flags = ["--resume", file, "--resume.weights-only", "--strategy", strategy, "--ema-decay", "0.5"]
    ended = train(tmp_path, *flags, ranks=ranks)
    assert [each.returncode for each in ended] == [0] * ranks, ended[0].stderr
    assert f"started from the weights of {file}" in ended[0].stdout
    assert ("'module.' was taken off" in ended[0].stdout) == file.endswith("pth")
    for name in ("weights.safetensors", "ema.safetensors"):
        final = load_file(tmp_path / "run" / name)
        assert final.keys() == saved.keys()
        assert all(torch.equal(final[key], saved[key]) for key in saved)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_does_not_fit_is_refused_before_anything_is_written(ranks: int, tmp_path: Path) -> None:
    torch.save(dict(list(weights().items())[:3]), tmp_path / "w.pth")
    ended = train(tmp_path, "--resume", "w.pth", "--resume.weights-only", ranks=ranks)
    assert [each.returncode for each in ended] == [2] * ranks
    assert "--resume w.pth does not fit the model of build_model\n  missing in the file: 4.bias" in ended[0].stderr
    assert len(ended[0].stderr.splitlines()) < 10
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_a_file_without_weights_only_says_what_to_type(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "w.safetensors")
    (ended,) = train(tmp_path, "--resume", "w.safetensors")
    assert ended.returncode == 2
    assert "type:     --resume w.safetensors --resume.weights-only" in ended.stderr
    (ended,) = train(tmp_path, "--resume", "none.safetensors", "--resume.weights-only")
    assert ended.returncode == 2
    assert "nothing there" in ended.stderr


def test_the_run_goes_on_from_its_own_checkpoint_afterwards(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "w.safetensors")
    flags = ["--resume", "w.safetensors", "--resume.weights-only", "--checkpoint.enabled", "--optim.lr", "0.1"]
    assert train(tmp_path, *flags)[0].returncode == 0
    (ended,) = train(tmp_path, *flags, "--num-steps", "4")
    assert ended.returncode == 0, ended.stderr
    assert "resumed at step 2" in ended.stdout
    assert "--resume w.safetensors is not used" in ended.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 4
    final = tmp_path / "run" / "weights.safetensors"  # what a run writes is taken by another one
    (ended,) = train(tmp_path, "--resume", str(final), "--resume.weights-only", "--run-dir", "other")
    assert ended.returncode == 0, ended.stderr
    assert torch.equal(load_file(tmp_path / "other" / "weights.safetensors")["0.weight"], load_file(final)["0.weight"])
