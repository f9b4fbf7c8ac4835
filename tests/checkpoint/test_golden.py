"""A checkpoint of format version 1, written on 2 ranks and kept: every later version reads it.

Made by tests/tiny.py on 2 ranks with: --num-steps 12 --microbatch-size 2 --dropout 0.2 --noise 0.1 --batch-norm
--ema-decay 0.9 --precision fp16 --optim.name adamw --optim.lr 0.01 --eval-every 6 --report-every 4
--checkpoint.enabled --checkpoint.save-every 10
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from tiny import BASE, TinyConfig, build_run

from distkit.checkpoint.digest import state_digest
from distkit.checkpoint.inspect import digest
from distkit.checkpoint.read import iterate, read_state
from distkit.checkpoint.verify import verify
from distkit.config import OptimConfig, ResumeConfig
from distkit.engine.fit import fit
from distkit.engine.state import restore

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "step-000000010"
DIGEST = "198fe0d9e1601f6dcd1cf9a2e1a9db06634d091dd6ee25e5e89134ffc4279860"
CONFIG = replace(
    BASE, num_steps=12, microbatch_size=2, dropout=0.2, noise=0.1, batch_norm=True, ema_decay=0.9, precision="fp16",
    optim=OptimConfig(name="adamw", lr=0.01), eval_every=6, report_every=4, resume=ResumeConfig(source=str(GOLDEN)),
)  # fmt: skip


def test_it_verifies_and_says_what_it_is() -> None:
    manifest = verify(GOLDEN)
    assert (manifest.step, manifest.recipe, manifest.strategy, manifest.world_size) == (10, "tiny", "ddp", 2)
    assert digest(GOLDEN) == DIGEST
    tensors = dict(iterate(GOLDEN, manifest))
    assert len(tensors) == 56
    assert tensors["model/0.weight"].shape == (8, 6)
    assert tensors["scaler/scale"].item() == 16384.0
    assert tensors["model/1.num_batches_tracked"].item() == 20
    assert float(tensors["model/0.weight"].double().sum()) == pytest.approx(0.27489428964, abs=1e-9)
    state = read_state(GOLDEN)
    assert state["version"] == 1
    assert state["num_samples"] == 96


def resume(folder: str, config: TinyConfig) -> tuple[str, int, int]:
    run = build_run(Path(folder), config)
    assert run.restored_from is not None
    restore(run, run.restored_from)
    found = state_digest(run.learned_tensors())
    step = run.progress.step
    fit(run)
    run.directory.release()
    run.runtime.close()
    return found, step, run.progress.step


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_goes_on_from_it(world_size: int, tmp_path: Path) -> None:
    assert run_ranks(resume, world_size, str(tmp_path), CONFIG) == [(DIGEST, 10, 12)] * world_size


def test_its_averages_are_those_of_the_weights() -> None:
    tensors = dict(iterate(GOLDEN, verify(GOLDEN)))
    names = {name.removeprefix("ema/") for name in tensors if name.startswith("ema/")}
    assert names == {n.removeprefix("model/") for n in tensors if n.startswith("model/")} - {"1.num_batches_tracked"}
    assert all(torch.isfinite(tensors[f"ema/{name}"]).all() for name in names)
