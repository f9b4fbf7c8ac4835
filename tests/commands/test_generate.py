"""`distkit generate`: text from runs that ended, that did not, and of other recipes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import ROOT, run_recipe_cli

from distkit.checkpoint.format import step_name
from distkit.commands import run

LINE = "To be, or not to be: that is the question.\n"
RECIPE = ROOT / "recipes" / "gpt.py"
SMALL = ["--context-length", "16", "--num-layers", "1", "--dim", "32", "--global-batch-size", "8", "--eval-batch-size",
         "32", "--num-threads", "1", "--timeout-seconds", "60", "--num-steps", "120", "--optim.lr", "0.01",
         "--checkpoint.save-every", "60", "--run-dir", "run"]  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def train(folder: Path, *argv: str, world_size: int = 1) -> Path:
    (folder / "text.txt").write_text(LINE * 100)
    # a full path, so that generating works from any directory
    flags = ["--text", str(folder / "text.txt"), "--data.root", str(folder / "data"), *SMALL, *argv]
    ended = run_recipe_cli(flags, folder, recipe=RECIPE, world_size=world_size)
    assert [one.returncode for one in ended] == [0] * world_size, ended[0].stderr
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("gpt"), "--ema-decay", "0.99")


def generated(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert run(["generate", *map(str, argv)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.removesuffix("\n")


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert run(["generate", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("distkit: error: ")
    return err


def test_a_run_that_learned_a_line_says_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generated(capsys, trained, "--prompt", "To be", "--max-tokens", 60, "--temperature", 0)
    assert text.startswith("To be")
    assert len(text) == 65
    assert "that is the question.\nTo be" in text


def test_draws_follow_the_seed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hot = (trained, "--prompt", "q", "--max-tokens", 40, "--temperature", 3)
    first, again, other = (generated(capsys, *hot, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other
    likeliest = generated(capsys, trained, "--prompt", "q", "--max-tokens", 40, "--temperature", 0)
    assert generated(capsys, *hot, "--top-k", 1) == likeliest
    assert generated(capsys, trained, "--max-tokens", 0) == "\n"


def test_the_average_and_checkpoints(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hot = ("--prompt", "be", "--max-tokens", 300, "--temperature", 2, "--seed", 4)
    last, ema = generated(capsys, trained, *hot), generated(capsys, trained, *hot, "--weights", "ema")
    newest, older = (trained / "checkpoints" / step_name(step) for step in (120, 60))
    assert generated(capsys, newest, *hot) == last
    assert generated(capsys, newest, *hot, "--weights", "ema") == ema
    assert len({last, ema, generated(capsys, older, *hot)}) == 3


def test_a_run_that_did_not_end_speaks_from_its_newest_sound_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = tmp_path / "run"
    shutil.copytree(trained, killed)
    hot = ("--prompt", "be", "--max-tokens", 60, "--temperature", 2)
    last, older = generated(capsys, trained, *hot), generated(capsys, trained / "checkpoints" / step_name(60), *hot)
    # weights of an earlier end are older than the checkpoint of step 120
    shutil.copy(killed / "weights.safetensors", tmp_path / "kept")
    for name in ("weights.safetensors", "ema.safetensors"):
        (killed / name).unlink()
    assert generated(capsys, killed, *hot) == last
    shard = next((killed / "checkpoints" / step_name(120)).glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(["generate", str(killed), *map(str, hot)]) == 0
    out, err = capsys.readouterr()
    assert out == older + "\n"
    assert "step 120 failed verification and is skipped" in err
    shutil.rmtree(killed / "checkpoints" / step_name(60))
    assert run(["generate", str(killed)]) == 1
    assert "none of the" in capsys.readouterr().err
    shutil.rmtree(killed / "checkpoints")
    assert "holds no weights" in refused(capsys, killed)


@pytest.mark.distributed
def test_a_run_in_shards_speaks_as_one_rank_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sharded = train(tmp_path, "--strategy", "fsdp", world_size=2)
    checkpoint = sharded / "checkpoints" / step_name(120)
    texts = {generated(capsys, path, "--max-tokens", 50, "--temperature", 0) for path in (sharded, checkpoint)}
    assert len(texts) == 1
    assert "that is the question." in texts.pop()


def test_bad_input_says_what_to_type(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "runs/gpt/RUN" in refused(capsys, tmp_path)
    assert "--top-k 40" in refused(capsys, trained, "--top-k", 0)
    assert "--temperature 0.8" in refused(capsys, trained, "--temperature", "nan")
    assert "--max-tokens 500" in refused(capsys, trained, "--max-tokens", -1)
    assert "é" in refused(capsys, trained, "--prompt", "é")
    assert "invalid choice: 'best'" in refused(capsys, trained, "--weights", "best")
    assert "--text FILE" in refused(capsys, trained, "--", "--text", str(tmp_path / "none.txt"))
    assert "same configuration" in refused(capsys, trained, "--", "--dim", "64")
    assert "does not define the recipe gpt" in refused(capsys, trained, "--recipe", ROOT / "recipes" / "cifar10.py")
    assert "there is no recipe" in refused(capsys, trained, "--recipe", tmp_path / "gpt.py")


def test_a_text_that_was_replaced_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text((LINE * 100).upper())
    assert "was trained on different data" in refused(capsys, trained, "--", "--text", str(text))


def test_a_run_without_an_average_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = train(tmp_path, "--num-steps", "3", "--schedule.name", "constant", "--schedule.warmup-ratio", "None")
    assert "no averaged weights" in refused(capsys, plain, "--weights", "ema")


def test_a_run_of_another_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.source", "synthetic", "--num-steps", "1", "--global-batch-size", "10", "--eval-batch-size", "500"]
    (ended,) = run_recipe_cli([*flags, "--run-dir", "run"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "the recipe cifar10 cannot generate text" in refused(capsys, tmp_path / "run")


def test_the_command_line_itself(trained: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "distkit", "generate"]
    done = subprocess.run([*argv, str(trained), "--max-tokens", "5"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 7
    assert json.loads((trained / "status.json").read_text())["state"] == "completed"
    text = subprocess.run([*argv, "--help"], check=True, capture_output=True, text=True).stdout
    assert "--temperature" in text
