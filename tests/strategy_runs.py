"""Runs of one recipe under several configurations, in one set of ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import tiny
import tiny_gpt
from harness import run_ranks
from torch import Tensor

from distkit.assemble import assemble
from distkit.checkpoint.digest import state_digest
from distkit.config import TrainConfig
from distkit.engine.fit import fit
from distkit.engine.state import restore
from distkit.runtime import read_topology
from distkit.runtime.process import start
from distkit.runtime.shards import whole

RECIPES = {"mlp": tiny.RECIPE, "gpt": tiny_gpt.RECIPE}
BASES: dict[str, TrainConfig] = {"mlp": tiny.BASE, "gpt": tiny_gpt.BASE}


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


def train_all(recipe: str, folder: str, configs: Mapping[str, TrainConfig]) -> dict[str, Ended]:
    """On every rank: one run after the other, each in FOLDER/NAME; a run that is there goes on."""
    runtime = start(next(iter(configs.values())), read_topology(os.environ))
    found = {}
    for name, config in configs.items():
        config = replace(config, run_dir=Path(folder) / name)
        run = assemble(RECIPES[recipe], config, runtime)
        if run.restored_from is not None:
            restore(run, run.restored_from)
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
    world_size: int, recipe: str, folder: Path, configs: Mapping[str, TrainConfig], timeout: float = 200
) -> dict[str, Ended]:
    """`train_all` on real ranks: rank 0's, after every rank was found to have ended with the same digests."""
    ranks = run_ranks(train_all, world_size, recipe, str(folder), dict(configs), timeout=timeout)
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
