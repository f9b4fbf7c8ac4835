"""Presets, config files and flags, and the messages for wrong ones."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from distkit.cli import Parsed, parse, plain_message
from distkit.config import SGD, AdamW, Linear, MultiStep, OneCycle, TrainConfig, to_json
from distkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """A recipe's configuration."""

    width: int = 64
    """Channels."""


QUICK = Config(num_epochs=2, optim=SGD(lr=0.2, momentum=0.9, nesterov=True))
PRESETS = {"quick": QUICK, "long": replace(QUICK, num_epochs=50.0, width=128)}


def parsed(*argv: str) -> Parsed[Config]:
    return parse(Config, PRESETS, argv, "recipe.py", "A recipe.")


def test_first_preset_is_the_default() -> None:
    assert parsed() == Parsed(QUICK, "quick", frozenset())
    assert parsed("--preset", "long").config == PRESETS["long"]
    assert parsed("--preset=long").config.width == 128


def test_flags_win_over_the_preset_and_are_remembered() -> None:
    result = parsed("--preset", "long", "--width", "32", "--optim.lr=0.5", "--no-deterministic")
    assert (result.config.width, result.config.optim.lr, result.config.deterministic) == (32, 0.5, False)
    assert result.config.num_epochs == 50
    assert result.typed == {"width", "optim.lr", "deterministic"}


def test_underscores_are_hyphens() -> None:
    assert parsed("--global_batch_size", "64").config.global_batch_size == 64


def test_config_file_comes_between_preset_and_flags(tmp_path: Path) -> None:
    saved = replace(PRESETS["long"], seed=7, compile=True, data=replace(QUICK.data, root=Path("-x y")))
    saved = replace(saved, schedule=MultiStep(milestone_epochs=(1.0, 1.5)))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(replace(saved, run_dir=Path("the saved run")))))
    assert parsed("--config", str(file)).config == saved
    again = parsed("--config", str(file), "--seed", "8").config
    assert again == replace(saved, seed=8)


def test_one_length_clears_the_other() -> None:
    assert parsed("--num-steps", "20").config.num_epochs is None
    both = replace(QUICK, max_grad_norm=1.0)
    result = parse(Config, {"p": both}, ["--max-grad-value", "0.5"], "recipe.py", "")
    assert (result.config.max_grad_norm, result.config.max_grad_value) == (None, 0.5)


def test_another_optimizer_drops_what_only_the_presets_one_takes() -> None:
    config = parsed("--optim.name", "adamw", "--optim.lr", "1e-3").config
    assert config.optim == AdamW(lr=1e-3)
    warm = replace(QUICK, schedule=OneCycle(warmup_ratio=0.2))
    result = parse(Config, {"p": warm}, ["--schedule.name", "linear"], "recipe.py", "")
    assert result.config.schedule == Linear()


def test_debug_is_short_and_implied() -> None:
    assert parsed("--debug").config.debug.enabled
    assert parsed("--debug.overfit-batches", "1").config.debug.enabled
    assert parsed("--debug.overfit-batches", "1").config.debug.overfit_batches == 1


def test_help_shows_presets_groups_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parsed("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in ("--preset {quick,long}", "--config FILE", "optim options", "--optim.lr", "0.2", "--width", "Channels"):
        assert part in text


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


def test_plain_message_keeps_the_sentence_only() -> None:
    box = "╭─ Value error ─╮\n│ Error parsing --a: bad │\n│ ────── │\n│ Argument helptext: │\n╰────╯\n"
    assert plain_message(box) == "Error parsing --a: bad"
