"""The small network with what its layers carry from one batch to the next."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Literal

import torch
from support import tiny
from torch import Tensor, nn

from distkit import register_rank_buffer
from distkit.entry import main
from distkit.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Config(tiny.TinyConfig):
    """What is carried."""

    kind: Literal["own", "shared", "late", "lengths", "cache", "extra", "alike"] = "own"
    """own: declared a rank's own; shared: the same, not declared; late: so, from the second batch on; lengths: shapes
    differ; cache: so do those of one that is not saved; extra: an extra state that differs; alike: a count."""


class Carry(nn.Module):
    """Each output depends on the mean of the batches before, which it keeps; a history grows."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.net, self.kind, self.seen = tiny.build_model(config), config.kind, 0
        self.mean: Tensor
        if config.kind == "own":
            register_rank_buffer(self, "mean", torch.zeros(()))
            register_rank_buffer(self, "history", None)
            register_rank_buffer(self, "scratch", torch.zeros(2), persistent=False)
        elif config.kind in ("shared", "late"):
            self.register_buffer("mean", torch.zeros(()))
        elif config.kind in ("lengths", "cache"):
            self.register_buffer("table", torch.zeros(1), persistent=config.kind == "lengths")
        elif config.kind == "alike":
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def get_extra_state(self) -> int:
        return self.seen

    def set_extra_state(self, state: int) -> None:
        self.seen = state

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        if not self.training:
            return logits
        rank = int(os.environ.get("RANK", "0"))
        if self.kind in ("own", "shared", "late"):
            logits = logits * (1 + self.mean.clone())
        with torch.no_grad():
            self.seen += self.kind == "late"
            if self.kind in ("own", "shared") or self.seen > 1:
                self.mean.lerp_(inputs.mean(), 0.5)
            if self.kind == "own":
                row = inputs.mean().reshape(1)
                self.history = row if self.history is None else torch.cat([self.history, row])[-5:]
            if self.kind in ("lengths", "cache"):
                self.table = torch.arange(3.0 + rank)
            if self.kind == "extra":
                self.seen += 1 + rank
            if self.kind == "alike":
                self.count += 1
        return logits


RECIPE = Recipe(
    "carry",
    Config,
    Carry,
    tiny.RECIPE.build_dataset,
    tiny.RECIPE.compute_loss,
    presets={"default": Config(**{field.name: getattr(tiny.BASE, field.name) for field in fields(tiny.BASE)})},
)

if __name__ == "__main__":
    main(RECIPE)
