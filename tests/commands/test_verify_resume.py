"""`distkit verify-resume`: passes where resume is exact, and names what differs where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distkit.commands import run
from distkit.commands.verify_resume import compare_checkpoints, compare_metrics

TINY = Path(__file__).parents[1] / "support" / "tiny.py"
#: Without the generators a recipe's own numbers are not restored: dropout after the resume differs.
FORGETFUL = """
import sys
sys.path.insert(0, {folder!r})
from support import tiny
from dataclasses import replace
from distkit import Recipe, main
import torch

drawn = torch.Generator().manual_seed(1)  # a generator of the recipe's own, which no checkpoint knows


def compute_loss(config, model, batch):
    output = tiny.compute_loss(config, model, batch)
    return replace(output, loss=output.loss * (1 + torch.rand((), generator=drawn)))


recipe = Recipe("tiny", tiny.TinyConfig, tiny.build_model, tiny.build_dataset, compute_loss,
                presets={{"default": tiny.BASE}}, best=("correct", "max"))
main(recipe)
"""
FLAGS = ["--", "--checkpoint.enabled", "--dropout", "0.3", "--noise", "0.1", "--ema-decay", "0.9", "--eval-every", "7"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("nproc", ["1", "2"])
def test_an_exact_resume_passes(nproc: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "trial"
    assert run(["verify-resume", str(TINY), "--nproc", nproc, "--folder", str(folder), *FLAGS]) == 0
    assert "bit for bit" in capsys.readouterr().out
    status = json.loads((folder / "resumed" / "status.json").read_text())
    assert status["attempt"] == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_what_is_forgotten_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "forgetful.py"
    recipe.write_text(FORGETFUL.format(folder=str(TINY.parents[1])))
    argv = ["verify-resume", str(recipe), "--steps", "20", "--kill-at", "12", "--folder", str(tmp_path / "trial")]
    assert run([*argv, "--", "--checkpoint.enabled"]) == 1
    told = capsys.readouterr().err
    # the checkpoint of step 8 is the last one before the kill
    assert "step 10: the first metric line that differs" in told
    assert "step 16: the first checkpoint that differs" in told
    assert "model/0.bias" in told


@pytest.mark.distributed
def test_a_kill_before_the_first_checkpoint_proves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["verify-resume", str(TINY), "--steps", "6", "--kill-at", "2", "--folder", str(tmp_path / "trial")]
    assert run([*argv, "--", "--checkpoint.enabled", "--checkpoint.save-every", "5"]) == 1
    assert "nothing was saved before step 2" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "words"), [
    (["nowhere.py"], "there is no recipe nowhere.py"),
    ([str(TINY), "--kill-at", "40"], "--kill-at"),
    ([str(TINY), "--kill-at", "1"], "2 to 39"),
    ([str(TINY), "--steps", "2"], "--steps"),
    ([str(TINY), "--", "--num-stepz", "3"], "--num-stepz"),
    ([str(TINY), "--nproc", "0"], "--nproc"),
    ([str(TINY), "--stepz", "3"], "verify-resume"),
])  # fmt: skip
def test_bad_arguments(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify-resume", *argv]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") < 10


def test_comparing_metrics_ignores_times_and_names_the_first_step(tmp_path: Path) -> None:
    for name, loss in (("a", 0.5), ("b", 0.25)):
        (tmp_path / name).mkdir()
        lines = [{"event": "train", "step": 1, "loss": 1.0, "samples_per_second": loss},
                 {"event": "checkpoint", "step": 1, "bytes": loss},
                 {"event": "eval", "step": 2, "loss": loss}]  # fmt: skip
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare_metrics(tmp_path / "a", tmp_path / "a") == []
    found = compare_metrics(tmp_path / "a", tmp_path / "b")
    assert found == ["step 2: the first metric line that differs (eval): loss 0.5 and 0.25"]


def test_comparing_checkpoints_names_the_first_step_and_tensor(tmp_path: Path) -> None:
    from support.writing import write_checkpoint

    for name in ("a", "b"):
        for step in (1, 2):
            values = {"model/w": torch.zeros(3), "model/x": torch.full((2,), float(step == 2 and name == "b"))}
            write_checkpoint(tmp_path / name / "checkpoints", step, values)
    assert compare_checkpoints(tmp_path / "a", tmp_path / "a") == []
    found = compare_checkpoints(tmp_path / "a", tmp_path / "b")
    assert "step 2" in found[0]
    assert "model/x" in found[1]
    assert len(found) == 2
    # and numbers that are no tensors
    for name, best in (("c", 0.5), ("d", 0.25)):
        state = {"version": 1, "step": 1, "parts": {"plateau": {"best": best}, "clock": {"seconds": best}}}
        write_checkpoint(tmp_path / name / "checkpoints", 1, {"model/w": torch.zeros(3)}, state=state)
    found = compare_checkpoints(tmp_path / "c", tmp_path / "d")
    assert found == ["step 1: the first checkpoint that differs", "state.json: parts.plateau.best: 0.5 and 0.25"]
