"""What a strategy asks of a model's parameters: their names, and what a rank's own backwards gave them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distkit.tensors.finite import magnitudes


def state_dict_names(module: nn.Module) -> dict[str, str]:
    """What the state dict calls each tensor -> its canonical name; a tied one has several."""
    names = {tensor: name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    return {name: names.get(tensor, name) for name, tensor in state_tensors(module, keep_vars=True).items()}


def state_tensors(module: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """Its state dict without extra states (torch.nn.Module.get_extra_state) that are not tensors."""
    state = module.state_dict(keep_vars=keep_vars)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


class OwnGradients:
    """Sees the gradients that this rank's backwards give, before they are added up over microbatches and ranks.

    Args:
        parameters: those to be trained, as the backward knows them.
        device: where the answer is wanted.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._device = device
        self._magnitudes: list[Tensor] = []
        for parameter in parameters:
            parameter.register_hook(self._see)  # type: ignore[no-untyped-call]

    def _see(self, gradient: Tensor) -> None:
        self.see(gradient._values() if gradient.is_sparse else gradient)

    @torch.no_grad()
    def see(self, gradient: Tensor) -> None:
        """Note one gradient, or several as one tensor; never waits for the device."""
        self._magnitudes += magnitudes([gradient])

    def take(self) -> Tensor:
        """The largest magnitude since the last call, 0-dim float32; NaN or infinite where an element is."""
        seen, self._magnitudes = self._magnitudes, []
        return torch.stack(seen).amax().to(self._device) if seen else torch.zeros((), device=self._device)
