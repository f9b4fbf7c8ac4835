"""Runs under several configurations, one after the other in one set of ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support import carry, layer_drop, tiny, tiny_gpt
from support.harness import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distkit.assemble import assemble
from distkit.checkpoint.digest import state_digest
from distkit.config import TrainConfig
from distkit.engine.fit import fit
from distkit.engine.resume import restore
from distkit.engine.run import Run
from distkit.runtime import read_topology
from distkit.runtime.process import Runtime, start
from distkit.tensors.shards import whole

#: A machine that tests something else beside this may stop for a minute.
BASES: dict[str, TrainConfig] = {
    name: replace(recipe.BASE, timeout_seconds=240) for name, recipe in (("mlp", tiny), ("gpt", tiny_gpt))
}
RECIPES = {recipe.config: recipe for recipe in (tiny.RECIPE, tiny_gpt.RECIPE, layer_drop.RECIPE, carry.RECIPE)}
ZERO = ("zero1", "zero2", "zero3")
#: Accelerate's DeepSpeed path imports transformers.
MISSING = [name for name in ("deepspeed", "transformers") if find_spec(name) is None]
needs_deepspeed = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
#: Every strategy for several ranks, as parameters of a test.
STRATEGIES = ["ddp", "fsdp", *(pytest.param(name, marks=needs_deepspeed) for name in ZERO)]


@dataclass
class Ended:
    """What a run left: whole parameters and buffers, the curve (empty but on rank 0), digest and last evaluation."""

    strategy: str
    weights: dict[str, Tensor]
    train: list[dict[str, float]]
    digest: str
    last: dict[str, float]
    restored: str
    """The digest before the first step of this process."""


def build(folder: Path | str, config: TrainConfig, runtime: Runtime | None = None) -> Run:
    """A run of this process in `folder`, of the recipe whose configuration it is."""
    recipe = RECIPES[type(config)]
    runtime = runtime or start(config, read_topology(os.environ))
    return assemble(recipe, replace(config, run_dir=Path(folder)), runtime)  # type: ignore[arg-type, type-var]


def train_all(folder: str, configs: Mapping[str, TrainConfig]) -> dict[str, Ended]:
    """On every rank: one run after the other, each in FOLDER/NAME; a run that is there goes on."""
    runtime = start(next(iter(configs.values())), read_topology(os.environ))
    found = {}
    for name, config in configs.items():
        torch._dynamo.reset()  # what a run before has compiled
        run = build(Path(folder) / name, config, runtime)
        if run.resume.checkpoint is not None:
            restore(run, run.resume.checkpoint)
        restored = state_digest(run.learned_tensors())
        summary = fit(run)
        weights = {n: whole(t.detach()).clone() for n, t in run.strategy.model_tensors().items()}
        lines = (run.directory.path / "metrics.jsonl").read_text().splitlines() if runtime.is_main_process else []
        train = [line for line in map(json.loads, lines) if line["event"] == "train"]
        digest, last = str(summary["state_digest"]), summary["last"]
        found[name] = Ended(run.strategy.name, weights, train, digest, last, restored)  # type: ignore[arg-type]
        run.directory.release()
    runtime.close()
    return found


def on_ranks(
    world_size: int, folder: Path, configs: Mapping[str, TrainConfig], timeout: float = 280
) -> dict[str, Ended]:
    """`train_all` on real ranks: rank 0's, after every rank was found to have ended with the same digests."""
    ranks = run_ranks(train_all, world_size, str(folder), dict(configs), timeout=timeout)
    for name in configs:
        assert len({rank[name].digest for rank in ranks}) == 1, name
    first: dict[str, Ended] = ranks[0]
    return first


def curve(ended: Ended, key: str = "loss") -> dict[float, float]:
    """step -> value of the train lines."""
    return {line["step"]: line[key] for line in ended.train}


def differences(one: Ended, other: Ended) -> tuple[float, float]:
    """Largest difference of the losses, and of the parameters."""
    mine, theirs = curve(one), curve(other)
    assert mine.keys() == theirs.keys()
    assert one.weights.keys() == other.weights.keys()
    weights = max(float((one.weights[n] - t).abs().max()) for n, t in other.weights.items())
    return max(abs(mine[step] - theirs[step]) for step in mine), weights


class CountReads(TorchDispatchMode):
    """Counts what makes the host wait for a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
