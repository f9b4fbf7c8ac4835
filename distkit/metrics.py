"""Sums for `LossOutput.sums`, metrics that `Recipe.compute_metrics` makes of them, and what an untrained model scores.

A metric of a whole test set is exact when it is made of sums over all samples, on any number of ranks: a mean of the F1
scores of batches is no F1 score. What makes sums never waits for the device; what makes metrics takes them as a report
has them, float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

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


@torch.no_grad()
def confusion_matrix(scores: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """How often each class was predicted for each: a sum for LossOutput.sums.

    Args:
        scores: [B, C, ...] float, of which the largest counts; or [B, ...] integer, the classes predicted.
        labels: [B, ...] integer, in [0, num_classes); others are left out.
        num_classes: C.
        ignore_index: a label that is left out although it is in that range.

    Returns:
        int64 [C, C], rows are labels and columns predictions, as scikit-learn has them; of every element, such as a
        pixel.

    Raises:
        ConfigError: shapes do not fit.
    """
    predictions = scores.argmax(1) if scores.is_floating_point() else scores
    if predictions.shape != labels.shape or (scores.is_floating_point() and scores.shape[1] != num_classes):
        raise ConfigError("confusion_matrix: shapes do not fit",
                          expected=f"scores [B, {num_classes}, ...] or classes [B, ...], and labels [B, ...]",
                          got=f"{list(scores.shape)}, {list(labels.shape)}")  # fmt: skip
    counts = (labels >= 0) & (labels < num_classes)
    if ignore_index is not None:
        counts &= labels != ignore_index
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=labels.device)
    rows = labels.long().clamp(0, num_classes - 1)
    # torch.bincount waits for the device
    return matrix.index_put_((rows, predictions.long()), counts.long(), accumulate=True)


@dataclass(frozen=True)
class ClassScores:
    """What a confusion matrix says of each class, float64 [C]; NaN for a class that is neither labelled nor predicted.

    With TP, FP and FN of a class: precision TP / (TP + FP), recall TP / (TP + FN), f1 = dice = 2 TP / (2 TP + FP + FN),
    iou (Jaccard) TP / (TP + FP + FN). A ratio of nothing to nothing is 0 where the class occurs.
    """

    precision: Tensor
    recall: Tensor
    f1: Tensor
    iou: Tensor

    @property
    def dice(self) -> Tensor:
        """The other name of f1."""
        return self.f1

    def macro(self) -> dict[str, float]:
        """The mean of each over the classes that occur: precision, recall, f1 and iou."""
        return {field.name: getattr(self, field.name).nanmean().item() for field in fields(self)}


def class_scores(confusion: Tensor) -> ClassScores:
    """Precision, recall, F1 and IoU of each class.

    Args:
        confusion: [C, C] sums of `confusion_matrix`.
    """
    matrix = confusion.double()
    hits, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    either = labelled + predicted - hits
    occurs = either > 0

    def ratio(part: Tensor, whole: Tensor) -> Tensor:
        return torch.where(occurs, part / whole.clamp_min(1), torch.nan)

    return ClassScores(ratio(hits, predicted), ratio(hits, labelled), ratio(2 * hits, labelled + predicted),
                       ratio(hits, either))  # fmt: skip


@torch.no_grad()
def calibration_bins(logits: Tensor, labels: Tensor, num_bins: int = 15) -> Tensor:
    """Confidence and correctness by confidence: a sum for LossOutput.sums.

    Args:
        logits: [B, C] float.
        labels: [B] int64.
        num_bins: equal parts of (0, 1], >= 1.

    Returns:
        float64 [num_bins, 3] (float32 on a device without float64): of the samples whose largest probability lies in
        the bin their number, the sum of these probabilities, and the number of those that are right.
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    confidence, predictions = logits.to(wide).softmax(1).max(1)
    rows = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    columns = torch.stack([torch.ones_like(confidence), confidence, (predictions == labels).to(wide)], 1)
    bins = torch.zeros(num_bins, 3, dtype=wide, device=logits.device)
    return bins.scatter_add_(0, rows[:, None].expand(-1, 3), columns)


def expected_calibration_error(bins: Tensor) -> float:
    """Mean distance of confidence and accuracy, over samples; 0 is calibrated.

    Source: Naeini et al. 2015, with the bins of Guo et al. 2017, arXiv:1706.04599, equation 3.

    Args:
        bins: [num_bins, 3] sums of `calibration_bins`.
    """
    count, confidence, right = bins.double().unbind(1)
    return ((confidence - right).abs().sum() / count.sum()).item()


def perplexity(nats: Tensor, tokens: Tensor) -> float:
    """exp(nats / tokens): of the sum of cross entropies over tokens, and their number; both 0-dim."""
    return math.exp(min(nats.item() / tokens.item(), 700.0))


def peak_signal_to_noise(squared_error: Tensor, elements: int, peak: float = 1.0) -> float:
    """PSNR in dB, 10 log10(peak^2 / MSE), of the sum of squared errors over so many `elements` of all images."""
    return 10 * math.log10(peak**2 * elements / squared_error.item()) if squared_error.item() else math.inf


def expected_initial_loss(num_classes: int) -> float:
    """Cross entropy in nats of a uniform guess: log(num_classes). An untrained model should start near it.

    Raises:
        ConfigError: num_classes < 1.
    """
    if num_classes < 1:
        raise ConfigError("num_classes has an invalid value", expected="an integer >= 1", got=num_classes)
    return math.log(num_classes)
