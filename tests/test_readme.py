"""Every command of the README runs, and every figure in it is in a committed result file."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.harness import ROOT, run_recipe_cli

from distkit.commands.drill.cases import ALL

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
#: Makes any training command a matter of seconds; many CPUs only emulate bf16.
SHORT = [
    "--num-steps", "3", "--global-batch-size", "10", "--eval-batch-size", "500",
    "--num-threads", "1", "--precision", "fp32",
]  # fmt: skip
BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def call(words: Sequence[str], cwd: Path) -> str:
    """What a command prints. `python` and `distkit` are forked from a process that has imported torch already."""
    words = [word.replace("recipes/", f"{ROOT}/recipes/") if word.startswith("recipes/") else word for word in words]
    if words[0] in ("python", "distkit"):
        script, *argv = words[1:] if words[0] == "python" else [str(ROOT / "distkit/__main__.py"), *words[1:]]
        (done,) = run_recipe_cli(argv, cwd, recipe=Path(script))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    run = subprocess.run(words, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def image_folder(root: Path) -> Path:
    for split in ("train", "test"):
        for label in range(10):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (32, 32), (25 * label, 100 * number, 9)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "images")


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 7
    assert "make train" in COMMANDS


#: Commands with cifar10 in them that others of these tests run.
OTHERS = ("runs/mine", "verify-resume", "drill")
TRAINING = [c for c in COMMANDS if "recipes/cifar10" in c and not any(word in c for word in OTHERS)]


@pytest.mark.parametrize("command", [c for c in TRAINING if "packed" not in c])
def test_training_commands_run(command: str, images: Path, tmp_path: Path) -> None:
    words = [str(images) if word == "ROOT" else word for word in command.replace(".venv/bin/", "").split()]
    if "--help" in words:
        assert "--optim.lr" in call(words, tmp_path)
        return
    if "--data.source" not in words:
        words += ["--data.source", "folder", "--data.root", str(images)]
    if "--debug" in words:
        assert "nothing wrong" in call([*words, *SHORT[2:]], tmp_path)
        return
    assert "top1" in call([*words, *SHORT, "--run-dir", "run"], tmp_path)
    ranks = 2 if "torchrun" in words else 1
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == ranks


def test_packing_commands_run_and_what_they_packed_trains(tmp_path: Path) -> None:
    image_folder(tmp_path / "ROOT")
    commands = [c.split() for c in COMMANDS if "packed" in c]
    assert [words[:3] for words in commands[:-1]] == [["distkit", "data", "pack"], ["distkit", "data", "verify"]]
    assert "distkit data stats ROOT" in COMMANDS
    assert "--data.mean 0." in call(["distkit", "data", "stats", "ROOT"], tmp_path)
    for words in commands[:-1]:
        call(words, tmp_path)
    assert "top1" in call([*commands[-1], *SHORT, "--run-dir", "run"], tmp_path)


def test_the_commands_of_larger_models_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ROMEO: a rose by any other name would smell as sweet.\n" * 200)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    commands = [c for c in COMMANDS if "gpt" in c and "submit" not in c]
    assert len(commands) == 4
    short = ["--num-steps", "2", "--context-length", "16", "--num-layers", "2", "--dim", "16", "--precision", "fp32"]
    strategies = []
    for number, command in enumerate(commands):
        words = [str(text) if word == "FILE" else word for word in shlex.split(command)]
        if words[0] == "distkit":
            out = call([*words, "--max-tokens", "20"], tmp_path)
            assert out.startswith("ROMEO:")
            continue
        run = tmp_path / ("runs/gpt" if "runs/gpt" in words else f"run{number}")
        call([*words, *short, "--run-dir", str(run)], tmp_path)
        strategies.append(json.loads((run / "config.json").read_text())["strategy"])
    assert strategies == ["auto", "fsdp", "zero3"]


def test_checkpoint_commands_run(tmp_path: Path) -> None:
    train, *commands = [c for c in COMMANDS if "runs/mine" in c or "verify-resume" in c]
    for steps in ("3", "5"):  # the second time it resumes
        call([*train.split(), *SHORT, "--data.source", "synthetic", "--num-steps", steps], tmp_path)
    assert json.loads((tmp_path / "runs" / "mine" / "status.json").read_text())["attempt"] == 2
    assert [command.split()[1:3] for command in commands] == [
        ["checkpoint", "list"], ["checkpoint", "verify"], ["checkpoint", "export"],
        ["verify-resume", "recipes/cifar10.py"],
    ]  # fmt: skip
    for command in commands:
        verifies = "verify-resume" in command
        out = call([*command.split(), *(SHORT[2:] if verifies else [])], tmp_path)
        assert "bit for bit" in out or not verifies
    assert (tmp_path / "mine.safetensors").exists()


def test_the_commands_for_a_cluster_run(tmp_path: Path) -> None:
    """tests/slurm submits to a real one."""
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "runs").mkdir()
    submit, jobs = (c for c in COMMANDS if c.startswith(("distkit submit", "distkit jobs")))
    script = call(submit.replace(" -- ", " --dry-run -- ").split(), tmp_path)
    assert "#SBATCH --gpus-per-node=8\n" in script
    assert "\n    --ranks 8 \\\n" in script
    assert call(jobs.split(), tmp_path) == "no run in runs\n"


@pytest.mark.distributed
def test_the_drill_runs(tmp_path: Path) -> None:
    (command,) = [c for c in COMMANDS if "drill" in c]
    words = command.split()
    assert words[3] == "--"
    out = call([*words[:3], "--cases", "kill:save", *words[3:], *SHORT[2:]], tmp_path)
    assert "1 of 1 cases ended with the bits and the metrics of the undisturbed run" in out
    assert not list(tmp_path.iterdir())
    assert f"all {len(ALL)}," in README


def test_doctor_commands_run(tmp_path: Path) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    commands = [c for c in COMMANDS if "doctor" in c]
    assert [command.split()[0] for command in commands] == ["distkit", "launch/local.sh"]
    one, two = (call(command.split(), tmp_path) for command in commands)
    assert "0 errors" in one
    assert "right sum over 2 ranks" in two


@pytest.mark.skipif(not (ROOT / ".venv" / ".installed").exists(), reason="only in the environment that make makes")
def test_make_train_runs(tmp_path: Path) -> None:
    flags = " ".join([*SHORT, "--run-dir", f"{tmp_path}/run"])
    assert "synthetic" in call(["make", "train", f"ARGS={flags}"], ROOT)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("make")] + ["make test", "make test-slow", "make check"]
)
def test_make_targets_exist(command: str) -> None:
    call([*command.split(), "--dry-run"], ROOT)


def test_the_metrics_in_the_readme_are_computed() -> None:
    _, source, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)
    assert names["compute_metrics"]({"confusion": torch.eye(10)}, 10)["f1"] == 1


def test_the_recipe_in_the_readme_trains_on_the_command_line_and_from_python(tmp_path: Path) -> None:
    recipe, _, search = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.py").write_text(recipe)
    (tmp_path / "search.py").write_text(search)
    call(
        ["python", str(tmp_path / "mine.py"), "--run-dir", "run", "--device", "cpu", "--data.num-workers", "1"],
        tmp_path,
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["last"]["correct"] > 0.6
    found = call(["python", str(tmp_path / "search.py")], tmp_path).splitlines()
    assert [line.split()[0] for line in found if line.startswith("width")] == ["width"] * 3
    assert any("hidden layer of 64" in line for line in found)


def results(name: str) -> dict[str, dict[str, float]]:
    """A result file; the README names a target that was missed, word for word."""
    record = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert record["targets"]
    assert [target for target, reached in record["targets"].items() if not reached and target not in README] == []
    assert {"date", "machine", "versions"} <= record.keys()
    return record["results"]  # type: ignore[no-any-return]


def test_figures_are_those_of_the_result_files() -> None:
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
    assert (
        f"{added} µs per step (handwritten loop {hand}, Lightning Fabric {fabric}, Accelerate {accelerate})" in README
    )
    gpu = results("gpu_gpt")
    engine, hand = gpu["engine tokens/s"]["median"], gpu["by hand tokens/s"]["median"]
    assert f"{engine:,.0f} tokens/s,\n{gpu['engine / by hand']:.3f} x the throughput" in README
    assert f"({hand:,.0f} tokens/s; {100 * gpu['engine mfu']:.1f} % of the peak)" in README  # type: ignore[operator]
