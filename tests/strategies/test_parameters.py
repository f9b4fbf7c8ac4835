"""Parameters that a strategy cannot take are named, on every rank alike."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny_gpt
from support.harness import run_ranks
from support.strategy_runs import BASES, MISSING, ZERO
from torch import Tensor, nn

from distkit.assemble import assemble
from distkit.config import TrainConfig
from distkit.engine.train_step import train_step
from distkit.errors import ConfigError
from distkit.losses import LossOutput
from distkit.models import GPT
from distkit.runtime import read_topology
from distkit.runtime.process import start

SEVERAL = ("ddp", "fsdp", *(() if MISSING else ZERO))


class Idle(nn.Module):
    """A GPT beside a layer that the loss does not use, or a temperature without dimensions."""

    def __init__(self, gpt: GPT, scalar: bool) -> None:
        super().__init__()
        self.gpt = gpt
        if scalar:
            self.temperature = nn.Parameter(torch.tensor(1.0))
        else:
            self.unused = nn.Linear(3, 5)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.gpt(tokens, targets)[0]
        return loss * self.temperature if hasattr(self, "temperature") else loss


def refusals(folder: str, configs: dict[str, TrainConfig], scalar: bool) -> dict[str, str]:
    """NAME -> the ConfigError of a run of three steps, or ""."""
    recipe = replace(
        tiny_gpt.RECIPE,
        build_model=lambda config: Idle(tiny_gpt.build_model(config), scalar),
        compute_loss=lambda config, model, batch: LossOutput(model(*batch)),
    )
    runtime = start(next(iter(configs.values())), read_topology(os.environ))
    found = dict.fromkeys(configs, "")
    for name, config in configs.items():
        try:
            run = assemble(recipe, replace(config, run_dir=Path(folder) / name), runtime)  # type: ignore[arg-type, type-var]
            for _ in range(3):
                train_step(run)
        except ConfigError as error:
            found[name] = str(error)
    runtime.close()
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_a_parameter_without_a_gradient_is_named_where_it_matters(tmp_path: Path) -> None:
    base = replace(BASES["gpt"], microbatch_size=2)
    configs = {name: replace(base, strategy=name) for name in SEVERAL}  # type: ignore[arg-type]
    for found in run_ranks(refusals, 2, str(tmp_path), configs, False, timeout=240):
        assert found.pop("fsdp") == ""
        for name, message in found.items():
            assert "does not depend on unused.weight, unused.bias" in message, name
            assert f"--strategy {name}" in message


@pytest.mark.distributed
def test_a_parameter_without_dimensions_is_named_where_it_cannot_be_cut(tmp_path: Path) -> None:
    configs = {name: replace(BASES["gpt"], strategy=name) for name in SEVERAL}  # type: ignore[arg-type]
    for found in run_ranks(refusals, 2, str(tmp_path), configs, True):
        assert found.pop("ddp") == ""
        for name, message in found.items():
            assert f"--strategy {name} cannot cut parameter temperature" in message
