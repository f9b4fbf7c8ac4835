"""What strategies share that hold parameters or gradients in parts: norms over ranks, whole tensors, buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distkit.strategies.base import Strategy
from distkit.tensors.shards import whole


class Sharded(Strategy):
    """`gradients` gives this rank's parts.

    Attributes:
        norm_group: the ranks that hold one copy of the gradients together; None: all.
    """

    norm_group: dist.ProcessGroup | None = None

    def synchronize_buffers_(self, averages: Sequence[Tensor]) -> None:
        """Broadcast rank 0's, as ddp does."""
        for buffer in [*self.module.buffers(), *averages]:
            dist.broadcast(buffer, src=0)

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """sqrt of the squares of all parts, summed over the ranks that hold a copy together."""
        norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32) if gradients else [torch.zeros(())]
        total = torch.stack(list(norms)).square().sum().to(self.runtime.device)
        dist.all_reduce(total, group=self.norm_group)
        return total.sqrt()

    def clip_with_norm_(self, max_norm: float, norm: Tensor) -> None:
        """Scale gradients by min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does."""
        self.scale_gradients_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In whole on rank 0's CPU, one at a time on the device."""
        found = {}
        for name, tensor in tensors.items():
            gathered = whole(tensor.detach())
            if self.runtime.is_main_process:
                found[name] = gathered.cpu()
        return found
