"""single and ddp: every rank holds the whole model; DistributedDataParallel averages the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distkit.strategies.base import Strategy


class DataParallel(Strategy):
    """One rank trains the model as it is (`single`); several train copies of it (`ddp`)."""

    def prepare(self, module: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Place the model, wrap it for several ranks, compile it, build the optimizer."""
        config, runtime = self.config, self.runtime
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.module = module.to(runtime.device).to(memory_format=layout)
        self._ddp = self._wrap(self.module) if runtime.world_size > 1 else None
        self.name = "ddp" if self._ddp is not None else "single"
        self.model = self._ddp if self._ddp is not None else self.module
        self.eval_model = self.module
        if config.compile:
            # Module.compile works in place: parameter names stay as they are
            self.model.compile(
                backend=config.compile_backend,
                # only inductor has modes
                mode=config.compile_mode if config.compile_backend == "inductor" else None,
                fullgraph=config.compile_fullgraph,
                dynamic=config.compile_dynamic or None,
            )
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.module)

    def _wrap(self, module: nn.Module) -> DistributedDataParallel:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        options = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        # precision and compilation are the engine's: accelerate would cast every output back to fp32
        accelerator = Accelerator(
            cpu=self.runtime.device.type == "cpu",
            mixed_precision="no",
            dynamo_backend="no",
            kwargs_handlers=[options],
        )
        wrapped = accelerator.prepare_model(module)
        assert isinstance(wrapped, DistributedDataParallel), type(wrapped)
        return wrapped

    def exchange_gradients(self, on: bool) -> None:
        """DDP looks at the flag in forward and in backward (DistributedDataParallel.no_sync)."""
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = on

    def synchronize_buffers_(self, averages: Sequence[Tensor]) -> None:
        """Broadcast rank 0's: DDP does so with the buffers at each forward, so that its values alone ever matter."""
        if self._ddp is not None:
            for buffer in [*self.module.buffers(), *averages]:
                dist.broadcast(buffer, src=0)
