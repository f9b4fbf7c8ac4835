"""A checkpoint of format version 1, written on 2 ranks and kept: every later version reads it.

Made by tests/tiny.py on 2 ranks with: --num-steps 12 --microbatch-size 2 --dropout 0.2 --noise 0.1 --batch-norm
--ema-decay 0.9 --precision fp16 --optim.name adamw --optim.lr 0.01 --eval-every 6 --report-every 4
--checkpoint.enabled --checkpoint.save-every 10
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from support import golden_run
from support.harness import run_ranks
from support.tiny import BASE, TinyConfig, build_run
from support.tiny_gpt import GPTTrainConfig

from distkit.assemble import assemble
from distkit.checkpoint.digest import state_digest
from distkit.checkpoint.read import iterate
from distkit.checkpoint.verify import read_state, verify
from distkit.commands.tools.diff import digest
from distkit.config import AdamW, ResumeConfig, StrategyName
from distkit.engine.fit import fit
from distkit.engine.resume import restore
from distkit.runtime import read_topology
from distkit.runtime.process import start

GOLDEN = Path(__file__).parents[1] / "golden_checkpoints" / "step-000000010"
DIGEST = "198fe0d9e1601f6dcd1cf9a2e1a9db06634d091dd6ee25e5e89134ffc4279860"
CONFIG = replace(
    BASE, num_steps=12, microbatch_size=2, dropout=0.2, noise=0.1, batch_norm=True, ema_decay=0.9, precision="fp16",
    optim=AdamW(lr=0.01), eval_every=6, report_every=4, resume=ResumeConfig(source=str(GOLDEN)),
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
    assert run.resume.checkpoint is not None
    restore(run, run.resume.checkpoint)
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


SHARDED = GOLDEN.parent / "sharded" / GOLDEN.name
SHARDED_DIGEST = "095df3f3158d79f9f8bb612439d6061b783e57ba539f4c0a25b2cffa6921e66f"
GOLDEN_RUN = replace(golden_run.BASE, resume=ResumeConfig(source=str(SHARDED)))


def test_one_of_three_ranks_in_shards_verifies_and_says_what_it_is() -> None:
    manifest = verify(SHARDED)
    assert (manifest.step, manifest.recipe, manifest.strategy, manifest.world_size) == (10, "golden", "fsdp", 3)
    assert digest(SHARDED) == SHARDED_DIGEST
    assert [shard.offsets for shard in manifest.tensors["model/embedding.weight"].shards] == [(0, 0), (18, 0), (36, 0)]
    assert manifest.tensors["model/rows"].shards[2].key == "model/rows@32768,0"
    tensors = dict(iterate(SHARDED, manifest))
    assert len(tensors) == 126
    assert float(tensors["model/embedding.weight"].double().sum()) == pytest.approx(0.42565760493744165, abs=1e-12)
    assert torch.equal(tensors["model/rows"].flatten(), torch.arange(3 * 65_536, dtype=torch.int32))
    assert torch.equal(tensors["model/halves"], torch.linspace(-1, 1, 7).bfloat16())
    assert tensors["model/nothing"].shape == (0, 3)
    assert tensors["extra/counter"].tolist() == [20]
    state = read_state(SHARDED)
    assert state["aliases"] == {"head.weight": "embedding.weight"}
    assert state["data"] == "242da2c7359e6fb0"
    parts = cast(dict[str, dict[str, object]], state["parts"])
    assert parts["extra"] == {"": {"forwards": 20}}
    assert parts["plateau"] == {"factor": 0.25, "num_bad": 0, "best": 3.829679330190023}


def resume_sharded(folder: str, config: GPTTrainConfig) -> tuple[str, int, int, int]:
    config = replace(config, run_dir=Path(folder) / "run")
    run = assemble(golden_run.RECIPE, config, start(config, read_topology(os.environ)))
    assert run.resume.checkpoint is not None
    restore(run, run.resume.checkpoint)
    found = state_digest(run.learned_tensors())
    module = cast(golden_run.Model, run.strategy.module)
    forwards, count = module.forwards, int(module.counter.count)
    fit(run)
    run.directory.release()
    run.runtime.close()
    return found, forwards, count, run.progress.step


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "strategy"), [(1, "single"), (2, "ddp"), (3, "fsdp")])
def test_a_run_goes_on_from_shards(world_size: int, strategy: StrategyName, tmp_path: Path) -> None:
    config = replace(GOLDEN_RUN, strategy=strategy)
    assert run_ranks(resume_sharded, world_size, str(tmp_path), config) == [(SHARDED_DIGEST, 20, 20, 12)] * world_size
