"""The tiny recipe with a token in its configuration; with SPOILED its loss quotes it in an error, as libraries do."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

from support import tiny
from torch import Tensor, nn

from distkit import Secret, main
from distkit.losses import LossOutput
from distkit.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class SecretiveConfig(tiny.TinyConfig):
    """The tiny recipe's, and a token."""

    hub_token: Secret | None = None
    """Token of the hub."""


def compute_loss(config: SecretiveConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
    assert config.hub_token is not None
    token = config.hub_token.reveal()
    if os.environ.get("SPOILED") == "1" and config.run_dir is not None and (config.run_dir / "status.json").exists():
        raise RuntimeError(f"401 Unauthorized: token {token}")
    return tiny.compute_loss(config, model, batch)


BASE = SecretiveConfig(**{f.name: getattr(tiny.BASE, f.name) for f in fields(tiny.BASE)})
RECIPE = Recipe("secretive", SecretiveConfig, tiny.build_model, tiny.build_dataset, compute_loss,
                presets={"default": BASE}, best=("correct", "max"))  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
