"""fp16's loss scale where gradients lie in parts: one decision of all ranks, made on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer


class LossScaling:
    """What torch.amp.GradScaler does around an update, for an optimizer that DeepSpeed steps.

    Args:
        scaler: whose scale is read and updated; enabled.
        device: of the ranks' collectives.
    """

    def __init__(self, scaler: GradScaler, device: torch.device) -> None:
        self._scaler, self._device = scaler, device
        self._found_inf: Tensor | None = None

    @torch.no_grad()
    def unscale_(self, gradients: list[Tensor]) -> None:
        """Divide by the scale once a step, and learn whether some rank's part is not finite."""
        if self._found_inf is not None:
            return
        scale = self._scaler._scale
        assert scale is not None
        found = torch.zeros(1, device=self._device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, scale.double().reciprocal().float())
        dist.all_reduce(found, dist.ReduceOp.MAX)
        self._found_inf = found

    @torch.no_grad()
    def update(self, gradients: list[Tensor], optimizer: Optimizer, step: Callable[[], object]) -> Tensor:
        """`step`, which calls `optimizer`, changes nothing where a gradient is not finite; then the next scale.

        Returns:
            1.0 where the update was skipped, else 0.0; 0-dim float32.
        """
        self.unscale_(gradients)
        assert self._found_inf is not None
        found, self._found_inf = self._found_inf.squeeze(), None
        # the optimizer's kernel leaves weights and state alone
        optimizer.found_inf = found  # type: ignore[attr-defined]
        step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        scaler = self._scaler
        assert scaler._scale is not None
        assert scaler._growth_tracker is not None
        torch._amp_update_scale_(
            scaler._scale, scaler._growth_tracker, found, scaler.get_growth_factor(),
            scaler.get_backoff_factor(), scaler.get_growth_interval(),
        )  # fmt: skip
        return found
