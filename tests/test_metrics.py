import math

import pytest
import torch
import torchmetrics.functional.image
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional import classification as reference

from distkit.errors import ConfigError
from distkit.losses import mixup_cross_entropy, token_cross_entropy
from distkit.metrics import (
    calibration_bins,
    class_scores,
    confusion_matrix,
    expected_calibration_error,
    expected_initial_loss,
    peak_signal_to_noise,
    perplexity,
    topk_correct,
)


def test_topk_counts_by_hand() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 3, 2, 0]])
    got = topk_correct(logits, torch.tensor([0, 2, 0]), ks=(1, 2, 3))
    assert {name: count.item() for name, count in got.items()} == {"top1": 1, "top2": 2, "top3": 3}
    assert all(count.dtype == torch.int64 and count.ndim == 0 for count in got.values())


def test_topk_matches_a_sort() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 10, requires_grad=True), torch.randint(10, (50,))
    order = logits.argsort(dim=1, descending=True)
    got = topk_correct(logits, labels)
    for k in (1, 5):
        assert got[f"top{k}"].item() == sum(int(labels[i]) in order[i, :k].tolist() for i in range(50))
    assert not got["top1"].requires_grad


def test_constant_logits_score_no_more_than_chance() -> None:
    got = topk_correct(torch.zeros(100, 10), torch.arange(100) % 10)
    assert got["top1"].item() <= 10


def test_topk_checks_k_and_shapes() -> None:
    logits, labels = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"ks=\(1,\)"):
        topk_correct(logits, labels)
    with pytest.raises(ConfigError, match="in \\[1, 3\\]"):
        topk_correct(logits, labels, ks=(0,))
    with pytest.raises(ConfigError, match="shapes"):
        topk_correct(logits, labels[:2], ks=(1,))


def test_nothing_here_reads_a_tensor_on_the_host() -> None:
    seen: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    logits, labels = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    with Record():
        topk_correct(logits, labels)
        token_cross_entropy(logits, labels)
        mixup_cross_entropy(logits, labels, labels, torch.rand(4), 0.1)
    assert seen
    assert not [name for name in seen if "_local_scalar_dense" in name or "nonzero" in name]


def test_expected_initial_loss() -> None:
    assert expected_initial_loss(10) == pytest.approx(math.log(10))
    assert expected_initial_loss(1) == 0
    with pytest.raises(ConfigError, match=">= 1"):
        expected_initial_loss(0)


def scores_and_labels(*shape: int, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, *rest = shape
    return (torch.randn(batch, classes, *rest, generator=generator),
            torch.randint(0, classes - 1, shape, generator=generator))  # fmt: skip  # the last class is never a label


@pytest.mark.parametrize("shape", [(40,), (3, 6, 7)])
@pytest.mark.parametrize("ignore_index", [None, 2])
def test_confusion_and_scores_are_those_of_torchmetrics(shape: tuple[int, ...], ignore_index: int | None) -> None:
    scores, labels = scores_and_labels(*shape)
    matrix = confusion_matrix(scores, labels, 5, ignore_index)
    expected = reference.multiclass_confusion_matrix(scores, labels, 5, ignore_index=ignore_index)
    assert matrix.tolist() == expected.tolist()
    assert confusion_matrix(scores.argmax(1), labels, 5, ignore_index).tolist() == expected.tolist()
    got = class_scores(matrix)
    given = {"num_classes": 5, "ignore_index": ignore_index, "average": "none"}
    for name, function in (("precision", reference.multiclass_precision), ("recall", reference.multiclass_recall),
                           ("f1", reference.multiclass_f1_score),
                           ("iou", reference.multiclass_jaccard_index)):  # fmt: skip
        torch.testing.assert_close(getattr(got, name).float(), function(scores, labels, **given), equal_nan=True,
                                   rtol=1e-6, atol=1e-6, msg=name)  # fmt: skip


def test_sums_of_batches_give_the_scores_of_the_whole() -> None:
    scores, labels = scores_and_labels(101)
    parts = [confusion_matrix(scores[i : i + 7], labels[i : i + 7], 5) for i in range(0, 101, 7)]
    assert class_scores(sum(parts)).macro() == class_scores(confusion_matrix(scores, labels, 5)).macro()  # type: ignore[arg-type]


def test_a_class_that_does_not_occur_has_no_score_and_one_that_is_missed_has_0() -> None:
    got = class_scores(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]]))
    assert got.precision.tolist()[:2] == [1.0, 0.0]
    assert got.dice.isnan().tolist() == [False, False, True]
    assert got.macro()["recall"] == pytest.approx((0.75 + 0) / 2)


def test_labels_out_of_range_are_left_out_and_predictions_are_an_error() -> None:
    labels = torch.tensor([0, 1, -100, 255])
    assert confusion_matrix(torch.tensor([0, 0, 0, 0]), labels, 2).tolist() == [[1, 0], [1, 0]]
    with pytest.raises(IndexError):
        confusion_matrix(torch.tensor([0, 7, 0, 0]), labels, 2)
    with pytest.raises(ConfigError, match="shapes do not fit"):
        confusion_matrix(torch.zeros(4, 3), labels, 2)


def test_calibration_is_that_of_torchmetrics() -> None:
    scores, labels = scores_and_labels(500)
    bins = sum(calibration_bins(scores[i : i + 33], labels[i : i + 33]) for i in range(0, 500, 33))
    expected = reference.multiclass_calibration_error(scores.softmax(1), labels, 5, n_bins=15)
    assert expected_calibration_error(bins) == pytest.approx(expected.item(), abs=1e-6)  # type: ignore[arg-type]


def test_perplexity_and_signal_to_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    images, guesses = torch.rand(2, 3, 1, 8, 8, generator=generator)
    error = ((images - guesses) ** 2).sum()
    expected = torchmetrics.functional.image.peak_signal_noise_ratio(guesses, images, data_range=1.0)
    assert peak_signal_to_noise(error, images.numel()) == pytest.approx(expected.item())
    assert peak_signal_to_noise(torch.tensor(0.0), 5) == math.inf
    assert perplexity(torch.tensor(10 * math.log(7.0)), torch.tensor(10)) == pytest.approx(7)


class Reads(TorchDispatchMode):
    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
        assert not any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "bincount", "unique")), func
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_what_makes_sums_never_waits() -> None:
    scores, labels = scores_and_labels(40)
    with Reads():
        confusion_matrix(scores, labels, 5, 1)
        calibration_bins(scores, labels)
