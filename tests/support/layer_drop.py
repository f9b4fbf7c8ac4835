"""The tiny transformer with layer drop: in training each forward leaves out some blocks, and an offset."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

import torch
from support import tiny_gpt
from torch import Tensor, nn

from distkit.entry import main
from distkit.losses import LossOutput, chunked_cross_entropy
from distkit.models import GPT
from distkit.recipe import Recipe

#: On how many ranks the runs are that one process repeats, a microbatch for each.
RANKS = 2


@dataclass(frozen=True, kw_only=True)
class Config(tiny_gpt.GPTTrainConfig):
    """Which blocks are left out."""

    drop: float = 0.5
    """How often, in [0, 1]."""
    draws: Literal["same", "own", "heads"] = "own"
    """own: each rank's microbatch leaves out its own; heads: nothing but one of two parameters of one size."""
    keep_steps: int = 0
    """So many steps leave out nothing."""


class LayerDrop(GPT):
    """Its draws depend on step and rank alone, also where one process computes the microbatches of all ranks."""

    def __init__(self, config: Config) -> None:
        super().__init__(replace(tiny_gpt.SHAPE, num_layers=4), chunked_cross_entropy)
        self.how, self.calls = config, 0
        self.offset = nn.Parameter(torch.full((tiny_gpt.SHAPE.dim,), 0.1))
        if config.draws == "heads":
            self.heads = nn.ParameterList([nn.Parameter(torch.full((tiny_gpt.SHAPE.dim,), 0.1)) for _ in range(2)])

    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, state: int) -> None:
        self.calls = state

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        training = self.training and torch.is_grad_enabled()
        first = int(os.environ.get("RANK", "0"))
        per_rank = RANKS // int(os.environ.get("WORLD_SIZE", "1"))
        step, rank = self.calls // per_rank, first * per_rank + self.calls % per_rank
        generator = torch.Generator().manual_seed(1000 * step + (rank if self.how.draws == "own" else 0))
        keep = torch.rand(5, generator=generator) >= self.how.drop
        if self.how.draws == "heads" or not training or step < self.how.keep_steps:
            keep[:] = True
        self.calls += training
        x = self.embedding(tokens)
        if keep[4]:
            x = x + self.offset
        if self.how.draws == "heads":
            x = x + self.heads[0 if step < self.how.keep_steps else rank % 2]
        for block, kept in zip(self.blocks, keep, strict=False):
            if kept:
                x = block(x)
        loss, _ = self.loss(self.norm(x), self.embedding.weight, targets)
        return loss


RECIPE = Recipe(
    "layer-drop",
    Config,
    LayerDrop,
    lambda config, split: tiny_gpt.Tokens(split),
    lambda config, model, batch: LossOutput(model(*batch)),
    presets={"default": Config(**{name: getattr(tiny_gpt.BASE, name) for name in tiny_gpt.BASE.__dataclass_fields__})},
)

if __name__ == "__main__":
    main(RECIPE)
