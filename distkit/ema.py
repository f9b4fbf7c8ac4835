"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from distkit.tensors.buffers import buffer_slots
from distkit.tensors.shards import local_part


class Ema:
    """Shadow copy `s` of each floating-point parameter and persistent buffer `w`: after a step s <- d s + (1 - d) w.

    d = min(decay, (1 + t) / (10 + t)) at step t, the warmup of tf.train.ExponentialMovingAverage, so that the random
    initial weights are soon forgotten. Other buffers (counters) are taken as they are when the average is applied.

    Args:
        model: the module whose tensors are averaged; the same parameters must stay in place.
        decay: in (0, 1).
        tensors: the model's parameters and buffers by name, where the module has other ones (Strategy.model_tensors).

    Attributes:
        shadow: the averages by name.
        averaged_buffers: those of buffers, which differ between data parallel ranks until they are synchronised.
    """

    def __init__(self, model: nn.Module, decay: float, tensors: Mapping[str, Tensor] | None = None) -> None:
        tensors = tensors or {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.decay = decay
        averaged = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        slots = {slot.name: slot for slot in buffer_slots(model)}
        for name, slot in slots.items():
            if not slot.persistent or slot.rank_own:
                averaged.pop(name, None)
        self._live = {name: tensor.detach() for name, tensor in averaged.items()}
        self.shadow = {name: tensor.clone() for name, tensor in self._live.items()}
        buffers = dict(model.named_buffers())
        self.averaged_buffers = [tensor for name, tensor in self.shadow.items() if name in buffers]
        # of tensors in shards this rank's part: every update goes element by element
        self._live_list = [local_part(tensor) for tensor in self._live.values()]
        self._shadow_list = [local_part(tensor) for tensor in self.shadow.values()]
        places = {name: index for index, name in enumerate(self._live)}
        # a layer may put another tensor into its buffer (self.count = self.count + 1)
        self._slots = [(places[name], slot.owner._buffers, slot.key) for name, slot in slots.items() if name in places]

    @torch.no_grad()
    def update_(self, step: int, leave_out: Tensor | None = None) -> None:
        """Move the shadow towards the live weights; `step` counts finished updates from 0.

        Args:
            step: of the update.
            leave_out: bool, 0-dim on the device: True leaves the shadow as it is; nothing waits for it.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        self._take_buffers()
        if leave_out is None:
            torch._foreach_lerp_(self._shadow_list, self._live_list, 1 - decay)
            return
        for shadow, live in zip(self._shadow_list, self._live_list, strict=True):
            moved = torch.lerp(shadow, live, 1 - decay)
            shadow.copy_(torch.where(leave_out.to(shadow.device), shadow, moved))

    @torch.no_grad()
    def restart_(self) -> None:
        """Begin again from the live weights."""
        self._take_buffers()
        torch._foreach_copy_(self._shadow_list, self._live_list)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights; outside, its own again, to the bit."""
        self._take_buffers()
        with torch.no_grad():
            own = [tensor.clone() for tensor in self._live_list]
            torch._foreach_copy_(self._live_list, self._shadow_list)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live_list, own)

    def _take_buffers(self) -> None:
        for index, buffers, key in self._slots:
            self._live_list[index] = cast(Tensor, buffers[key])

    def state_dict(self) -> dict[str, Tensor]:
        """The shadow tensors by their names in the model."""
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy `state` into the shadow.

        Raises:
            KeyError: the names differ from the model's.
        """
        if state.keys() != self.shadow.keys():
            raise KeyError(f"names differ: {sorted(state.keys() ^ self.shadow.keys())}")
        for name, tensor in state.items():
            self.shadow[name].copy_(tensor)
