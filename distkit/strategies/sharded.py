"""Common to strategies that hold parameters or gradients in parts: norms over ranks, whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        real = [torch.view_as_real(gradient) if gradient.is_complex() else gradient for gradient in gradients]
        wide = [gradient for gradient in real if gradient.dtype == torch.float64]
        low = [gradient for gradient in real if gradient.dtype != torch.float64]
        norms = [norm.float() for norm in (*_norms(low, torch.float32), *_norms(wide, torch.float64))]
        total = torch.stack(norms or [torch.zeros(())]).square().sum().to(self.runtime.device)
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


def _norms(tensors: list[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    return torch._foreach_norm(tensors, 2.0, dtype=dtype) if tensors else []


def make_cuttable_(module: nn.Module, strategy: str) -> None:
    """Lay out every parameter row by row, and refuse those that cannot be cut.

    Raises:
        ConfigError: naming the first one, which has no dimension or no element.
    """
    for name, parameter in module.named_parameters():
        if not parameter.numel():
            raise ConfigError(f"--strategy {strategy} cannot cut parameter {name}, which has no element",
                              expected="one element at least", got=f"shape {list(parameter.shape)}",
                              fix="--strategy ddp")  # fmt: skip
        parameter.data = parameter.data.contiguous()
    scalars = [name for name, parameter in module.named_parameters() if not parameter.ndim]
    if scalars:
        raise ConfigError(f"--strategy {strategy} cannot cut parameter {scalars[0]}, which has no dimension",
                          expected="shape [1] at least", got="shape []",
                          fix="torch.ones(1) in place of torch.tensor(1.0), or --strategy ddp")  # fmt: skip
