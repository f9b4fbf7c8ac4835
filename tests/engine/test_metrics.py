"""Metrics that are made of sums of any shape: exact over ranks, checked before the first step, resumed to the bit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.harness import run_ranks
from support.tiny import BASE, CLASSES, NUM_TEST, RECIPE, TinyConfig, build_dataset
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_f1_score

from distkit.assemble import assemble, build_model
from distkit.config import CheckpointConfig, Constant
from distkit.engine.fit import fit
from distkit.entry import train
from distkit.errors import ConfigError
from distkit.losses import LossOutput
from distkit.metrics import class_scores, confusion_matrix
from distkit.recipe import Recipe
from distkit.runtime import read_topology
from distkit.runtime.process import start


def compute_loss(config: TinyConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
    logits = model(batch["inputs"]).float()
    confusion = confusion_matrix(logits, batch["labels"], CLASSES)
    return LossOutput(F.cross_entropy(logits, batch["labels"]), {"confusion": confusion})


def compute_metrics(sums: dict[str, Tensor], num_samples: int) -> dict[str, float]:
    assert sums["confusion"].sum() == num_samples
    return class_scores(sums["confusion"]).macro()


SCORED = replace(RECIPE, compute_loss=compute_loss, compute_metrics=compute_metrics, best=("f1", "max"))
CONFIG = replace(BASE, num_steps=6, report_every=4, eval_every=3, global_batch_size=12, schedule=Constant())


def train_here(folder: str, config: TinyConfig, recipe: Recipe[TinyConfig] = SCORED) -> str:
    run = assemble(recipe, replace(config, run_dir=Path(folder) / "run"), start(config, read_topology(os.environ)))
    digest = fit(run)["state_digest"]
    run.directory.release()
    run.runtime.close()
    return str(digest)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_the_score_is_that_of_the_whole_set(tmp_path: Path) -> None:
    train(SCORED, replace(CONFIG, run_dir=tmp_path / "run"))
    model = build_model(SCORED, CONFIG)
    model.load_state_dict(load_file(tmp_path / "run" / "weights.safetensors"))
    batch = build_dataset(CONFIG, "test").fetch(torch.arange(NUM_TEST))
    with torch.no_grad():
        logits = model.eval()(batch["inputs"])
    expected = multiclass_f1_score(logits, batch["labels"], CLASSES, average="macro")
    assert events(tmp_path, "eval")[-1]["f1"] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(world_size: int, tmp_path: Path) -> None:
    assert NUM_TEST % world_size
    run_ranks(train_here, 1, str(tmp_path / "one"), CONFIG)
    run_ranks(train_here, world_size, str(tmp_path / "many"), CONFIG)
    for kind in ("train", "eval"):
        alone, together = events(tmp_path / "one", kind), events(tmp_path / "many", kind)
        assert len(alone) == len(together) == 2
        for one, many in zip(alone, together, strict=True):
            for name in ("loss", "precision", "recall", "f1", "iou"):
                assert many[name] == pytest.approx(one[name], abs=1e-6), (kind, name)


def test_open_sums_survive_a_save(tmp_path: Path) -> None:
    saving = replace(CONFIG, checkpoint=CheckpointConfig(save_every=3), eval_every=None)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(SCORED, replace(saving, run_dir=whole / "run"))
    train(SCORED, replace(saving, num_steps=3, run_dir=parts / "run"))
    train(SCORED, replace(saving, run_dir=parts / "run"))
    names = ("step", "loss", "precision", "recall", "f1", "iou")
    lines = [[[line[name] for name in names] for line in events(folder, "train")] for folder in (whole, parts)]
    # the shorter run reported its last step
    assert lines[0][-1] == lines[1][-1]
    assert lines[0][-1][0] == 6


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (replace(SCORED, best=("correct", "max")), "best is correct, which compute_loss does not report"),
        (replace(SCORED, compute_metrics=None), r"sums\['confusion'\] must be a tensor without dims"),
        (replace(SCORED, compute_metrics=lambda sums, num_samples: None), "compute_metrics returned no dict"),
    ],
)
def test_what_cannot_be_reported_is_refused_before_the_first_step(
    recipe: Recipe[TinyConfig], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(recipe, replace(CONFIG, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
