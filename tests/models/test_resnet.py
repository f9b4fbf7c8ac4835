import pytest
import torch
from torch import nn

from distkit.errors import ConfigError
from distkit.models import ResNet, Stage, resnet18, resnet_cifar


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_resnet18_has_the_published_size() -> None:
    assert num_parameters(resnet18()) == 11_173_962
    assert num_parameters(resnet18(num_classes=100)) == 11_173_962 + 90 * 513


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnet_cifar_has_the_sizes_of_table_6(depth: int, millions: float) -> None:
    digits = 1 if depth == 110 else 2
    assert round(num_parameters(resnet_cifar(depth)) / 1e6, digits) == millions


def test_depth_counts_the_layers_with_weights() -> None:
    for depth in (8, 14, 20):
        layers = [m for m in resnet_cifar(depth).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == depth


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_shapes_and_gradients(norm: str) -> None:
    model = resnet_cifar(8, num_classes=7, norm=norm)
    features = model.stages(model.stem(torch.randn(2, 3, 32, 32)))
    assert features.shape == (2, 64, 8, 8)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_resnet18_halves_three_times() -> None:
    model = resnet18(width=8)
    assert model.stages(model.stem(torch.randn(1, 3, 32, 32))).shape == (1, 64, 4, 4)


def test_without_norm_no_buffers_and_a_sample_is_independent_of_its_batch() -> None:
    model = resnet_cifar(8, norm="none").double()
    assert not list(model.buffers())
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(images)[:2], model(images[:2]), rtol=1e-12, atol=1e-12)


def test_without_norm_the_output_stays_bounded_with_depth() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        scales = [resnet_cifar(depth, norm="none")(images).std().item() for depth in (8, 110)]
    assert all(0.01 < scale < 3 for scale in scales)


def test_group_norm_holds_sixteen_channels() -> None:
    norm = resnet_cifar(8, norm="group").stages[2][0].norm1
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == 4


def test_bad_input_says_what_to_type() -> None:
    with pytest.raises(ConfigError, match="20"):
        resnet_cifar(18)
    with pytest.raises(ConfigError, match='norm="batch"'):
        resnet_cifar(8, norm="batchnorm")
    with pytest.raises(ConfigError, match="width=32"):
        resnet_cifar(8, width=20, norm="group")
    narrowing = [Stage(num_blocks=1, channels=8, stride=1), Stage(num_blocks=1, channels=4, stride=2)]
    with pytest.raises(ConfigError, match="project"):
        ResNet(narrowing, shortcut="pad")
    assert ResNet(narrowing)(torch.randn(1, 3, 8, 8)).shape == (1, 10)


def test_channels_last_computes_the_same() -> None:
    torch.manual_seed(0)
    model = resnet_cifar(8).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    got = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
