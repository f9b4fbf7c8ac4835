from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distkit.errors import ConfigError
from distkit.losses import (
    LossOutput,
    chunked_cross_entropy,
    dice_loss,
    focal_loss,
    jaccard_loss,
    mixup_cross_entropy,
    token_cross_entropy,
    tversky_loss,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_loss_output_has_its_own_empty_sums() -> None:
    one, two = LossOutput(torch.zeros(())), LossOutput(torch.zeros(()))
    assert one.sums == {}
    assert one.sums is not two.sums
    assert one.weight is None
    with pytest.raises(AttributeError):
        one.loss = torch.ones(())  # type: ignore[misc]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("per_sample", [True, False])
def test_mixup_equals_cross_entropy_with_soft_labels(label_smoothing: float, per_sample: bool) -> None:
    logits, labels, others = doubles(6, 5), torch.randint(5, (6,)), torch.randint(5, (6,))
    share = torch.rand(6, dtype=torch.float64) if per_sample else torch.tensor(0.3, dtype=torch.float64)
    part = share.expand(6)[:, None]
    soft = part * F.one_hot(labels, 5) + (1 - part) * F.one_hot(others, 5)
    expected = F.cross_entropy(logits, soft, label_smoothing=label_smoothing)
    torch.testing.assert_close(mixup_cross_entropy(logits, labels, others, share, label_smoothing), expected)
    assert torch.autograd.gradcheck(lambda x: mixup_cross_entropy(x, labels, others, share, label_smoothing), logits)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_token_cross_entropy_means_over_the_tokens_that_count(label_smoothing: float) -> None:
    logits, labels = doubles(3, 4, 7), torch.randint(7, (3, 4))
    labels[0, 1:] = -100
    labels[2, 3] = -100
    loss, weight = token_cross_entropy(logits, labels, label_smoothing=label_smoothing)
    keep = labels != -100
    expected = F.cross_entropy(logits[keep], labels[keep], label_smoothing=label_smoothing)
    torch.testing.assert_close(loss, expected)
    assert weight.dtype == torch.int64
    assert weight.item() == 8
    assert torch.autograd.gradcheck(lambda x: token_cross_entropy(x, labels, -100, label_smoothing)[0], logits)


def test_token_cross_entropy_recombines_over_microbatches() -> None:
    logits, labels = doubles(4, 5, 7), torch.randint(7, (4, 5))
    labels[0] = -100
    labels[1, 2:] = -100
    whole, total = token_cross_entropy(logits, labels)
    parts = [token_cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(sum(loss * weight for loss, weight in parts) / total, whole)
    assert parts[0][0].item() == 0
    parts[0][0].backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5, 12])
def test_chunked_cross_entropy_is_that_of_all_logits(chunk_tokens: int | None) -> None:
    hidden, weight, labels = doubles(3, 4, 6), doubles(11, 6), torch.randint(11, (3, 4))
    labels[0, 1:] = -100
    labels[2, 3] = -100
    loss, count = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    expected, expected_count = token_cross_entropy(F.linear(hidden, weight), labels)
    torch.testing.assert_close(loss, expected)
    assert count.item() == expected_count.item() == 8
    torch.testing.assert_close(
        torch.autograd.grad(3 * loss, (hidden, weight)), torch.autograd.grad(3 * expected, (hidden, weight))
    )
    assert torch.autograd.gradcheck(
        lambda *leaves: chunked_cross_entropy(*leaves, labels, chunk_tokens=chunk_tokens)[0], (hidden, weight)
    )
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, weight, labels)[0], expected)


def test_chunked_cross_entropy_in_float32_and_under_autocast() -> None:
    hidden, weight = torch.randn(64, 32, requires_grad=True), (0.3 * torch.randn(200, 32)).requires_grad_()
    labels = torch.randint(200, (64,))
    expected = F.cross_entropy(F.linear(hidden.double(), weight.double()), labels)
    exact = torch.autograd.grad(expected, (hidden, weight))
    loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=10)
    torch.testing.assert_close(loss, expected.float())
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=10)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, expected.float(), rtol=1e-2, atol=0)
    for gradient, right in zip(torch.autograd.grad(rough, (hidden, weight)), exact, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - right).norm() < 0.01 * right.norm()


