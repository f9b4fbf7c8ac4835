"""The engine on a real GPU: no step waits for it (C5), and a resumed run is the run that was never stopped (C3)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny, tiny_gpt

from distkit.assemble import assemble
from distkit.config import CheckpointConfig, Constant, TrainConfig
from distkit.engine.fit import fit, opened, report
from distkit.engine.run import Run
from distkit.engine.train_step import train_step
from distkit.recipe import Recipe
from distkit.runtime import Topology
from distkit.runtime.process import start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
RECIPES: dict[str, Recipe] = {"vectors": tiny.RECIPE, "gpt": tiny_gpt.RECIPE}
PRECISIONS = ["fp32", "bf16", "fp16"]


def build(name: str, folder: Path, **changes: object) -> Run:
    base = RECIPES[name].presets["default"]
    config: TrainConfig = replace(base, device="cuda", run_dir=folder, **changes)  # type: ignore[arg-type]
    return assemble(RECIPES[name], config, start(config, Topology()))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("on_nan", ["raise", "skip"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", RECIPES)
def test_no_step_waits_for_the_gpu(name: str, precision: str, on_nan: str, tmp_path: Path) -> None:
    run = build(name, tmp_path / "run", precision=precision, max_grad_norm=1.0, ema_decay=0.9, microbatch_size=4,
                on_nan=on_nan)  # fmt: skip
    with opened(run):
        for _ in range(3):  # what is made in the first steps may wait
            train_step(run)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(6):
                train_step(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        report(run)
    assert run.progress.step == 9
    run.directory.release()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("asynchronous", ["on", "off"])
def test_a_resumed_run_is_the_same_to_the_bit(precision: str, asynchronous: str, tmp_path: Path) -> None:
    digests = []
    for parts in ((12,), (5, 12)):
        for num_steps in parts:
            run = build(
                "gpt",
                tmp_path / str(len(parts)),
                precision=precision,
                dropout=0.1,
                num_steps=num_steps,
                schedule=Constant(),
                checkpoint=CheckpointConfig(save_every=5, asynchronous=asynchronous),  # type: ignore[arg-type]
            )
            summary = fit(run)
            run.directory.release()
        digests.append(summary["state_digest"])
    assert digests[0] == digests[1]
