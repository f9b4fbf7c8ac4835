"""The moving average of weights."""

import pytest
import torch
from torch import nn

from distkit.ema import Ema


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_average_follows_the_formula_with_its_warmup() -> None:
    net = model()
    ema = Ema(net, 0.5)
    expected = net[0].weight.detach().clone()  # type: ignore[index,union-attr]
    for step in range(20):
        with torch.no_grad():
            net[0].weight.add_(0.1)  # type: ignore[index,union-attr,operator]
        ema.update_(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()  # type: ignore[index,union-attr]
    torch.testing.assert_close(ema.shadow["0.weight"], expected)


def test_applied_swaps_and_swaps_back_to_the_bit() -> None:
    net = model()
    ema = Ema(net, 0.9)
    ema.update_(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with ema.applied():
        assert torch.equal(net[0].weight, ema.shadow["0.weight"])  # type: ignore[index,arg-type]
    with pytest.raises(ZeroDivisionError), ema.applied():
        1 / 0  # noqa: B018
    assert all(torch.equal(own[name], tensor) for name, tensor in net.state_dict().items())


def test_counters_are_not_averaged_and_running_statistics_are() -> None:
    ema = Ema(model(), 0.9)
    assert "1.num_batches_tracked" not in ema.shadow
    assert "1.running_mean" in ema.shadow


def test_state_round_trip() -> None:
    first, second = Ema(model(), 0.9), Ema(model(), 0.9)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(first.shadow[name], second.shadow[name]) for name in first.shadow)
    with pytest.raises(KeyError, match="extra"):
        second.load_state_dict({**first.state_dict(), "extra": torch.ones(1)})


def test_an_update_that_is_left_out_moves_nothing() -> None:
    net = model()
    ema, other = Ema(net, 0.9), Ema(net, 0.9)
    for step in range(3):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1)
        ema.update_(step)
        other.update_(step, torch.tensor(False))
    assert all(torch.equal(ema.shadow[name], tensor) for name, tensor in other.shadow.items())
    with torch.no_grad():
        net[0].weight.fill_(float("nan"))  # type: ignore[index,union-attr,operator]
    other.update_(3, torch.tensor(True))
    assert all(torch.equal(ema.shadow[name], tensor) for name, tensor in other.shadow.items())
