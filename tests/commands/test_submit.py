"""`distkit submit`, as far as it goes without a cluster: what is checked, and that nothing is left."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.harness import ROOT
from support.tiny import BASE, RECIPE

from distkit.cli import parse
from distkit.commands import run
from distkit.commands.submit import job_name, modules_beside, read_config, without_sources
from distkit.config import CheckpointConfig, to_json
from distkit.engine.lease import Lease
from distkit.engine.run_dir import RunDirectory, holds_run
from distkit.engine.submission import original_of
from distkit.entry import train

PACED = str(ROOT / "tests" / "support" / "paced.py")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("slurm").mkdir()
    for name in ("site.toml", "train.sbatch"):
        (tmp_path / "slurm" / name).symlink_to(ROOT / "slurm" / name)
    Path("bare").mkdir()
    Path("bare/site.toml").touch()
    Path("data").mkdir()
    return tmp_path


def test_the_script_is_printed_and_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    words = ["submit", PACED, "--nodes", "2", "--ranks", "2", "--time", "1-0", "--sbatch=--mem=4G", "--max-requeues=3",
             "--dry-run"]  # fmt: skip
    assert run([*words, "--", "--run_dir=runs/mine", "--preset", "default", "--pause-seconds", "0.1", "--seed=3"]) == 0
    script = capsys.readouterr().out
    folder = "runs/mine/submissions/1"
    assert script.startswith("#!/usr/bin/env bash\n")
    name = job_name("paced", Path("runs/mine"))
    for line in ("--nodes=2", "--time=1-0", "--mem=4G", f"--job-name={name}", "--output=runs/mine/job-%j.out",
                 "--requeue", "--open-mode=append"):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in script
    assert (
        f"""
set -- \\
    --site {folder}/site.toml \\
    --ranks 2 \\
    --max-requeues 3 \\
    {folder}/paced.py \\
    --config {folder}/config.json \\
    --run-dir runs/mine \\
    --pause-seconds 0.1 \\
    --seed=3
