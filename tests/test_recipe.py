"""The recipe from its command line: good runs, wrong lines, debug mode. Every process is a real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import RECIPE, ROOT, SMALL_SYNTHETIC, Ended, run_recipe_cli

#: A run of seconds: synthetic images, few steps, and fp32, since many CPUs only emulate bf16.
SHORT = [
    "--data.source", "synthetic", "--num-steps", "6", "--global-batch-size", "16", "--eval-batch-size", "40",
    "--report-every", "3", "--num-threads", "1", "--timeout-seconds", "60", "--device", "cpu", "--precision", "fp32",
]  # fmt: skip


def only(ended: list[Ended]) -> Ended:
    assert len(ended) == 1
    return ended[0]


def summary_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def test_a_run_prints_its_accuracy_and_says_that_the_data_are_synthetic(tmp_path: Path) -> None:
    run = only(run_recipe_cli(SHORT, tmp_path))
    assert run.returncode == 0, run.stderr
    assert "top1" in run.stdout
    assert "synthetic" in run.stdout
    assert "\x1b" not in run.stdout
    (folder,) = (tmp_path / "runs" / "cifar10").iterdir()
    summary = summary_of(folder)
    assert "synthetic" in str(summary["train_data"])
    assert 0 <= summary["last"]["top1"] <= 1  # type: ignore[index]
    assert json.loads((folder / "status.json").read_text())["state"] == "completed"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert environment["packages"]["torch"]


def test_the_same_command_twice_gives_the_same_digest_and_config_file_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert only(run_recipe_cli([*SHORT, "--run-dir", name], tmp_path)).returncode == 0
    flags = ["--config", "a/config.json", "--run-dir", "c"]
    assert only(run_recipe_cli(flags, tmp_path)).returncode == 0
    digests = {summary_of(tmp_path / name)["state_digest"] for name in "abc"}
    assert len(digests) == 1
    first, again = ((tmp_path / name / "config.json").read_text() for name in "ac")
    assert first == again.replace('"run_dir": "c"', '"run_dir": "a"')


@pytest.mark.distributed
def test_two_ranks_one_log_one_summary(tmp_path: Path) -> None:
    first, second = run_recipe_cli([*SHORT, "--run-dir", "run"], tmp_path, world_size=2)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "2 ranks (ddp" in first.stdout
    assert second.stdout == second.stderr == ""
    assert "8 x 2 ranks" in str(summary_of(tmp_path / "run")["global_batch"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "resnet20"],
        ["--preset", "classic", "--schedule.warmup-epochs", "0"],
        ["--preset", "fast", "--no-compile"],
    ],
    ids=["resnet20", "classic with resnet18", "fast with fastnet"],
)
def test_other_models_and_presets_train(tmp_path: Path, flags: list[str]) -> None:
    run = only(run_recipe_cli([*SHORT, *flags, "--num-steps", "2", "--global-batch-size", "4"], tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr


def test_help_is_readable(tmp_path: Path) -> None:
    run = only(run_recipe_cli(["--help"], tmp_path))
    assert run.returncode == 0
    for part in ("CIFAR-10 with a residual network", "--preset {quick,classic,fast}", "data options", "--optim.lr"):
        assert part in run.stdout


WRONG = {
    "typo in a flag": (["--optim.lrr", "1"], "--optim.lr"),
    "typo in a section": (["--optin.lr", "1"], "--optim.lr"),
    "wrong type": (["--optim.lr", "fast"], "--optim.lr"),
    "negative number": (["--optim.lr", "-0.1"], "--optim.lr"),
    "zero steps": (["--num-steps", "0"], "--num-steps"),
    "batch not divisible": (["--global-batch-size", "100", "--microbatch-size", "32"], "--global-batch-size 96"),
    "unknown preset": (["--preset", "quikc"], "--preset quick"),
    "unknown precision": (["--precision", "bf61"], "bf16"),
    "missing folder": (["--data.source", "folder", "--data.root", "nowhere"], "nowhere"),
    "folder without classes": (["--data.source", "folder", "--data.root", "."], "train"),
    "missing config file": (["--config", "nowhere.json"], "nowhere.json"),
    "value without a flag": (["stray"], "stray"),
    "unknown data source": (["--data.source", "imagenet"], "synthetic"),
    "optimizer option it lacks": (["--optim.name", "adam", "--optim.momentum", "0.9"], "--optim.momentum"),
    "schedule without its numbers": (["--schedule.name", "multi_step"], "--schedule.milestone-epochs"),
    "batch larger than the set": (
        ["--global-batch-size", "20000"],
        f"--global-batch-size {SMALL_SYNTHETIC['num_train']}",
    ),
    "warmup longer than the run": (
        ["--schedule.name", "cosine", "--schedule.warmup-steps", "50"],
        "--schedule.warmup-steps",
    ),
    "both lengths": (["--num-epochs", "1"], "both are set"),
    "tf32 without a GPU": (["--precision", "tf32"], "--precision fp32"),
    "cuda without a GPU": (["--device", "cuda"], "--device cpu"),
    "run directory of another run": (["--run-dir", "taken", "--resume", "never"], "--run-dir taken-2"),
    "resume from nothing": (["--resume", "nowhere"], "--resume runs/"),
    "weights of nothing": (["--resume.weights-only"], "--resume"),
    "no checkpoint kept": (["--checkpoint.keep-last", "0"], "--checkpoint.keep-last"),
    "milestones where all stay": (
        ["--checkpoint.keep-last", "None", "--checkpoint.keep-every", "5"],
        "--checkpoint.keep-every None",
    ),
    "saving where nothing is saved": (
        ["--checkpoint.no-enabled", "--checkpoint.save-every", "5"],
        "--checkpoint.enabled",
    ),
    "saving now and then": (["--checkpoint.async", "maybe"], "--checkpoint.async"),
    "run directory is a file": (["--run-dir", "file"], "--run-dir"),
    "debug with a run directory": (["--debug", "--run-dir", "d"], "--run-dir"),
    "label smoothing out of range": (["--label-smoothing", "2"], "--label-smoothing"),
    "nearest optimizer": (["--optim.name", "adamww"], "--optim.name adamw"),
    "a switch with a value": (["--flip", "False"], "--no-flip"),
    "plateau without evaluations": (["--schedule.name", "plateau"], "--eval-every"),
    "an option that would be ignored": (["--data.on-corrupt", "skip"], "--data.on-corrupt error"),
    "norm that fastnet has not": (["--model", "fastnet", "--norm", "group"], "--norm batch"),
    "run directory without a name": (["--run-dir", ""], "--run-dir"),
    "two ways to clip": (["--max-grad-norm", "1", "--max-grad-value", "1"], "--max-grad-value"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_ends_with_2_and_one_message(tmp_path: Path, name: str) -> None:
    argv, says = WRONG[name]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    run = only(run_recipe_cli([*SHORT, *argv], tmp_path))
    check_refused(run, says)
    assert sorted(tmp_path.rglob("*")) == before


def check_refused(run: Ended, says: str) -> None:
    assert run.returncode == 2, run.stdout + run.stderr
    assert says in run.stderr
    assert "Traceback" not in run.stderr
    assert 0 < len(run.stderr.strip().splitlines()) < 10
    assert run.stdout == ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--global-batch-size", "15"], "--global-batch-size 14"),
        (["--global-batch-size", "1"], "start at most 1 ranks"),
        (["--debug"], "python RECIPE --debug"),
        (["--data.source", "folder", "--data.root", "nowhere"], "nowhere"),
    ],
)
def test_two_ranks_say_it_once(tmp_path: Path, argv: list[str], says: str) -> None:
    first, second = run_recipe_cli([*SHORT, *argv], tmp_path, world_size=2)
    check_refused(first, says)
    assert second.returncode == 2
    assert second.stderr == second.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("env", "argv", "says"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["--precision", "fp32"], "ACCELERATE_MIXED_PRECISION=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, [], "torchrun --nproc-per-node N"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "--strategy fsdp on 1 rank"),
        ({"WORLD_SIZE": "2"}, [], "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "abc"}, [], "RANK"),
        ({"OMPI_COMM_WORLD_SIZE": "x"}, [], "OMPI_COMM_WORLD_SIZE"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, [], "SLURM_NODEID"),
    ],
)
def test_a_wrong_launch_ends_with_2(tmp_path: Path, env: dict[str, str], argv: list[str], says: str) -> None:
    check_refused(only(run_recipe_cli([*SHORT, *argv], tmp_path, env=env)), says)
    assert not list(tmp_path.iterdir())


def test_a_failed_download_names_the_other_sources(tmp_path: Path) -> None:
    blocked = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    argv = [*SHORT, "--data.source", "cifar10", "--data.root", "d"]
    run = only(run_recipe_cli(argv, tmp_path, env=blocked))
    assert run.returncode == 2, run.stdout + run.stderr
    assert "--data.source folder" in run.stderr
    assert "--data.source synthetic" in run.stderr
    assert not (tmp_path / "runs").exists()


def test_launcher_precision_is_taken_and_printed(tmp_path: Path) -> None:
    of_the_preset = SHORT[: SHORT.index("--precision")]
    run = only(run_recipe_cli(of_the_preset, tmp_path, env={"ACCELERATE_MIXED_PRECISION": "no"}))
    assert "bf16" in run.stdout
    run = only(run_recipe_cli([*of_the_preset, "--run-dir", "b"], tmp_path, env={"ACCELERATE_MIXED_PRECISION": "fp16"}))
    assert run.returncode == 0, run.stderr
    assert summary_of(tmp_path / "b")["precision"] == "fp16"
    assert json.loads((tmp_path / "b" / "config.json").read_text())["precision"] == "fp16"


def test_a_bug_in_the_recipe_shows_its_traceback_and_marks_the_run_failed(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    text = RECIPE.read_text().replace("logits = model(images)", "logits = model(images.mistake)")
    broken.write_text(text)
    run = only(run_recipe_cli([*SHORT, "--run-dir", "run"], tmp_path, recipe=broken))
    assert run.returncode == 1
    assert "AttributeError" in run.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "mistake" in status["reason"]


def test_recipe_is_importable_without_running(tmp_path: Path) -> None:
    run = only(run_recipe_cli([], tmp_path, recipe=ROOT / "distkit" / "recipe.py"))
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ('presets = {"default": tiny.TinyConfig(num_steps=10, precision="bf17")}', 2, "--precision"),
        ('presets = {"default": tiny.TinyConfig(num_steps=10, optim=AdamW(lr=-1.0))}', 2, "--optim.lr"),
        ("presets = {}", 2, "has no presets"),
        ('presets = {"default": tiny.TinyConfig(steps=10)}', 1, "TypeError"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_file_that_refuses_itself_ends_like_a_wrong_option(
    line: str, code: int, says: str, rank: str, tmp_path: Path
) -> None:
    file = tmp_path / "my_recipe.py"
    file.write_text(
        "from dataclasses import replace\nfrom distkit import main\nfrom distkit.config import AdamW\n"
        f"from support import tiny\n{line}\nmain(replace(tiny.RECIPE, presets=presets))\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "RANK": rank}
    done = subprocess.run(
        [sys.executable, str(file)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    if code == 2:
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) < 10
    if code == 1 or rank == "0":
        assert says in done.stderr
        assert "my_recipe.py" in done.stderr
    else:
        assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["my_recipe.py"]
