"""Parameters that a strategy cannot take are named, on every rank alike."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny, tiny_gpt
from support.harness import run_ranks
from support.strategy_runs import BASES, MISSING, ZERO
from torch import Tensor, nn

from distkit.assemble import assemble
from distkit.config import AdamW, Constant, TrainConfig
from distkit.engine.train_step import train_step
from distkit.errors import ConfigError
from distkit.losses import LossOutput
from distkit.models import GPT
from distkit.runtime import read_topology
from distkit.runtime.process import start
from distkit.tensors.shards import whole

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


class Odd(nn.Module):
    """A classifier whose parameters are of one odd kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(tiny.FEATURES, 8), nn.Linear(8, tiny.CLASSES)
        self.extra = nn.Parameter(torch.rand(8, 8) * 0.3)
        if kind == "bf16":
            self.last.to(torch.bfloat16)
        elif kind == "float64":
            self.last.to(torch.float64)
        elif kind == "complex":
            self.extra = nn.Parameter(torch.rand(8, 8, dtype=torch.complex64) * 0.3)
        elif kind == "transposed":
            self.extra = nn.Parameter(torch.rand(8, 8).t() * 0.3)
        elif kind == "channels last":
            self.conv = nn.Conv2d(2, 2, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif kind == "integers":
            self.extra = nn.Parameter(torch.arange(64).reshape(8, 8) % 3, requires_grad=False)
        elif kind == "empty":
            self.nothing = nn.Parameter(torch.empty(0, 8))
        elif kind == "lazy":
            self.lazy = nn.LazyLinear(8)
        elif kind == "meta":
            self.extra = nn.Parameter(torch.empty(8, 8, device="meta"))
        elif kind == "expanded":
            self.extra = nn.Parameter(torch.rand(1, 8).expand(8, 8))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).tanh()
        hidden = hidden + self.nothing.sum(0) if self.kind == "empty" else hidden
        if self.kind == "channels last":
            hidden = hidden + self.conv(hidden.reshape(-1, 2, 2, 2)).reshape(-1, 8)
        kind = torch.complex64 if self.kind == "complex" else torch.float32
        mixed = hidden.to(kind) @ self.extra.to(kind)
        mixed = torch.view_as_real(mixed).sum(-1) if mixed.is_complex() else mixed
        logits: Tensor = self.last(mixed.to(self.last.weight.dtype)).float()
        return logits


#: Under every strategy.
NEVER = {
    "lazy": "lazy.weight has no shape yet",
    "meta": "extra is on the meta device",
    "expanded": "extra is expanded",
}
CUT = {"empty": "cannot cut parameter nothing, which has no element"}
OF_ONE_DTYPE = dict.fromkeys(("bf16", "float64", "complex"), "takes parameters of one dtype")
REFUSED = {
    "single": NEVER,
    "ddp": NEVER,
    "fsdp": NEVER | CUT,
    "zero1": NEVER | CUT | OF_ONE_DTYPE,
    "zero3": NEVER | CUT | OF_ONE_DTYPE | {"integers": "torch.int64 for extra"},
}
KINDS = ("bf16", "float64", "complex", "transposed", "channels last", "integers", *CUT, *NEVER)


def train_odd(folder: str, strategy: str, changes: dict[str, float]) -> dict[str, str | dict[str, Tensor]]:
    """Kind -> the weights after five steps, or the refusal."""
    base = replace(tiny.BASE, strategy=strategy, num_steps=5, optim=AdamW(lr=0.01), schedule=Constant(), **changes)  # type: ignore[arg-type]
    runtime = start(base, read_topology(os.environ))
    found: dict[str, str | dict[str, Tensor]] = {}
    for kind in KINDS:
        recipe = replace(tiny.RECIPE, build_model=lambda _, kind=kind: Odd(kind))
        try:
            run = assemble(recipe, replace(base, run_dir=Path(folder) / kind), runtime)
            for _ in range(5):
                train_step(run)
            found[kind] = {name: whole(t.detach()).clone() for name, t in run.strategy.model_tensors().items()}
        except ConfigError as error:
            found[kind] = str(error)
    runtime.close()
    return found


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"max_grad_norm": 0.1}, {"max_grad_value": 0.01}], ids=["plain", "norm", "value"]
)
def test_odd_parameters_are_trained_as_by_one_process_or_named(changes: dict[str, float], tmp_path: Path) -> None:
    (alone,) = run_ranks(train_odd, 1, str(tmp_path / "single"), "single", changes)
    strategies = ["single", "ddp", "fsdp", *(() if MISSING else ("zero1", "zero3"))]
    for strategy in strategies:
        folder = str(tmp_path / strategy)
        first = alone if strategy == "single" else run_ranks(train_odd, 2, folder, strategy, changes)[0]
        for kind, found in first.items():
            where, words = f"{strategy} {kind}", REFUSED[strategy].get(kind)
            assert isinstance(found, str) == (words is not None), f"{where}: {found}"
            if words is not None:
                assert words in found, where
                continue
            for name, expected in alone[kind].items():
                tolerance = 2e-3 if kind == "bf16" else 1e-6
                assert torch.allclose(found[name], expected, rtol=0, atol=tolerance), f"{where} {name}"


@pytest.mark.distributed
def test_a_parameter_without_dimensions_is_named_where_it_cannot_be_cut(tmp_path: Path) -> None:
    configs = {name: replace(BASES["gpt"], strategy=name) for name in SEVERAL}  # type: ignore[arg-type]
    for found in run_ranks(refusals, 2, str(tmp_path), configs, True):
        assert found.pop("ddp") == ""
        for name, message in found.items():
            assert f"--strategy {name} cannot cut parameter temperature" in message
