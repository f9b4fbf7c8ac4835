"""The recipe of `support.tiny`, slowed down, so that something can happen in the middle of a run."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from support import tiny
from torch import Tensor, nn

from distkit.config import CheckpointConfig
from distkit.entry import main
from distkit.losses import LossOutput
from distkit.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Config(tiny.TinyConfig):
    """A two-layer network that takes its time."""

    pause_seconds: float = 0.0
    """Added to each step."""


def compute_loss(config: Config, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
    if model.training:
        time.sleep(config.pause_seconds)
    output, indices = tiny.compute_loss(config, model, batch), batch["indices"].double()
    # which samples a global batch has, however it is split: the first moments of their indices
    return replace(output, sums={**output.sums, "indices": indices.sum(), "squares": indices.square().sum()})


TINY = Config(**{name: getattr(tiny.BASE, name) for name in tiny.BASE.__dataclass_fields__})
BASE = replace(TINY, checkpoint=CheckpointConfig(save_every=5, asynchronous="off"), report_every=1, dropout=0.1,
               noise=0.1)  # fmt: skip
RECIPE = Recipe("paced", Config, tiny.build_model, tiny.build_dataset, compute_loss, presets={"default": BASE})

if __name__ == "__main__":
    main(RECIPE)
