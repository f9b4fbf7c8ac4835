"""Cadences in epochs: typed, written and read back as they are, due at the first step after the end of an epoch."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from support.tiny import BASE, RECIPE, TinyConfig

from distkit.cli.parse import parse
from distkit.config import CheckpointConfig, Constant, Epochs, TrainConfig, to_json
from distkit.config.every import in_steps
from distkit.engine.train_step import due
from distkit.entry import train
from distkit.errors import ConfigError


def parsed(*flags: str) -> TinyConfig:
    return parse(TinyConfig, {"default": BASE}, flags, "tiny", "")


@pytest.mark.parametrize("text", ["1e", "0.5e", "12e", "0.1e", "0.00001e"])
def test_what_is_typed_comes_back(text: str, tmp_path: Path) -> None:
    config = parsed("--eval-every", text, "--checkpoint.enabled", f"--checkpoint.save-every={text}")
    assert config.eval_every == Epochs(float(text[:-1])) == config.checkpoint.save_every
    saved = to_json(config)
    assert saved["eval_every"] == text
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert parsed("--config", str(tmp_path / "config.json")) == config
    assert parsed("--eval-every", "3").eval_every == 3
    assert parsed("--eval-every", "None").eval_every is None


@pytest.mark.parametrize("text", ["e", "0e", "-1e", "1e3", "1 e", "infe", "nane", "0.0e", "1.2.3e", "0", "1.5"])
def test_what_is_no_cadence_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(f"--eval-every={text}")
    assert "--eval-every" in str(caught.value) or "eval_every" in str(caught.value)


@pytest.mark.parametrize("number", [0, -1.0, float("inf"), float("nan")])
def test_no_epochs(number: float) -> None:
    with pytest.raises(ConfigError):
        Epochs(number)


@pytest.mark.parametrize(("samples", "batch", "epochs"), [(100, 3, 1), (50_000, 128, 1), (1000, 7, 0.5), (96, 8, 2)])
def test_it_is_due_once_an_epoch_at_its_end(samples: int, batch: int, epochs: float) -> None:
    every = in_steps(Epochs(epochs), samples / batch)
    exact = Fraction(epochs) * Fraction(samples, batch)
    steps = [step for step in range(1, 20_000) if due(every, step, 10**9)]
    assert steps == [-(-exact * k // 1) for k in range(1, len(steps) + 1)]
    assert all(due(every_, step, 10**9) == (step % every_ == 0) for every_ in (1, 2, 50) for step in range(1, 500))


def test_a_run_evaluates_and_saves_at_the_end_of_epochs(tmp_path: Path) -> None:
    config = replace(BASE, num_steps=None, num_epochs=3, global_batch_size=10, schedule=Constant())
    saving = CheckpointConfig(save_every=Epochs(1.5), keep_best=None)
    config = replace(config, eval_every=Epochs(1), checkpoint=saving)
    train(RECIPE, replace(config, run_dir=tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # 96 samples: an epoch has 9.6 steps
    assert [line["step"] for line in lines if line["event"] == "eval"] == [10, 20, 29]
    assert sorted({line["step"] for line in lines if line["event"] == "checkpoint"}) == [15, 29]


def test_a_schedule_may_ask_for_the_steps_of_an_epoch(tmp_path: Path) -> None:
    asked: list[float] = []

    def build_schedule(config: TrainConfig, num_steps: int, steps_per_epoch: float) -> object:
        asked.append(steps_per_epoch)
        return lambda step: 0.5 ** int(step / steps_per_epoch)

    recipe = replace(RECIPE, build_schedule=build_schedule)  # type: ignore[arg-type]
    train(recipe, replace(BASE, schedule=Constant(), num_steps=13, report_every=1, run_dir=tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if line["event"] == "train"] == [0.2] * 12 + [0.1]
    assert asked == [12.0]
