"""NaN and infinity are found in every dtype, and large finite values are not taken for them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import distkit
from distkit.tensors.buffers import BufferCopies, nan_buffers
from distkit.tensors.finite import CHUNK, is_finite, largest_magnitude, magnitudes

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2,
                                   torch.complex64])  # fmt: skip
@pytest.mark.parametrize("size", [1, CHUNK + 3])
def test_one_element_is_enough(dtype: torch.dtype, size: int) -> None:
    values = torch.zeros(size).to(dtype)
    assert is_finite(values)
    values[-1] = math.inf
    assert not is_finite(values)
    assert is_finite(values, infinity=True)
    values[-1] = math.nan
    assert not is_finite(values, infinity=True)


def test_large_values_are_finite() -> None:
    assert is_finite(torch.tensor([3e38, 3e38]))
    assert is_finite(torch.tensor([1e308, 1e308], dtype=torch.float64))
    assert is_finite(torch.full((9,), 60_000.0, dtype=torch.float16))
    assert not is_finite(torch.tensor([3e38, 3e38, math.inf]))
    assert is_finite(torch.tensor([2**62, 3]))
    assert is_finite(torch.zeros(0))


def test_magnitudes_keep_what_is_not_finite() -> None:
    tensors = [torch.ones(2, 3), torch.tensor([1.0, math.nan]), torch.full((2,), 60_000.0, dtype=torch.float16)]
    assert sorted(str(value.item()) for value in magnitudes(tensors)) == ["120000.0", "6.0", "nan"]
    assert largest_magnitude(tensors, CPU).isnan()
    assert largest_magnitude([torch.tensor([-math.inf]), torch.ones(1)], CPU) == math.inf
    assert largest_magnitude([], CPU) == 0


class Masked(nn.Module):
    """Buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
        self.register_buffer("unset", torch.tensor([math.nan]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("late", None, persistent=False)
        self.register_buffer("grown", torch.zeros(1), persistent=False)
        self.count: Tensor


def test_buffers_are_put_back_only_when_told() -> None:
    module = Masked()
    assert nan_buffers(module) == {"unset"}
    copies = BufferCopies(module)
    for when in (False, True):
        copies.take()
        module.count = module.count + 1  # another tensor, as some layers do
        module.late, module.grown = torch.ones(1), torch.ones(2)
        copies.put_back_(torch.tensor(when))
    assert module.count == 1
    assert module.grown.shape == (2,)  # a cache of another size stays


def test_a_ranks_own_buffers_are_put_back_in_their_old_shape() -> None:
    module = nn.Module()
    distkit.register_rank_buffer(module, "hidden", torch.zeros(2))
    distkit.register_rank_buffer(module, "memory", None)
    buffers, copies = module._buffers, BufferCopies(module)
    for bad, shape in ((True, (2,)), (False, (3,))):
        copies.take()
        buffers["hidden"], buffers["memory"] = torch.full((3,), math.nan), torch.ones(1)
        copies.put_back_(torch.tensor(bad))
        hidden, memory = buffers["hidden"], buffers["memory"]
        assert hidden is not None
        assert hidden.shape == shape
        assert (memory is None) == bad
