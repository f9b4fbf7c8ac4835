"""What a recipe's `compute_loss` returns, and the losses that torch does not have.

For plain and label-smoothed cross entropy, over class indices or soft labels, and for binary cross entropy, call
torch.nn.functional.cross_entropy and binary_cross_entropy_with_logits. Every loss here runs in float32 at least and
never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from distkit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The result of `compute_loss` on one microbatch."""

    loss: Tensor
    """0-dim, differentiable: the mean over the samples of this microbatch, or over `weight` where that is set."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Name -> 0-dim tensor, already summed over the samples (`{"correct": ...}`), without gradient; reported as
    sum / samples, over all ranks and microbatches."""
    weight: Tensor | None = None
    """0-dim, without gradient: what `loss` is the mean over where that is not samples, such as the number of tokens.
    The engine divides by the sum of the weights of the whole global batch (C2). None: the number of samples."""


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


def dice_loss(logits: Tensor, targets: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - (2 Σ p t + smooth) / (Σ p + Σ t + smooth) with p = sigmoid(logits), summed per sample, mean over samples.

    Per sample rather than over the batch, so that the mean of a global batch does not depend on how it is split.
    Source: Milletari et al. 2016 (V-Net), arXiv:1606.04797, with plain sums below as in Sudre et al. 2017.

    Args:
        logits: [B, ...] float, one class against the background.
        targets: same shape, bool, integer or float in [0, 1].
        smooth: > 0, keeps the loss 0 for an empty target that is predicted empty.

    Returns:
        0-dim float32, or float64 for float64 logits.

    Raises:
        ConfigError: shapes differ, or smooth is not > 0.
    """
    _require_same_shape("dice_loss", logits, targets)
    if not smooth > 0:
        raise ConfigError("dice_loss: smooth has a value it cannot take", expected="> 0", got=smooth, fix="smooth=1.0")
    p = torch.sigmoid(_widen(logits)).flatten(1)
    t = targets.to(p.dtype).flatten(1)
    ratio = (2 * (p * t).sum(1) + smooth) / (p.sum(1) + t.sum(1) + smooth)
    return 1 - ratio.mean()


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
            "label_smoothing has a value it cannot take", expected="a number in [0, 1]", got=label_smoothing, fix="0.1"
        )


def _require_same_shape(what: str, logits: Tensor, targets: Tensor) -> None:
    if logits.shape != targets.shape:
        raise ConfigError(
            f"{what}: logits and targets differ in shape", expected=str(list(logits.shape)), got=list(targets.shape)
        )
