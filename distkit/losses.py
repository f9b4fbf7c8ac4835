"""What a recipe's `compute_loss` returns, and the losses that torch does not have.

For plain and label-smoothed cross entropy, over class indices or soft labels, and for binary cross entropy, call
torch.nn.functional.cross_entropy and binary_cross_entropy_with_logits. Every loss here runs in float32 at least and
never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from distkit.data.batch import Batch
from distkit.errors import ConfigError

#: Logits that chunked_cross_entropy makes at a time: 512 MiB in float32.
CHUNK_LOGITS = 1 << 27


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The result of `compute_loss` on one microbatch."""

    loss: Tensor
    """0-dim, differentiable: the mean over the samples of this microbatch, or over `weight` where that is set."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Name -> 0-dim tensor, already summed over the samples (`{"correct": ...}`), without gradient; reported as
    sum / samples, over all ranks and microbatches. Of any shape (a confusion matrix) where `Recipe.compute_metrics`
    makes numbers of them."""
    weight: Tensor | None = None
    """0-dim, without gradient: what `loss` is the mean over where that is not samples, such as the number of tokens.
    The engine divides by the sum of the weights of the whole global batch (C2). None: the number of samples."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """Name -> 0-dim tensor, the mean over the samples of this microbatch, without gradient; reported as the mean over
    all samples, of all ranks and microbatches."""


#: A recipe's `compute_loss` with its config given: (model, batch) -> the loss of this microbatch.
ComputeLoss = Callable[[nn.Module, Batch], LossOutput]


def mixup_cross_entropy(
    logits: Tensor, labels: Tensor, other_labels: Tensor, share: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy against share * one_hot(labels) + (1 - share) * one_hot(other_labels), mean over samples.

    Equal to torch's cross_entropy with those soft labels, without making them.
    Source: Zhang et al. 2018 (mixup), arXiv:1710.09412; smoothing as in torch.nn.functional.cross_entropy.

    Args:
        logits: [B, C] float.
        labels: [B] int64, of the image itself.
        other_labels: [B] int64, of the image mixed in.
        share: [B] or 0-dim float in [0, 1], the part of the image itself (for CutMix: its part of the pixels).
        label_smoothing: the part of the target spread evenly over all classes, in [0, 1].

    Returns:
        0-dim float32, or float64 for float64 logits.

    Raises:
        ConfigError: shapes do not fit, or label_smoothing is out of range.
    """
    _require_smoothing(label_smoothing)
    batch = logits.shape[:1]
    if logits.ndim != 2 or labels.shape != batch or other_labels.shape != batch or share.shape not in ((), batch):
        got = ", ".join(str(list(t.shape)) for t in (logits, labels, other_labels, share))
        raise ConfigError("mixup_cross_entropy: shapes do not fit", expected="[B, C], [B], [B], [B] or []", got=got)
    log_p = F.log_softmax(_widen(logits), dim=1)
    own = log_p.gather(1, labels[:, None]).squeeze(1)
    other = log_p.gather(1, other_labels[:, None]).squeeze(1)
    hard = -torch.lerp(other, own, share.to(log_p.dtype)).mean()
    if label_smoothing == 0:
        return hard
    return (1 - label_smoothing) * hard - label_smoothing * log_p.mean()


