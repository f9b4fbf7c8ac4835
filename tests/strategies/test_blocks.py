"""Repeated blocks: found, recomputed with the same random numbers, compiled, under the names they had."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distkit.config import ActivationCheckpointingConfig, TrainConfig
from distkit.errors import ConfigError
from distkit.models import resnet18
from distkit.strategies.blocks import chosen_blocks, recompute_activations_, repeated_blocks
from distkit.strategies.compiled import compile_


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 8))
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x + scale * self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.heads[0](x) + self.heads[1](x)


def test_blocks_are_found() -> None:
    model = Model()
    assert repeated_blocks(model) == list(model.blocks)
    assert repeated_blocks(nn.Linear(2, 2)) == []
    # residual blocks stand in several sequences
    stages = repeated_blocks(resnet18(10, width=8))
    assert len(stages) > 1
    assert len({type(stage) for stage in stages}) == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ActivationCheckpointingConfig(), []),
        (ActivationCheckpointingConfig(mode="full"), [0, 1, 2, 3]),
        (ActivationCheckpointingConfig(mode="every", every=2), [1, 3]),
        (ActivationCheckpointingConfig(mode="every", every=3), [2]),
        (ActivationCheckpointingConfig(mode="blocks", blocks=("Block",)), [0, 1, 2, 3]),
    ],
)
def test_choices(config: ActivationCheckpointingConfig, expected: list[int]) -> None:
    model = Model()
    assert chosen_blocks(model, config) == [model.blocks[i] for i in expected]
    recompute_activations_(model, config)
    model(torch.randn(3, 8)).sum().backward()
    assert [block.calls for block in model.blocks] == [2 if i in expected else 1 for i in range(4)]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (ActivationCheckpointingConfig(mode="blocks", blocks=("Blok",)), "--activation-checkpointing.blocks Block"),
        (ActivationCheckpointingConfig(mode="every", every=5), "at least 5"),
    ],
)
def test_what_is_not_there_is_named(config: ActivationCheckpointingConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        chosen_blocks(Model(), config)


def gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(7)
    model.zero_grad()
    x = torch.randn(5, 8, requires_grad=True)
    F.mse_loss(model(x), torch.ones(5, 2)).backward()
    assert x.grad is not None
    return [x.grad, torch.rand(3), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("mode", ["full", "nested"])
def test_dropout_draws_the_same_numbers_again(mode: str) -> None:
    model = Model()
    config = ActivationCheckpointingConfig(mode="full")
    if mode == "nested":
        config = ActivationCheckpointingConfig(mode="blocks", blocks=("Block", "Sequential", "Model"))
    names, expected = list(model.state_dict()), gradients(model)
    recompute_activations_(model, config)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients(model), expected, strict=True))
    assert list(model.state_dict()) == names
    before = model.blocks[0].calls
    with torch.no_grad():
        model(torch.randn(2, 8))
    assert model.blocks[0].calls == before + 1


def test_a_copy_recomputes_with_its_own_weights() -> None:
    model = Model()
    recompute_activations_(model, ActivationCheckpointingConfig(mode="full"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(torch.randn(2, 8)).any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("again", [False, True])
def test_compiled_blocks_keep_names_and_numbers(again: bool) -> None:
    model, config = Model().eval(), TrainConfig(num_steps=1, compile=True, compile_backend="eager")
    names, expected = list(model.state_dict()), gradients(model)
    if again:
        recompute_activations_(model, ActivationCheckpointingConfig(mode="full"))
    compile_(model, config, "blocks")
    for mine, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert list(model.state_dict()) == names


def test_a_model_without_blocks_cannot_be_compiled_by_block() -> None:
    for fix in ("--no-compile", "--compile-scope whole"):
        with pytest.raises(ConfigError, match=fix):
            compile_(nn.Linear(2, 2), TrainConfig(num_steps=1, compile=True), "blocks", fix=fix)
