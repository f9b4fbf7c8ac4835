import math

import pytest
import torch
from torch import nn

from distkit.errors import ConfigError
from distkit.models import (
    dirac_init_,
    kaiming_init_,
    resnet_cifar,
    trunc_normal_init_,
    xavier_init_,
    zero_init_residual_,
)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(256, 512))


def test_kaiming_variance_is_two_over_fan(model: nn.Sequential) -> None:
    kaiming_init_(model)
    assert model[0].weight.var().item() == pytest.approx(2 / (32 * 9), rel=0.05)
    assert model[3].weight.var().item() == pytest.approx(2 / 256, rel=0.05)
    kaiming_init_(model, mode="fan_out")
    assert model[0].weight.var().item() == pytest.approx(2 / (64 * 9), rel=0.05)
    assert model[0].bias.abs().max() == 0
    assert (model[1].weight == 1).all()


def test_kaiming_keeps_the_scale_through_a_deep_relu_network() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(20) for layer in (nn.Linear(256, 256), nn.ReLU())]
    deep = nn.Sequential(*layers)
    kaiming_init_(deep)
    assert 0.3 < deep(torch.randn(64, 256)).square().mean().item() < 3


def test_xavier_is_uniform_with_its_variance(model: nn.Sequential) -> None:
    xavier_init_(model)
    weight = model[3].weight
    assert weight.var().item() == pytest.approx(2 / (256 + 512), rel=0.05)
    assert weight.abs().max().item() <= math.sqrt(6 / (256 + 512))
    assert model[3].bias.abs().max() == 0


def test_trunc_normal_cuts_at_two_standard_deviations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64))
    trunc_normal_init_(model, std=0.1)
    for layer in model:
        assert layer.weight.abs().max().item() <= 0.2
        assert 0.08 < layer.weight.std().item() < 0.1
    assert model[1].bias.abs().max() == 0
    with pytest.raises(ConfigError, match="> 0"):
        trunc_normal_init_(model, std=0)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_zero_init_residual_makes_every_block_its_shortcut(norm: str) -> None:
    model = resnet_cifar(14, norm=norm)
    zero_init_residual_(model)
    model.eval()
    block = model.stages[0][0]
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x), x)
    x = torch.rand(2, 32, 8, 8)
    down = model.stages[2][0]
    assert torch.equal(down(x)[:, :32], x[:, :, ::2, ::2])
    assert down(x)[:, 32:].abs().max() == 0


def test_zero_init_residual_refuses_a_model_without_blocks(model: nn.Sequential) -> None:
    with pytest.raises(ConfigError, match="branch_end"):
        zero_init_residual_(model)


def test_dirac_passes_channels_on_and_keeps_the_other_filters() -> None:
    wide, narrow = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.Conv2d(4, 2, 3, padding=1, bias=False)
    before = wide.weight.detach().clone()
    dirac_init_(nn.ModuleList([wide, narrow]))
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(wide(x)[:, :4], x)
    assert torch.equal(wide.weight[4:], before[4:])
    assert torch.equal(narrow(x), x[:, :2])
    assert wide.weight.requires_grad
