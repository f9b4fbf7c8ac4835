"""What a tensor is apart from its values: dtype and shape, as a manifest states them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

#: torch's dtype name without `torch.`, and the shape of the whole tensor.
TensorSpec = tuple[str, tuple[int, ...]]


def dtype_name(of: Tensor | torch.dtype) -> str:
    """torch.float32 -> float32."""
    return str(of.dtype if isinstance(of, Tensor) else of).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """float32 -> torch.float32."""
    return cast(torch.dtype, getattr(torch, name))


def spec_of(tensor: Tensor) -> TensorSpec:
    """Dtype and shape of `tensor`; of a sharded one, those of the whole."""
    return dtype_name(tensor), tuple(tensor.shape)


def spec_text(spec: TensorSpec) -> str:
    """`float32 [3, 4]`."""
    return f"{spec[0]} {list(spec[1])}"


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements of a strided tensor share memory, so that it cannot be written in place."""
    strided = tensor.layout is torch.strided
    return strided and any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
