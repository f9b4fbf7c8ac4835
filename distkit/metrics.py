"""Sums for `LossOutput.sums`, and what an untrained classifier should score. Nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distkit.errors import ConfigError


@torch.no_grad()
def topk_correct(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, Tensor]:
    """How many samples have their label among the k largest logits.

    Where logits tie, torch.topk decides which of them count; a NaN logit counts as the largest.

    Args:
        logits: [B, C] float.
        labels: [B] int64.
        ks: numbers in [1, C].

    Returns:
        {"top1": count, "top5": count}: 0-dim int64 on the device of the logits, one for each k; exact whatever the
        size, and divided by the number of samples it is a fraction in [0, 1].

    Raises:
        ConfigError: a k is not in [1, C], or shapes do not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        got = f"{list(logits.shape)}, {list(labels.shape)}"
        raise ConfigError("topk_correct: shapes do not fit", expected="logits [B, C], labels [B]", got=got)
    num_classes = logits.shape[1]
    if not ks or min(ks) < 1 or max(ks) > num_classes:
        raise ConfigError(
            f"topk_correct: ks does not fit {num_classes} classes",
            expected=f"numbers in [1, {num_classes}]",
            got=tuple(ks),
            fix=f"ks={tuple(k for k in ks if 1 <= k <= num_classes) or (1,)}",
        )
    hits = logits.topk(max(ks), dim=1).indices == labels[:, None]
    return {f"top{k}": hits[:, :k].sum() for k in ks}


def expected_initial_loss(num_classes: int) -> float:
    """Cross entropy in nats of a uniform guess: log(num_classes). An untrained model should start near it.

    Raises:
        ConfigError: num_classes < 1.
    """
    if num_classes < 1:
        raise ConfigError("num_classes has an invalid value", expected="an integer >= 1", got=num_classes)
    return math.log(num_classes)
