import pytest
import torch
from torch.nn import functional as F

from distkit.errors import ConfigError, DataError
from distkit.models import FastNet, whitening_init_


def smooth_images(n: int) -> torch.Tensor:
    """Correlated pixels, as natural images have."""
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.randn(n, 3, 8, 8, generator=generator), size=32, mode="bilinear") + 0.3


def test_whitened_outputs_are_uncorrelated_with_unit_second_moment() -> None:
    model, images = FastNet(widths=(8, 8, 8)), smooth_images(600)
    whitening_init_(model, images, eps=1e-8)
    outputs = model.whiten(images)[:, :12].transpose(0, 1).flatten(1).double()
    moment = outputs @ outputs.T / outputs.shape[1]
    torch.testing.assert_close(moment, torch.eye(12, dtype=torch.float64), rtol=0, atol=2e-3)


def test_second_half_is_the_negative_and_the_sign_is_fixed() -> None:
    model = FastNet(widths=(8, 8, 8))
    whitening_init_(model, smooth_images(20))
    weight = model.whiten.weight.detach()
    assert torch.equal(weight[12:], -weight[:12])
    flat = weight[:12].flatten(1)
    assert (flat.gather(1, flat.abs().argmax(1, keepdim=True)) > 0).all()
    assert model.whiten.bias.abs().max() == 0
    again = FastNet(widths=(8, 8, 8))
    whitening_init_(again, smooth_images(20))
    assert torch.equal(weight, again.whiten.weight)


def test_chunks_of_images_add_up() -> None:
    images = smooth_images(520)
    one, two = FastNet(widths=(8, 8, 8)), FastNet(widths=(8, 8, 8))
    whitening_init_(one, images)
    whitening_init_(two, torch.cat((images, images)))
    torch.testing.assert_close(one.whiten.weight, two.whiten.weight)


def test_what_is_frozen_and_how_large_it_is() -> None:
    model = FastNet()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen[0] == "whiten.weight"
    assert len(frozen) == 7
    assert all("weight" in name for name in frozen)
    assert sum(p.numel() for p in model.parameters()) == 1_972_792
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_few_steps_fit_a_batch() -> None:
    torch.manual_seed(0)
    model, images, labels = FastNet(widths=(16, 32, 32)), smooth_images(64), torch.arange(64) % 10
    whitening_init_(model, images)
    frozen = model.whiten.weight.detach().clone()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.85, nesterov=True)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 2.2 < losses[0] < 2.4
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.whiten.weight, frozen)


def test_bad_input_says_what_fits() -> None:
    model = FastNet(widths=(8, 8, 8))
    with pytest.raises(DataError, match="uint8"):
        whitening_init_(model, torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(DataError, match="N >= 1"):
        whitening_init_(model, torch.zeros(0, 3, 32, 32))
    with pytest.raises(DataError, match="NaN"):
        whitening_init_(model, torch.full((4, 3, 32, 32), float("nan")))
    with pytest.raises(ConfigError, match="three numbers"):
        FastNet(widths=(64, 256))