set -euo pipefail
"""
        in script
    )
    assert f"export PYTHON=${{PYTHON:-{sys.executable}}}\n" in script
    assert sorted(Path().rglob("*")) == before
    (Path("runs/mine/submissions/1")).mkdir(parents=True)
    assert run([*words, "--", "--run-dir", "runs/mine"]) == 0
    assert "runs/mine/submissions/2/config.json" in capsys.readouterr().out
    assert run(["submit", PACED, "--dry-run"]) == 0
    assert "--run-dir runs/paced/2" in capsys.readouterr().out


def test_a_staged_folder_stays_a_flag_of_the_job(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "bare" / "train.sbatch").symlink_to(ROOT / "slurm" / "train.sbatch")
    Path("bare/site.toml").write_text('scratch = "$TMPDIR"')
    words = ["submit", str(ROOT / "recipes" / "gpt.py"), "--site", "bare/site.toml", "--stage", "data", "--dry-run"]
    assert run([*words, "--", "--text", "data/text"]) == 0
    script = capsys.readouterr().out
    assert "\n    --stage data \\\n" in script
    assert "\n    --text data/text\n" in script


@pytest.mark.parametrize(
    ("words", "flags", "says"),
    [
        (["nowhere.py"], [], "no recipe"),
        ([PACED, "--nodes", "0"], [], "0 is not 1 or more"),
        ([PACED, "--gpus-per-node", "-1"], [], "-1 is not 0 or more"),
        ([PACED, "--time", "4h"], [], "--time 4:00:00"),
        ([PACED, "--nodes", "3"], [], "--global-batch-size 6"),
        ([PACED, "--nodes", "2", "--gpus-per-node", "8"], [], "at least 16 for 16 ranks"),
        ([PACED], ["--optim.lr", "much"], "--optim.lr"),
        ([PACED], ["--pauseseconds", "1"], "--pause-seconds"),
        ([PACED], ["--preset", "none"], "--preset default"),
        ([PACED], ["--debug"], "sbatch slurm/debug.sbatch"),
        ([PACED], ["--config", "nowhere.json"], "cannot be read"),
        ([PACED], ["--run-dir", "slurm/site.toml"], "is a file"),
        ([PACED], ["--run-dir", "held", "--resume", "never"], "already holds a run"),
        ([PACED, "--site", "nowhere.toml"], [], "no site profile"),
        ([PACED, "--site", "bare/site.toml"], [], "no batch script bare/train.sbatch"),
        ([PACED, "--chain", "2"], [], "leave --chain out"),
        ([PACED, "--stage", "nowhere"], [], "is no folder"),
        ([PACED, "--stage", "data"], [], "scratch"),
        ([PACED, "--site", "disk/site.toml", "--stage", "data"], ["--seed", "1"], "no flag of the recipe names it"),
        ([PACED, "--sbatch=--nodes=4"], [], "contradicts"),
        ([PACED, "--seed", "1"], [], "unrecognized arguments: --seed"),
        ([PACED], [], "no sbatch here"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    words: list[str], flags: list[str], says: str, project: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Path("held").mkdir()
    Path("held/config.json").touch()
    Path("disk").mkdir()
    Path("disk/site.toml").write_text('scratch = "/tmp"')
    (project / "disk" / "train.sbatch").symlink_to(ROOT / "slurm" / "train.sbatch")
    before = sorted(Path().rglob("*"))
    monkeypatch.setenv("PATH", str(project))
    assert run(["submit", *words, "--", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) < 8
    assert sorted(Path().rglob("*")) == before


def test_a_directory_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    lease = Lease.acquire(Path("mine"))
    assert run(["submit", PACED, "--", "--run-dir", "mine"]) == 2
    lease.release()
    assert "in use by another run" in capsys.readouterr().err
    assert not Path("mine/submissions").exists()


def test_what_sbatch_refuses_leaves_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = project / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho sbatch: error: invalid partition specified: gpu >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    before = sorted(Path().rglob("*"))
    assert run(["submit", PACED]) == 2
    assert "invalid partition specified: gpu" in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before
    Path("runs/mine").mkdir(parents=True)
    assert run(["submit", PACED, "--", "--run-dir", "runs/mine"]) == 2
    assert list(Path("runs/mine").iterdir()) == []


def test_a_directory_that_holds_only_a_submission_is_a_fresh_one(tmp_path: Path) -> None:
    copy = tmp_path / "run" / "submissions" / "1" / "mine.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("recipe")
    (copy.parent / "submission.json").write_text(json.dumps({"files": {"mine.py": "/home/me/mine.py"}}))
    assert not holds_run(tmp_path / "run")
    directory = RunDirectory(tmp_path / "run", writes=True)
    directory.claim()
    directory.create({}, {}, ("mine", copy), saves=True)
    directory.release()
    source = json.loads((tmp_path / "run" / "recipe" / "source.json").read_text())
    assert (source["file"], directory.attempt) == ("/home/me/mine.py", 1)
    assert (tmp_path / "run" / "recipe" / "mine.py").read_text() == "recipe"
    assert original_of(tmp_path / "run", tmp_path / "other.py") == tmp_path / "other.py"


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--preset", "default", "--num-epochs", "2", "--optim.name", "adamw", "--optim.lr", "0.1"],
        ["--checkpoint.no-enabled", "--precision=bf16", "--schedule.name", "constant", "--max-grad-norm", "None"],
        ["--run_dir", "elsewhere", "--resume", "never", "--observe.also", "tensorboard", "--eval-every", "3"],
    ],
)
def test_the_frozen_configuration_with_the_flags_is_the_one_that_was_checked(flags: list[str]) -> None:
    recipe, config = read_config(Path(PACED), flags, 2)
    Path("config.json").write_text(json.dumps(to_json(config)))
    argv = ["--config", "config.json", "--run-dir", str(config.run_dir), *without_sources(flags)]
    again = parse(recipe.config, {"default": recipe.presets["default"]}, argv, "x", "y", world_size=2)
    assert again == config


def test_modules_from_the_recipes_own_folder_are_copied_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine/parts").mkdir(parents=True)
    Path("mine/parts/__init__.py").touch()
    Path("mine/parts/net_of_test_submit.py").touch()
    Path("mine/unused.py").touch()
    Path("mine/recipe.py").write_text("from parts import net_of_test_submit\nimport json, torch\n")
    monkeypatch.syspath_prepend("mine")
    for name in ("parts", "parts.net_of_test_submit"):
        monkeypatch.setitem(sys.modules, name, __import__(name, fromlist=["x"]))
    found = modules_beside(Path("mine/recipe.py"))
    here = Path("mine").resolve()
    assert found == {name: here / name for name in ("recipe.py", "parts/__init__.py", "parts/net_of_test_submit.py")}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--global-batch-size", "16"], "type:     --global-batch-size 8, or -- --run-dir run-2"),
        (["--seed", "5"], "type:     --seed 0, or -- --run-dir run-2"),
        ([], "the run in run is finished"),
    ],
)
def test_what_could_not_go_on_is_not_submitted(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(RECIPE, replace(BASE, num_steps=4, checkpoint=CheckpointConfig(save_every=2), run_dir=Path("run")))
    common = ["--checkpoint.enabled", "--checkpoint.save-every", "2", "--run-dir", "run"]
    words = ["submit", str(ROOT / "tests" / "support" / "tiny.py"), "--dry-run", "--", *common]
    capsys.readouterr()
    assert run([*words, "--num-steps", "4", *flags]) == 2
    assert says in capsys.readouterr().err
    assert run([*words, "--num-steps", "6"]) == 0
