import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distkit.errors import ConfigError
from distkit.losses import mixup_cross_entropy, token_cross_entropy
from distkit.metrics import expected_initial_loss, topk_correct


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
