"""Every command of the README runs, and every figure in it stands in a committed result file."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from support.harness import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
#: Makes any training command a matter of seconds.
SHORT = ["--num-steps", "3", "--global-batch-size", "10", "--eval-batch-size", "500", "--run-dir", "run"]
BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def call(command: Sequence[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def image_folder(root: Path) -> Path:
    for split in ("train", "test"):
        for label in range(10):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (32, 32), (25 * label, 100 * number, 9)).save(folder / f"{number}.png")
    return root


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 7
    assert "make train" in COMMANDS


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if "recipes/cifar10" in c and not c.startswith("distkit")])
def test_training_commands_run(command: str, tmp_path: Path) -> None:
    words = command.replace("recipes/", f"{ROOT}/recipes/").replace(".venv/bin/", "").split()
    if "ROOT" in words or "packed" in words:
        images = image_folder(tmp_path / "images")
        words = [str(images) if word == "ROOT" else word for word in words]
    if "packed" in words:
        call([sys.executable, "-m", "distkit.commands", "data", "pack", str(images), "packed"], tmp_path)
    if "--help" not in words:
        if "--debug" in words:
            words += ["--global-batch-size", "10", "--data.source", "synthetic"]
        else:
            words += SHORT
        if "--data.source" not in words:
            words += ["--data.source", "synthetic"]
    out = call(words, tmp_path)
    if "--help" in words:
        assert "--optim.lr" in out
    elif "--debug" in words:
        assert "nothing wrong" in out
    else:
        assert "top1" in out
        ranks = 2 if "torchrun" in words else 1
        assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == ranks


@pytest.mark.slow
def test_the_commands_of_larger_models_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ROMEO: a rose by any other name would smell as sweet.\n" * 200)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    commands = [c for c in COMMANDS if "gpt" in c]
    assert len(commands) == 4
    short = ["--num-steps", "2", "--context-length", "16", "--num-layers", "2", "--dim", "16", "--precision", "fp32"]
    strategies = []
    for number, command in enumerate(commands):
        words = [str(text) if word == "FILE" else word for word in shlex.split(command)]
        if words[0] == "distkit":
            out = call([sys.executable, "-m", "distkit.commands", *words[1:], "--max-tokens", "20"], tmp_path)
            assert out.startswith("ROMEO:")
            continue
        run = tmp_path / ("runs/gpt" if "runs/gpt" in words else f"run{number}")
        call([*words, *short, "--run-dir", str(run)], tmp_path)
        strategies.append(json.loads((run / "config.json").read_text())["strategy"])
    assert strategies == ["auto", "fsdp", "zero3"]


@pytest.mark.slow
def test_packing_commands_run(tmp_path: Path) -> None:
    image_folder(tmp_path / "ROOT")
    commands = [c.split() for c in COMMANDS if c.startswith("distkit data ")]
    assert [words[2] for words in commands] == ["pack", "verify"]
    for words in commands:
        call([sys.executable, "-m", "distkit.commands", *words[1:]], tmp_path)


@pytest.mark.slow
def test_checkpoint_commands_run(tmp_path: Path) -> None:
    train, *commands = [c for c in COMMANDS if "runs/mine" in c or "verify-resume" in c]
    words = train.replace("recipes/", f"{ROOT}/recipes/").split()
    short = ["--num-steps", "3", "--global-batch-size", "10", "--eval-batch-size", "500", "--data.source", "synthetic"]
    for steps in ("3", "5"):  # the second time it goes on
        call([*words, *short, "--num-steps", steps], tmp_path)
    assert json.loads((tmp_path / "runs" / "mine" / "status.json").read_text())["attempt"] == 2
    assert [command.split()[1:3] for command in commands] == [
        ["checkpoint", "list"], ["checkpoint", "verify"], ["checkpoint", "export"],
        ["verify-resume", "recipes/cifar10.py"],
    ]  # fmt: skip
    for command in commands:
        words = command.replace("recipes/", f"{ROOT}/recipes/").split()
        out = call([sys.executable, "-m", "distkit.commands", *words[1:]], tmp_path)
        assert "bit for bit" in out or "verify-resume" not in command
    assert (tmp_path / "mine.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / ".installed").exists(), reason="only in the environment that make makes")
def test_make_train_runs(tmp_path: Path) -> None:
    flags = " ".join(["--num-steps 3 --global-batch-size 10 --eval-batch-size 500", f"--run-dir {tmp_path}/run"])
    assert "synthetic" in call(["make", "train", f"ARGS={flags}"], ROOT)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")] + ["make test", "make check"])
def test_make_targets_exist(command: str) -> None:
    call([*command.split(), "--dry-run"], ROOT)


def results(name: str) -> dict[str, dict[str, float]]:
    """A result file; a target that it missed is named in the README as it stands there."""
    record = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert record["targets"]
    assert [target for target, reached in record["targets"].items() if not reached and target not in README] == []
    assert {"date", "machine", "versions"} <= record.keys()
    return record["results"]  # type: ignore[no-any-return]


def test_figures_stand_in_the_result_files() -> None:
    quick = results("cifar10_quick")
    accuracy, seconds = quick["test_accuracy"], quick["train_seconds"]
    assert f"{100 * accuracy:.1f} % test accuracy in {seconds:.0f} s of training" in README  # type: ignore[operator]
    data = results("data")
    device, pil, v2, workers = (
        data[name]["median"]
        for name in (
            "distkit device",
            "distkit device / PIL",
            "distkit device / v2 on tensors",
            "distkit workers / DataLoader",
        )
    )
    assert f"{device:,.0f} images/s: {pil:.0f} x torchvision's PIL pipeline, {v2:.0f} x v2 transforms" in README
    assert f"{workers:.2f} x a plain DataLoader" in README
    assert f"| {data['permutation ms']:.2f} ms |" in README
    saving = results("checkpoint")
    for ranks in (1, 2):
        names = (
            "save",
            "disk",
            "torch_save",
            "raw_write",
            "dcp_save",
            "held",
            "dcp_async_save_held",
            "restore",
            "raw_read",
        )
        cells = [f"{saving[f'{name}_ms_{ranks}']['median']:.0f} ms" for name in names]
        row = f"| {ranks} | {' | '.join(cells)} |"
        assert row in README
    gpt = results("gpt_tiny")
    length = f"{gpt['train_seconds']:.0f} s of training, {gpt['parameters'] / 1e6:.2f} M parameters"  # type: ignore[operator, str-format]
    assert f"{gpt['validation_loss']:.2f} nats in {length}, {gpt['tokens'] / 1e6:.2f} M tokens" in README  # type: ignore[operator, str-format]
    memory = results("memory")
    assert len(re.findall(r"\d MB\)? \|$", README, re.MULTILINE)) == 6
    for strategy, cell in re.findall(
        r"^\| `(single|ddp|zero1|zero2|fsdp|zero3)`.* \| ([^|]*) \|$", README, re.MULTILINE
    ):
        held, most = (
            memory[f"{strategy}, {when}: together"] / 1e6 for when in ("before the update", "between microbatches")
        )
        assert cell == (f"{held:.1f} MB" if held == most else f"{held:.1f} MB ({most:.1f} MB)")
    step = results("step_overhead")
    figures = [step[arm]["median"] for arm in ("engine - by hand", "by hand", "fabric", "accelerate")]
    added, hand, fabric, accelerate = (f"{figure:.1f}" for figure in figures)
    assert f"{added} µs a step (by hand {hand}, Lightning Fabric {fabric}, Accelerate {accelerate})" in README
