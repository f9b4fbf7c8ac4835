"""Presets, config files and flags, and the messages for wrong ones."""

import json
import subprocess
import sys
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path

import pytest

from distkit.cli import parse
from distkit.cli.help import NUM_LINES
from distkit.config import SGD, Adam, AdamW, Cosine, FSDPConfig, Linear, MultiStep, OneCycle, TrainConfig, to_json
from distkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """A recipe's configuration."""

    width: int = 64
    """Channels."""


QUICK = Config(num_epochs=2, optim=SGD(lr=0.2, momentum=0.9, nesterov=True))
PRESETS = {"quick": QUICK, "long": replace(QUICK, num_epochs=50.0, width=128)}


def parsed(*argv: str) -> Config:
    return parse(Config, PRESETS, argv, "recipe.py", "A recipe.")


def test_first_preset_is_the_default() -> None:
    assert parsed() == QUICK
    assert parsed("--preset", "long") == PRESETS["long"]
    assert parsed("--preset=long").width == 128


def test_flags_win_over_the_preset() -> None:
    result = parsed("--preset", "long", "--width", "32", "--optim.lr=0.5", "--no-deterministic")
    assert (result.width, result.optim.lr, result.deterministic) == (32, 0.5, False)
    assert result.num_epochs == 50


def test_underscores_are_hyphens() -> None:
    assert parsed("--global_batch_size", "64").global_batch_size == 64


def test_config_file_comes_between_preset_and_flags(tmp_path: Path) -> None:
    saved = replace(PRESETS["long"], seed=7, compile=True, data=replace(QUICK.data, root=Path("-x y")))
    saved = replace(saved, schedule=MultiStep(milestone_epochs=(1.0, 1.5)))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(replace(saved, run_dir=Path("the saved run")))))
    assert parsed("--config", str(file)) == saved
    again = parsed("--config", str(file), "--seed", "8")
    assert again == replace(saved, seed=8)


def test_one_length_clears_the_other() -> None:
    assert parsed("--num-steps", "20").num_epochs is None
    both = replace(QUICK, max_grad_norm=1.0)
    result = parse(Config, {"p": both}, ["--max-grad-value", "0.5"], "recipe.py", "")
    assert (result.max_grad_norm, result.max_grad_value) == (None, 0.5)


def test_another_optimizer_drops_what_only_the_presets_one_takes() -> None:
    config = parsed("--optim.name", "adamw", "--optim.lr", "1e-3")
    assert config.optim == AdamW(lr=1e-3)
    warm = replace(QUICK, schedule=OneCycle(warmup_ratio=0.2))
    result = parse(Config, {"p": warm}, ["--schedule.name", "linear"], "recipe.py", "")
    assert result.schedule == Linear()


def test_debug_is_short_and_implied() -> None:
    assert parsed("--debug").debug.enabled
    assert parsed("--debug.overfit-batches", "1").debug.enabled
    assert parsed("--debug.overfit-batches", "1").debug.overfit_batches == 1


def help_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        parsed(*argv)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_presets_groups_and_values_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "--help")
    for part in ("--preset {quick,long}", "--config FILE", "optim options", "--optim.lr 0.2", "--width 64", "Channels"):
        assert part in text
    assert "--width 128" in help_of(capsys, "--preset", "long", "--help")
    assert len(text.splitlines()) <= NUM_LINES == 60
    assert all(len(line) <= 120 for line in text.splitlines())
    # rare options are a group's
    assert "--compile-fullgraph" not in text
    assert "--optim.nesterov" not in text


def test_help_all_names_every_option_and_help_of_a_group_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    everything = help_of(capsys, "--help", "all")
    for part in ("--width", "--compile-fullgraph", "--optim.nesterov (on)", "--zero.offload", "--debug.pdb (off)"):
        assert part in everything
    group = help_of(capsys, "--help=checkpoint")
    assert "--checkpoint.keep-last 3" in group
    assert "--optim" not in group
    assert "only at the end" in " ".join(group.split())


def test_help_shows_what_the_chosen_optimizer_and_schedule_take(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "--optim.name", "adamw", "--help", "optim")
    for part in ("--optim.name adamw", "--optim.betas 0.9 0.999", "--optim.lr 0.2", "--optim.amsgrad (off)"):
        assert part in text
    assert "momentum" not in text
    text = help_of(capsys, "-h", "schedule", "--schedule.name", "one_cycle")
    assert "--schedule.warmup-ratio 0.3" in text
    assert "warmup-steps" not in text


def test_a_recipe_with_a_long_story_and_many_options_keeps_to_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    kind = make_dataclass("Many", [(f"option{i}", int, i) for i in range(40)], bases=(TrainConfig,), frozen=True,
                          kw_only=True)  # fmt: skip
    with pytest.raises(SystemExit):
        parse(kind, {"p": kind(num_steps=1)}, ["--help"], "recipe.py", "A story.\n" * 99)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == NUM_LINES
    assert "A story." in lines
    assert "  --option0 0" in [line.rstrip() for line in lines]
    assert any("--help recipe, " in line and line.endswith(" more)") for line in lines)