def token_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross entropy over tokens, and the weight that makes its global mean right: LossOutput(loss, weight=weight).

    Args:
        logits: [..., V] float.
        labels: [...] int64; tokens equal to `ignore_index` count neither in the sum nor in the weight.
        ignore_index: label of padding.
        label_smoothing: as in torch.nn.functional.cross_entropy, in [0, 1].

    Returns:
        loss: 0-dim float32 (float64 for float64 logits), mean over the tokens that count; 0, not NaN, when none does.
        weight: 0-dim int64, the number of tokens that count.

    Raises:
        ConfigError: shapes do not fit, or label_smoothing is out of range.
    """
    _require_smoothing(label_smoothing)
    if logits.shape[:-1] != labels.shape:
        got = f"{list(logits.shape)}, {list(labels.shape)}"
        raise ConfigError("token_cross_entropy: shapes do not fit", expected="[..., V], [...]", got=got)
    total = F.cross_entropy(
        _widen(logits.flatten(0, -2)),
        labels.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    weight = (labels != ignore_index).sum()
    return total / weight.clamp_min(1), weight


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """token_cross_entropy(hidden @ weight.T, targets), without ever holding the logits of more than one chunk.

    The gradients are computed with the loss, chunk by chunk, so that nothing is computed twice and backward needs
    neither logits nor `weight`. Products run in autocast's dtype where that is on, the softmax in float32 at least.
    Source: the idea is that of Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989, section 3.2.

    Args:
        hidden: [..., D] float.
        weight: [V, D] float, of a head without bias.
        targets: [...] int64; tokens equal to `ignore_index` count neither in the sum nor in the weight.
        ignore_index: label of padding.
        chunk_tokens: most tokens in a chunk, >= 1; None: as many as have CHUNK_LOGITS logits.

    Returns:
        As token_cross_entropy: loss, 0-dim, and weight, 0-dim int64. The loss can be differentiated once.

    Raises:
        ConfigError: shapes do not fit, or chunk_tokens is out of range.
    """
    if hidden.shape[:-1] != targets.shape or weight.shape[1:] != hidden.shape[-1:]:
        got = f"{list(hidden.shape)}, {list(weight.shape)}, {list(targets.shape)}"
        raise ConfigError("chunked_cross_entropy: shapes do not fit", expected="[..., D], [V, D], [...]", got=got)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError("chunk_tokens has an invalid value", expected=">= 1", got=chunk_tokens, fix="1024")
    most = chunk_tokens or max(1, CHUNK_LOGITS // weight.shape[0])
    num_chunks = max(1, math.ceil(targets.numel() / most))
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    flat = hidden.flatten(0, -2).to(dtype), weight.to(dtype), targets.flatten()
    total = _ChunkedCrossEntropy.apply(*flat, ignore_index, math.ceil(targets.numel() / num_chunks))
    count = (targets != ignore_index).sum()
    return total / count.clamp_min(1), count


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden [N, D], weight [V, D], targets [N] -> the sum of the cross entropies, 0-dim."""

    @staticmethod
    def forward(
        ctx: torch.autograd.Function, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int
    ) -> Tensor:
        differentiate = any(ctx.needs_input_grad)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if differentiate else hidden
        weight_gradient = torch.zeros_like(weight, dtype=wide) if differentiate else weight
        classes = torch.arange(weight.shape[0], device=hidden.device)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            log_p = F.log_softmax(F.linear(hidden[part], weight), dim=1, dtype=wide)
            # not in place: compiled by torch 2.11, what is changed in place and returned has a gradient of zeros
            total = total + F.nll_loss(log_p, targets[part], ignore_index=ignore_index, reduction="sum")
            if differentiate:
                label = targets[part][:, None]
                slope = log_p.exp_().add_(classes == label, alpha=-1).mul_(label != ignore_index).to(hidden.dtype)
                hidden_gradient[part] = slope @ weight
                weight_gradient += slope.T @ hidden[part]
        if differentiate:
            ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.Function, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(saved * gradient for saved in ctx.saved_tensors), None, None, None)


def dice_loss(logits: Tensor, targets: Tensor, smooth: float = 1.0, ignore_index: int | None = None) -> Tensor:
    """1 - (2 Σ p t + smooth) / (Σ p + Σ t + smooth), summed per sample and class, mean over both.

    Per sample rather than over the batch, so that the mean of a global batch does not depend on how it is split.
    Source: Milletari et al. 2016 (V-Net), arXiv:1606.04797, with plain sums below as in Sudre et al. 2017.

    Args:
        logits: [B, ...] float, one class, p = sigmoid(logits); or [B, C, ...], p = softmax(logits, 1).
        targets: of the same shape, bool, integer or float in [0, 1]; or [B, ...] integer, the classes in [0, C).
        smooth: > 0, keeps the loss 0 for an empty target that is predicted empty.
        ignore_index: a class whose elements are left out, such as 255.

    Returns:
        0-dim float32, or float64 for float64 logits.

    Raises:
        ConfigError: shapes do not fit, or smooth is not > 0.
    """
    return tversky_loss(logits, targets, 0.5, 0.5, smooth / 2, ignore_index)


def jaccard_loss(logits: Tensor, targets: Tensor, smooth: float = 1.0, ignore_index: int | None = None) -> Tensor:
    """1 - (Σ p t + smooth) / (Σ p + Σ t - Σ p t + smooth), the soft intersection over union; else as `dice_loss`.

    Source: Rahman and Wang 2016, Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation.
    """
    return tversky_loss(logits, targets, 1.0, 1.0, smooth, ignore_index)