def test_chunked_cross_entropy_of_padding_alone_is_zero() -> None:
    hidden, weight = doubles(4, 6), doubles(5, 6)
    loss, count = chunked_cross_entropy(hidden, weight, torch.full((4,), 7), ignore_index=7, chunk_tokens=3)
    assert (loss.item(), count.item()) == (0, 0)
    assert all(not g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_chunked_cross_entropy_needs_no_gradient_of_either() -> None:
    hidden, weight, labels = doubles(6, 4), doubles(5, 4), torch.randint(5, (6,))
    for leaves, leaf in (((hidden.detach(), weight), weight), ((hidden, weight.detach()), hidden)):
        expected = torch.autograd.grad(F.cross_entropy(F.linear(*leaves), labels), leaf)
        torch.testing.assert_close(torch.autograd.grad(chunked_cross_entropy(*leaves, labels)[0], leaf), expected)


class Recorder(TorchDispatchMode):
    """Elements of the largest tensor that an operator gives, and which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_chunked_cross_entropy_never_holds_all_logits_and_never_waits() -> None:
    tokens, classes, dim = 512, 300, 8
    hidden, weight = torch.randn(tokens, dim, requires_grad=True), torch.randn(classes, dim, requires_grad=True)
    labels = torch.randint(classes, (tokens,))
    with Recorder() as whole:
        token_cross_entropy(F.linear(hidden, weight), labels)[0].backward()
    with Recorder() as chunked:
        chunked_cross_entropy(hidden, weight, labels, chunk_tokens=32)[0].backward()
    assert whole.largest == tokens * classes
    assert chunked.largest == 32 * classes
    assert not [name for name in chunked.names if "item" in name or "local_scalar" in name or "nonzero" in name]


def test_dice_matches_a_plain_loop() -> None:
    logits, targets = doubles(3, 4, 5), torch.rand(3, 4, 5) > 0.6
    values = []
    for x, t in zip(logits, targets, strict=True):
        p = 1 / (1 + torch.exp(-x))
        values.append(1 - (2 * p[t].sum() + 1) / (p.sum() + t.sum() + 1))
    torch.testing.assert_close(dice_loss(logits, targets), torch.stack(values).mean())
    assert torch.autograd.gradcheck(lambda x: dice_loss(x, targets), logits)


def test_dice_is_zero_when_right_and_for_an_empty_target() -> None:
    target = torch.zeros(2, 8, dtype=torch.bool)
    target[0, :4] = True
    assert dice_loss(torch.where(target, 50.0, -50.0), target).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(torch.where(target, -50.0, 50.0), target).item() > 0.8


OVERLAPS = {dice_loss: lambda tp, fp, fn: (2 * tp + 1) / (2 * tp + fp + fn + 1),
            jaccard_loss: lambda tp, fp, fn: (tp + 1) / (tp + fp + fn + 1),
            tversky_loss: lambda tp, fp, fn: (tp + 1) / (tp + 0.3 * fp + 0.7 * fn + 1)}  # fmt: skip


@pytest.mark.parametrize("loss", OVERLAPS, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("ignore_index", [None, 255])
def test_overlap_of_classes_matches_a_plain_loop(loss: Callable[..., Tensor], ignore_index: int | None) -> None:
    logits, labels = doubles(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    if ignore_index is not None:
        labels[:, 1] = ignore_index
    values = []
    for x, row in zip(logits, labels, strict=True):
        p = x.exp() / x.exp().sum(0)
        for c in range(3):
            counts = torch.ones_like(p[c]) if ignore_index is None else (row != ignore_index).double()
            t = (row == c).double()
            tp, fp, fn = ((a * b * counts).sum() for a, b in ((p[c], t), (p[c], 1 - t), (1 - p[c], t)))
            values.append(1 - OVERLAPS[loss](tp, fp, fn))
    torch.testing.assert_close(loss(logits, labels, ignore_index=ignore_index), torch.stack(values).mean())
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, ignore_index=ignore_index), logits)


def test_overlap_of_batches_is_that_of_their_samples() -> None:
    logits, labels = doubles(6, 3, 8), torch.randint(3, (6, 8))
    parts = torch.stack([dice_loss(logits[i : i + 2], labels[i : i + 2]) for i in range(0, 6, 2)])
    torch.testing.assert_close(dice_loss(logits, labels), parts.mean())
    half = dice_loss(logits.detach().bfloat16(), labels)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), dice_loss(logits, labels).detach(), atol=1e-2, rtol=0)


def test_focal_matches_the_equation() -> None:
    logits, targets = doubles(3, 4), (torch.rand(3, 4) > 0.5).to(torch.int64)
    p = torch.sigmoid(logits)
    p_t = torch.where(targets == 1, p, 1 - p)
    alpha_t = torch.where(targets == 1, 0.25, 0.75)
    expected = (-alpha_t * (1 - p_t) ** 2 * p_t.log()).mean()
    torch.testing.assert_close(focal_loss(logits, targets), expected)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, targets), logits)


def test_focal_without_focus_is_half_the_binary_cross_entropy() -> None:
    logits, targets = doubles(3, 4), (torch.rand(3, 4) > 0.5).double()
    expected = 0.5 * F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(focal_loss(logits, targets, alpha=0.5, gamma=0), expected)


def test_focal_is_finite_far_out() -> None:
    logits = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0, 0, 1, 1]), gamma=0.5)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_half_precision_logits_are_widened() -> None:
    logits = torch.randn(4, 6).bfloat16()
    labels, masks = torch.randint(6, (4,)), torch.rand(4, 6) > 0.5
    assert token_cross_entropy(logits, labels)[0].dtype == torch.float32
    assert mixup_cross_entropy(logits, labels, labels, torch.tensor(0.5)).dtype == torch.float32
    assert dice_loss(logits, masks).dtype == torch.float32
    assert focal_loss(logits, masks).dtype == torch.float32


def test_shapes_and_ranges_are_checked() -> None:
    logits, labels = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ConfigError, match="shapes"):
        token_cross_entropy(logits, labels[:3])
    with pytest.raises(ConfigError, match="shapes"):
        chunked_cross_entropy(logits, torch.randn(9, 5), labels)
    with pytest.raises(ConfigError, match="chunk_tokens"):
        chunked_cross_entropy(logits, logits, labels, chunk_tokens=0)
    with pytest.raises(ConfigError, match="label_smoothing"):
        token_cross_entropy(logits, labels, label_smoothing=2)
    with pytest.raises(ConfigError, match="shapes"):
        mixup_cross_entropy(logits, labels, labels, torch.rand(3))
    with pytest.raises(ConfigError, match="shape"):
        dice_loss(logits, torch.zeros(4, 5))
    with pytest.raises(ConfigError, match="smooth"):
        dice_loss(logits, logits, smooth=0)
    with pytest.raises(ConfigError, match="or classes"):
        jaccard_loss(logits, labels.float())
    with pytest.raises(ConfigError, match="alpha >= 0"):
        tversky_loss(logits, logits, alpha=-1)
    with pytest.raises(ConfigError, match="gamma"):
        focal_loss(logits, logits, gamma=-1)


# torch 2.11 makes one when it compiles `apply`
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_chunked_gradients_are_the_same_compiled() -> None:
    torch._dynamo.reset()
    targets = torch.arange(24).view(2, 12) % 7
    found = []
    for function in (chunked_cross_entropy, torch.compile(chunked_cross_entropy, backend="eager", fullgraph=True)):
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((2, 12, 5), (7, 5)))
        loss, _ = function(hidden, weight, targets, chunk_tokens=10)
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    assert all(part.abs().sum() > 0 for part in found[0])
    torch.testing.assert_close(found[1], found[0])
