"""Early stopping: by patience and by a bound, saved like any other state, the same end after a kill."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny import BASE, RECIPE, TinyConfig

from distkit.config import CheckpointConfig, Constant, StopConfig
from distkit.engine.early_stop import EarlyStop
from distkit.entry import train
from distkit.errors import ConfigError

CONFIG = replace(BASE, num_steps=40, eval_every=4, report_every=5, schedule=Constant(),
                 checkpoint=CheckpointConfig(save_every=8))  # fmt: skip


def after(values: list[float], **options: Any) -> list[bool]:
    """Whether the run would end after each value, the state saved and restored in between."""
    stop, ends = EarlyStop(StopConfig(**options)), []
    for value in values:
        stop.update(value)
        restored = EarlyStop(stop.config)
        restored.load_state_dict(json.loads(json.dumps(stop.state_dict(), allow_nan=False)))
        assert restored.reason == stop.reason
        stop = restored
        ends.append(stop.reason is not None)
    return ends


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([3, 2, 2, 2, 1], {"patience": 2}, [False, False, False, True, False]),
        ([1, 2, 3, 3, 3], {"patience": 2, "metric": "top1", "metric_mode": "max"}, [False] * 4 + [True]),
        ([3, 2.95, 2.9, 2.85], {"patience": 2, "min_delta": 0.1}, [False, False, True, False]),
        ([math.nan, math.nan, 1, 2], {"patience": 2}, [False, True, False, False]),
        ([2, math.nan, math.inf], {"patience": 2}, [False, False, True]),
        ([2, 1, 0.4, 2], {"below": 0.5}, [False, False, True, False]),
        ([0.2, 0.9, math.nan], {"above": 0.8, "metric": "top1"}, [False, True, False]),
    ],
)
def test_when_it_ends(values: list[float], options: dict[str, Any], expected: list[bool]) -> None:
    assert after(values, **options) == expected


def outcome(run_dir: Path, config: TinyConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    summary = train(RECIPE, replace(config, run_dir=run_dir))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return dict(summary), lines


def test_a_run_ends_early_with_everything_saved_and_stays_ended(tmp_path: Path) -> None:
    config = replace(CONFIG, stop=StopConfig(metric="correct", above=0.7))
    summary, lines = outcome(tmp_path / "run", config)
    step = summary["step"]
    assert step < 40
    assert step % 4 == 0
    assert summary["stopped_early"].startswith("correct is ")
    evals = [line for line in lines if line["event"] == "eval"]
    assert [line["correct"] > 0.7 for line in evals] == [False] * (len(evals) - 1) + [True]
    trains = [line for line in lines if line["event"] == "train"]
    assert trains[-1]["step"] == step
    assert sum(line["samples"] for line in trains) == step * config.global_batch_size
    assert any(line["event"] == "note" and line["message"].startswith("stopped early: ") for line in lines)
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:09d}").is_dir()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "completed"

    again, more = outcome(tmp_path / "run", config)
    assert again["state_digest"] == summary["state_digest"]
    assert [line for line in more if line["event"] == "train"] == trains
    assert [line for line in more if line["event"] == "eval"] == evals

    longer, _ = outcome(tmp_path / "run", replace(config, stop=StopConfig()))
    assert longer["step"] == 40
    straight, _ = outcome(tmp_path / "straight", replace(config, stop=StopConfig()))
    assert longer["state_digest"] == straight["state_digest"]


def test_patience_counts_on_after_a_resume(tmp_path: Path) -> None:
    config = replace(CONFIG, stop=StopConfig(patience=2, min_delta=10.0))
    straight, _ = outcome(tmp_path / "straight", config)
    assert straight["step"] == 12
    outcome(tmp_path / "parts", replace(config, num_steps=8))
    parts, _ = outcome(tmp_path / "parts", config)
    assert (parts["step"], parts["state_digest"]) == (12, straight["state_digest"])


def test_another_metric_begins_again_and_says_so(tmp_path: Path) -> None:
    outcome(tmp_path / "run", replace(CONFIG, num_steps=8, stop=StopConfig(patience=9)))
    stop = StopConfig(patience=3, metric="correct", metric_mode="max", min_delta=1.0)
    summary, lines = outcome(tmp_path / "run", replace(CONFIG, stop=stop))
    assert summary["step"] == 8 + 4 * 4
    notes = [line["message"] for line in lines if line["event"] == "note"]
    assert "early stopping follows correct (max), and followed loss (min): it begins again" in notes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop": StopConfig(patience=3), "eval_every": None}, "--stop acts on evaluations"),
        ({"stop": StopConfig(patience=3, metric="top1")}, "--stop.metric is top1, which compute_loss does not report"),
    ],
)
def test_what_could_never_end_a_run_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        train(RECIPE, replace(CONFIG, run_dir=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patience": 0}, ">= 1"),
        ({"metric_mode": "up"}, "min or max"),
        ({"metric": "top1"}, "--stop.metric without a reason to stop"),
        ({"min_delta": 0.1, "below": 1.0}, "--stop.min-delta is about --stop.patience"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StopConfig(**options)