def tversky_loss(
    logits: Tensor,
    targets: Tensor,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = 1.0,
    ignore_index: int | None = None,
) -> Tensor:
    """1 - (TP + smooth) / (TP + alpha FP + beta FN + smooth), summed per sample and class, mean over both.

    TP = Σ p t, FP = Σ p (1 - t), FN = Σ (1 - p) t. 0.5 and 0.5 give the Dice loss, 1 and 1 that of Jaccard.
    Source: Salehi et al. 2017, arXiv:1706.05721.

    Args:
        logits, targets, ignore_index: as in `dice_loss`.
        alpha, beta: >= 0, the price of what is found wrongly and of what is missed.
        smooth: > 0.

    Raises:
        ConfigError: shapes do not fit, or a number is out of range.
    """
    if not (alpha >= 0 and beta >= 0 and smooth > 0):
        raise ConfigError("an overlap loss has a number out of range", expected="alpha >= 0, beta >= 0, smooth > 0",
                          got=f"alpha={alpha}, beta={beta}, smooth={smooth}", fix="smooth=1.0")  # fmt: skip
    p, t = _memberships(logits, targets, ignore_index)
    true = (p * t).sum(2)
    ratio = (true + smooth) / (true + alpha * (p.sum(2) - true) + beta * (t.sum(2) - true) + smooth)
    return 1 - ratio.mean()


def _memberships(logits: Tensor, targets: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Predicted and true shares of each class, float [B, C, N] each; C is 1 for one class against the background."""
    wide = _widen(logits)
    if targets.shape == logits.shape:
        p, t = torch.sigmoid(wide).flatten(1)[:, None], targets.to(wide.dtype).flatten(1)[:, None]
        counts = None if ignore_index is None else (targets != ignore_index).flatten(1)[:, None]
    elif targets.shape == logits.shape[:1] + logits.shape[2:] and not targets.is_floating_point():
        counts = None if ignore_index is None else (targets != ignore_index).flatten(1)[:, None]
        labels = targets.long() if ignore_index is None else torch.where(targets == ignore_index, 0, targets).long()
        p = wide.softmax(1).flatten(2)
        t = F.one_hot(labels.flatten(1), logits.shape[1]).movedim(2, 1).to(wide.dtype)
    else:
        classes = list(logits.shape[:1] + logits.shape[2:])
        raise ConfigError("an overlap loss: shapes do not fit",
                          expected=f"targets {list(logits.shape)}, or classes {classes}",
                          got=f"{targets.dtype} {list(targets.shape)}")  # fmt: skip
    return (p, t) if counts is None else (p * counts, t * counts)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """-α_t (1 - p_t)^γ log p_t per element, mean over all elements; p_t is the probability of the true side.

    α_t is `alpha` where the target is 1 and 1 - alpha where it is 0. Binary: one logit an element, sigmoid.
    Source: Lin et al. 2017, arXiv:1708.02002, equation 5.

    Args:
        logits: [B, ...] float.
        targets: same shape, bool, integer or float, each 0 or 1.
        alpha: weight of the positive side, in [0, 1].
        gamma: >= 0; 0 leaves the weighted binary cross entropy.

    Returns:
        0-dim float32, or float64 for float64 logits.

    Raises:
        ConfigError: shapes differ, or alpha or gamma is out of range.
    """
    _require_same_shape("focal_loss", logits, targets)
    if not (0 <= alpha <= 1 and gamma >= 0):
        got = f"alpha={alpha}, gamma={gamma}"
        raise ConfigError(
            "focal_loss: a weight is out of range", expected="alpha in [0, 1], gamma >= 0", got=got, fix="gamma=2.0"
        )
    x = _widen(logits)
    t = targets.to(x.dtype)
    # In log space: a power of a probability that rounds to 0 has an infinite gradient for gamma < 1.
    signed = (2 * t - 1) * x
    miss = torch.exp(gamma * F.logsigmoid(-signed))
    side = alpha * t + (1 - alpha) * (1 - t)
    return -(side * miss * F.logsigmoid(signed)).mean()


def _widen(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _require_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(
            "label_smoothing has an invalid value", expected="a number in [0, 1]", got=label_smoothing, fix="0.1"
        )


def _require_same_shape(what: str, logits: Tensor, targets: Tensor) -> None:
    if logits.shape != targets.shape:
        raise ConfigError(
            f"{what}: logits and targets differ in shape", expected=str(list(logits.shape)), got=list(targets.shape)
        )