def test_help_into_a_pipe_that_closes_is_quiet(tmp_path: Path) -> None:
    code = (
        "import sys; from distkit.cli import parse; from distkit.config import TrainConfig as T\n"
        "sys.stdin.readline()\n"
        "try: parse(T, {'p': T(num_steps=1)}, ['--help', 'all'], 'x', '')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    child.stdin.write("\n")
    child.stdin.close()
    assert child.wait(60) == 0
    assert child.stderr.read() == ""
    child.stderr.close()


def test_a_file_of_an_older_version_holds_every_optimizers_fields(tmp_path: Path) -> None:
    optim = {"name": "sgd", "lr": 0.3, "momentum": None, "betas": None, "nesterov": None, "max_iter": None}
    schedule = {"name": "cosine", "warmup_steps": 3, "gamma": None}
    old = {"optim": optim, "schedule": schedule, "num_epochs": None, "num_steps": 7}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = parsed("--config", str(tmp_path / "config.json"))
    assert config.optim == SGD(lr=0.3)
    assert (config.num_steps, config.num_epochs, config.schedule) == (7, None, Cosine(warmup_steps=3))


@pytest.mark.parametrize("wrong", [{"num_steps": "10"}, {"width": 6.5}, {"precision": 3}, {"run_dir": "here"}])
def test_a_wrong_value_in_a_preset_is_a_configuration_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="|".join(wrong).replace("_", "[-_]")):
        parse(Config, {"p": replace(QUICK, **{"num_epochs": None, "num_steps": 1} | wrong)}, [], "recipe.py", "")


def test_a_switch_an_alternative_and_a_tuple_in_every_spelling() -> None:
    assert parsed("--no-channels_last", "--channels-last").channels_last
    assert parsed("--checkpoint.async", "off").checkpoint.asynchronous == "off"
    assert parsed("--resume", "runs/a").resume.source == "runs/a"
    config = parsed("--strategy", "fsdp", "--fsdp.wrap", "Block", "Head", "--seed", "3")
    assert (config.fsdp.wrap, config.seed) == (("Block", "Head"), 3)
    assert parsed("--optim.name=adam", "--optim.betas", "0.8", "0.9").optim == Adam(lr=0.2, betas=(0.8, 0.9))
    sharded = replace(QUICK, strategy="fsdp", fsdp=FSDPConfig(wrap=("Block",)))
    config = parse(Config, {"p": sharded}, ["--strategy", "ddp"], "recipe.py", "")
    assert (config.strategy, config.fsdp) == ("ddp", FSDPConfig())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--optim.lrr", "0.1"], "--optim.lr"),
        (["--optin.lr", "0.1"], "--optim.lr"),
        (["--epochs", "3"], "--num-epochs"),
        (["--optim.lr", "fast"], "--optim.lr"),
        (["--precision", "bf17"], "bf16"),
        (["--preset", "quikc"], "--preset quick"),
        (["--preset"], "--preset VALUE"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--num-steps", "0"], "--num-steps"),
        (["--num-steps", "5", "--num-epochs", "1"], "both are set"),
        (["--optim.name", "adamww"], "--optim.name adamw"),
        (["--optim.name", "None"], "--optim.name has no choice None"),
        (["--schedule.name", "None"], "--schedule.name has no choice None"),
        (["--width", str(2**63)], "--width"),
        (["--data.root", "\ud800"], r"--data.root \ud800 is not a path"),
        (["--global-batch-size", str(10**18)], "--global-batch-size"),
        (["--precision=bf61"], "--precision bf16"),
        (["--optim.adjust-lr", "orginal"], "--optim.adjust-lr original"),
        (["--num-steps", "2.5"], "a whole number or None"),
        (["--num-steps=many"], "--num-steps 1"),
        (["--max-grad-norm", "x"], "a number or None"),
        (["--compile", "False"], "--no-compile"),
        (["--debug=True"], "--debug.enabled"),
        (["--run-dir", ""], "--run-dir runs/NAME"),
        (["--compile-mode", "max-autotune"], "--compile"),
        (["--data.source", "synthetic", "--data.root", "x"], "--data.root"),
        (["--num-threads", "100000"], "--num-threads"),
        (["--debug.overfit-batches", "1", "--debug.num-steps", "9"], "--debug.num-steps 3"),
        (["--optim.name", "adam", "--optim.momentum", "0.9"], "--optim.momentum"),
        (["--optim.betas", "0.9"], "--optim.betas"),
        (["--schedule.name", "multi_step"], "--schedule.milestone-epochs"),
        (["--optim.lr", "-1"], "--optim.lr"),
        (["--optim.lr", "nan"], "--optim.lr"),
        (["stray"], "stray"),
        (["--seed", "1", "stray"], "stray"),
        (["--seed"], "--seed VALUE"),
        (["--help", "optin"], "--help optim"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_wrong_lines_get_one_clear_message(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(*argv)
    message = str(caught.value)
    assert says in message
    assert len(message.splitlines()) < 10
    assert "Traceback" not in message
