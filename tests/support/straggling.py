"""The tiny recipe with some work in each forward, and a rank that is slow: SLOW=phase:rank, phase data or compute.

A slow rank sleeps SLEEP_SECONDS in each batch or forward.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace

import torch
from support import tiny
from torch import Tensor, nn

from distkit.config import DataConfig, Split
from distkit.entry import main
from distkit.recipe import Recipe

SLEEP_SECONDS = 0.4
WORK = 384


def be_slow(phase: str) -> None:
    if os.environ.get("SLOW") == f"{phase}:{os.environ.get('RANK')}":
        time.sleep(SLEEP_SECONDS)


class Work(nn.Module):
    """Some milliseconds, forward and backward."""

    def __init__(self, *, last: bool = False) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.eye(WORK)), last

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and self.last:
            be_slow("compute")
        product = self.weight @ self.weight @ self.weight @ self.weight
        return inputs * product.diagonal().mean()


class Vectors(tiny.Vectors):
    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        be_slow("data")
        return super().fetch(indices)


def build_model(config: tiny.TinyConfig) -> nn.Module:
    return nn.Sequential(Work(), Work(), Work(last=True), tiny.build_model(config))


def build_dataset(config: tiny.TinyConfig, split: Split) -> tiny.Vectors:
    return Vectors(split, 0.0) if split == "train" else tiny.build_dataset(config, split)


BASE = replace(tiny.BASE, batch_norm=True, data=DataConfig(placement="host"))
RECIPE = Recipe("straggling", tiny.TinyConfig, build_model, build_dataset, tiny.compute_loss,
                presets={"default": BASE}, best=("correct", "max"))  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
