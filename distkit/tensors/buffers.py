"""The places of a model's buffers: a layer may put another tensor there at any time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class BufferSlot:
    """Where a module keeps one buffer.

    Attributes:
        name: canonical, as in named_buffers.
        owner, key: the module, and its own name for it.
    """

    name: str
    owner: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor | None:
        """What lies there now; None before the layer has made it."""
        return self.owner._buffers[self.key]

    @property
    def persistent(self) -> bool:
        """False for a cache: the layer makes it, of any form, and no state dict has it."""
        return self.key not in self.owner._non_persistent_buffers_set


def buffer_slots(model: nn.Module) -> Iterator[BufferSlot]:
    """Every slot of `model`, also those without a tensor."""
    for prefix, owner in model.named_modules():
        for key in owner._buffers:
            yield BufferSlot(f"{prefix}.{key}" if prefix else key, owner, key)
