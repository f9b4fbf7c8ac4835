"""Common to strategies that hold parameters or gradients in parts: norms over ranks, whole tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distkit.errors import ConfigError
from distkit.strategies.base import Strategy
from distkit.tensors.shards import whole


class Sharded(Strategy):
    """`gradients` gives this rank's parts.

    Attributes:
        norm_group: the ranks that hold one copy of the gradients together; None: all.
    """

    norm_group: dist.ProcessGroup | None = None

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        """sqrt of the squares of all parts, summed over the ranks that hold a copy together."""
        norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32) if gradients else [torch.zeros(())]
        total = torch.stack(list(norms)).square().sum().to(self.runtime.device)
        dist.all_reduce(total, group=self.norm_group)
        return total.sqrt()

    def _clip_with_norm_(self, max_norm: float, norm: Tensor) -> None:
        self.scale_gradients_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on rank 0's CPU, one at a time on the device."""
        gathered = {}
        for name, tensor in tensors.items():
            value = whole(tensor.detach())
            if self.runtime.is_main_process:
                gathered[name] = value.cpu()
        return gathered

    def _refuse_whole_compilation(self, expected: str) -> None:
        config = self.config
        if config.compile and config.compile_scope == "whole":
            raise ConfigError(f"--compile-scope whole with --strategy {config.strategy}", got="whole",
                              expected=expected, fix="--compile-scope blocks")  # fmt: skip


def refuse_scalars(module: nn.Module, strategy: str) -> None:
    """Refuse parameters without dimensions, which cannot be cut.

    Raises:
        ConfigError: naming the first one.
    """
    scalars = [name for name, parameter in module.named_parameters() if not parameter.ndim]
    if scalars:
        raise ConfigError(f"--strategy {strategy} cannot cut parameter {scalars[0]}, which has no dimension",
                          expected="shape [1] at least", got="shape []",
                          fix="torch.ones(1) in place of torch.tensor(1.0), or --strategy ddp")  # fmt: skip
