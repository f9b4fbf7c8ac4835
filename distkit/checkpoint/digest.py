"""One number for everything a run has learned."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from distkit.tensors.shards import whole


class StateDigest:
    """`state_digest` of tensors that come one after the other, so that they need not be in memory together."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._last: str | None = None

    def update(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; all ranks together if it is sharded.

        Raises:
            ValueError: `name` does not come after the names before, in the order of Python's strings.
        """
        if self._last is not None and name <= self._last:
            raise ValueError(f"{name} comes after {self._last}: names must ascend")
        self._last = name
        tensor = whole(tensor.detach()).to("cpu").contiguous()
        self._digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # numpy has no bfloat16: view the same bytes as uint8
        self._digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """The digest of what has come so far."""
        return self._digest.hexdigest()


def state_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the names, dtypes, shapes and bytes of `tensors`, in the order of their names.

    Layout (strides, device, shards) does not count: equal values give equal digests. Tensors in shards are gathered one
    at a time, so all ranks call this together.
    """
    digest = StateDigest()
    for name in sorted(tensors):
        digest.update(name, tensors[name])
    return digest.hexdigest()
