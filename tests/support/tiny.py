"""A recipe that trains in milliseconds, for tests of the engine."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distkit.assemble import assemble
from distkit.config import SGD, CheckpointConfig, Cosine, ObserveConfig, Split, TrainConfig
from distkit.data import Draws
from distkit.engine.run import Run
from distkit.entry import main
from distkit.losses import LossOutput
from distkit.recipe import Recipe
from distkit.runtime import Topology, read_topology
from distkit.runtime.process import start

NUM_TRAIN, NUM_TEST, FEATURES, CLASSES = 96, 37, 6, 4
QUIET = ObserveConfig(console=False)


@dataclass(frozen=True, kw_only=True)
class TinyConfig(TrainConfig):
    """A two-layer network on random vectors."""

    dropout: float = 0.0
    """Dropout, in [0, 1)."""
    weighted: bool = False
    """Weigh the loss as token losses are weighed: samples count 0 to 3."""
    batch_norm: bool = False
    """A BatchNorm layer."""
    noise: float = 0.0
    """Keyed noise on the inputs."""


class Vectors:
    """Random vectors; `fetch` also gives their indices, so that tests see what was read."""

    def __init__(self, split: Split, noise: float) -> None:
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        self.inputs = torch.randn(NUM_TRAIN if split == "train" else NUM_TEST, FEATURES, generator=generator)
        teacher = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(3))
        self.labels = (self.inputs @ teacher).argmax(1)
        self.noise = noise
        self.read: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        self.read.append(indices)
        return {"inputs": self.inputs[indices], "labels": self.labels[indices], "indices": indices}

    def augment(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        if not self.noise:
            return batch
        return {**batch, "inputs": batch["inputs"] + self.noise * draws.uniform("noise")[:, None]}


def build_model(config: TinyConfig) -> nn.Module:
    norm = nn.BatchNorm1d(8) if config.batch_norm else nn.Identity()
    return nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.Tanh(), nn.Dropout(config.dropout), nn.Linear(8, CLASSES))


def build_dataset(config: TinyConfig, split: Split) -> Vectors:
    return Vectors(split, config.noise if split == "train" else 0.0)


def compute_loss(config: TinyConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
    logits = model(batch["inputs"])
    sums = {"correct": (logits.argmax(1) == batch["labels"]).sum()}
    if not config.weighted:
        return LossOutput(F.cross_entropy(logits.float(), batch["labels"]), sums)
    weights = (batch["indices"] % 4).float()
    losses = F.cross_entropy(logits.float(), batch["labels"], reduction="none")
    return LossOutput((losses * weights).sum() / weights.sum().clamp(min=1), sums, weight=weights.sum())


BASE = TinyConfig(
    num_steps=20,
    global_batch_size=8,
    device="cpu",
    num_threads=1,
    report_every=5,
    timeout_seconds=60,
    observe=QUIET,
    checkpoint=CheckpointConfig(enabled=False),
    optim=SGD(lr=0.2, momentum=0.9),
    schedule=Cosine(warmup_steps=3),
)
RECIPE = Recipe("tiny", TinyConfig, build_model, build_dataset, compute_loss, presets={"default": BASE},
                best=("correct", "max"))  # fmt: skip


def build_run(folder: Path | str, config: TinyConfig = BASE, topology: Topology | None = None) -> Run:
    """A run of this process (its environment says which rank) in `folder`."""
    config = config if config.run_dir is not None else replace(config, run_dir=Path(folder) / "run")
    return assemble(RECIPE, config, start(config, topology or read_topology(os.environ)))


if __name__ == "__main__":
    main(RECIPE)
