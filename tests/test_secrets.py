"""A secret of a real run is in nothing that the run writes or prints: its whole directory is searched for the bytes."""

import json
import os
from pathlib import Path

import pytest
from support.harness import LAUNCHER_VARIABLES, ROOT, Ended, run_recipe_cli
from support.launching import environment, run

from distkit.commands import run as command
from distkit.commands.trial import without_secrets
from distkit.commands.verify_resume import Trial
from distkit.config.secret import Secret, variable
from distkit.errors import ConfigError

RECIPE = ROOT / "tests" / "support" / "secretive.py"
TOKEN, OTHER = "hf_Zq81neverShown", "hf_other77Zq81"
VARIABLE = variable("hub_token")
SAVING = ["--run-dir", "run", "--checkpoint.enabled", "--eval-every", "5", "--observe.console", "--num-steps"]


def train(folder: Path, *flags: str, ranks: int = 2, **env: str) -> list[Ended]:
    return run_recipe_cli(flags, folder, recipe=RECIPE, world_size=ranks, env={VARIABLE: "", **env}, timeout=120)


def assert_hidden(folder: Path, ended: list[Ended]) -> None:
    shown = [*(each.stdout.encode() for each in ended), *(each.stderr.encode() for each in ended)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for where, content in [*zip("oe" * len(ended), shown, strict=False), *((str(f), f.read_bytes()) for f in files)]:
        for token in (TOKEN, OTHER):
            assert token.encode() not in content, where


def assert_code(ended: list[Ended], code: int) -> None:
    assert [each.returncode for each in ended] == [code] * len(ended), "\n".join(each.stderr for each in ended)


@pytest.fixture(autouse=True)
def no_secret_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.distributed
def test_two_ranks_a_resume_with_another_secret_and_the_file_again(tmp_path: Path) -> None:
    ended = train(tmp_path, *SAVING, "10", "--hub-token", TOKEN)
    assert_code(ended, 0)
    assert_hidden(tmp_path, ended)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["hub_token"] == "<secret>"
    ended = train(tmp_path, *SAVING, "20", "--hub-token", OTHER)
    assert_code(ended, 0)
    assert "resumed at step 10" in ended[0].stdout
    assert "hub_token" not in ended[0].stdout  # nothing has changed, as far as files know
    assert_hidden(tmp_path, ended)
    again = ["--config", "run/config.json", "--run-dir", "again", "--num-steps", "5", "--checkpoint.no-enabled"]
    refused = run_recipe_cli(again, tmp_path, recipe=RECIPE, world_size=2)
    assert_code(refused, 2)
    assert f"export {VARIABLE}=VALUE, or --hub-token VALUE" in refused[0].stderr
    assert not (tmp_path / "again").exists()
    assert_code(train(tmp_path, *again, **{VARIABLE: TOKEN}), 0)
    assert_hidden(tmp_path, [])


@pytest.mark.distributed
def test_an_error_that_quotes_it(tmp_path: Path) -> None:
    error_file = tmp_path / "error.json"
    env = {"SPOILED": "1", "TORCHELASTIC_ERROR_FILE": str(error_file)}
    ended = train(tmp_path, *SAVING, "10", "--hub-token", TOKEN, **env)
    assert_code(ended, 1)
    assert "401 Unauthorized: token <secret>" in ended[0].stderr + ended[1].stderr
    assert "Traceback" in ended[0].stderr + ended[1].stderr
    assert "token <secret>" in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]
    assert "token <secret>" in error_file.read_text()
    assert_hidden(tmp_path, ended)


@pytest.mark.slow
def test_a_real_process_with_every_observer(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    env = environment({"WANDB_MODE": "offline", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HOME": str(tmp_path)})
    words = [*SAVING, "10", "--hub-token", TOKEN, "--observe.wandb", "--observe.tensorboard"]
    ended = run(["python", str(RECIPE), *words], tmp_path, env)
    assert_code([ended], 0)
    assert list(tmp_path.rglob("*.wandb"))
    assert list(tmp_path.rglob("*tfevents*"))
    assert_hidden(tmp_path, [ended])
    assert "--num-steps" in next(tmp_path.rglob("*.wandb")).read_bytes().decode(errors="replace")


@pytest.mark.slow
@pytest.mark.distributed
def test_commands_that_start_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    words = ["drill", str(RECIPE), "--nproc", "1", "--cases", "kill:step", "--json", "drill.json", "--dir", "drill"]
    assert command([*words, "--", "--hub-token", TOKEN]) == 0
    assert json.loads(Path("drill.json").read_text())["flags"] == ["--hub-token", "<secret>"]
    flags = ["--checkpoint.enabled", "--hub_token", TOKEN]
    assert command(["verify-resume", str(RECIPE), "--steps", "6", "--folder", "trial", "--", *flags]) == 0
    assert_hidden(tmp_path, [])


def test_flags_that_are_shown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": {"key_b": "<secret>"}, "keys": ["<secret>", "<secret>"], "c": 1}')
    flags = ["--a.key-b", "x", "--a.key_b=y", "--keys", "u", "v", "--c", "2", "w"]
    assert without_secrets(flags, tmp_path) == [
        "--a.key-b", "<secret>", "--a.key_b=<secret>", "--keys", "<secret>", "<secret>", "--c", "2", "w",
    ]  # fmt: skip
    assert without_secrets(["--c", "2", "--d=3"], tmp_path / "other") == ["--c", "<secret>", "--d=<secret>"]


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="too short to be masked"):
        Secret("abc")


def test_a_misspelt_variable_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("slurm").symlink_to(ROOT / "slurm")
    monkeypatch.setenv(VARIABLE, TOKEN)
    monkeypatch.setenv(f"{VARIABLE}S", OTHER)
    assert command(["submit", str(RECIPE), "--dry-run", "--", "--run-dir", "run"]) == 0
    assert f"{VARIABLE}S in the environment is no secret of this recipe: {VARIABLE}?" in capsys.readouterr().err


def test_a_job_gets_it_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("slurm").symlink_to(ROOT / "slurm")
    words = ["submit", str(RECIPE), "--dry-run", "--", "--run-dir", "run"]
    assert command([*words, "--hub-token", TOKEN]) == 2
    assert f"export {VARIABLE}=VALUE, and leave --hub-token out" in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, TOKEN)
    assert command([*words, f"--hub_token={OTHER}"]) == 2
    capsys.readouterr()
    assert command(words) == 0
    assert TOKEN not in capsys.readouterr().out
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    assert command([word for word in words if word != "--dry-run"]) == 0
    assert (tmp_path / "run" / "submissions" / "1" / "config.json").is_file()
    assert_hidden(tmp_path / "run", [])


def test_the_folder_of_a_trial_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert command(["verify-resume", str(RECIPE), "--steps", "1"]) == 2
    assert not list(tmp_path.iterdir())
    seen: list[tuple[str, int]] = []

    def look(trial: Trial, _keep: bool) -> str:
        seen.append((trial.folder.name, trial.folder.stat().st_mode & 0o777))
        return ""

    monkeypatch.setattr("distkit.commands.verify_resume.report", look)
    for _ in range(2):
        assert command(["verify-resume", str(RECIPE)]) == 0
    (first, mode), (second, _) = seen
    assert first != second
    assert mode == 0o700
