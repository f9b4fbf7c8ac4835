"""single and ddp: every rank holds the whole model; DistributedDataParallel averages the gradients."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distkit.errors import ConfigError
from distkit.strategies.base import Strategy
from distkit.strategies.blocks import recompute_activations_
from distkit.strategies.compiled import compile_
from distkit.strategies.unused import no_gradient
from distkit.tensors.buffers import buffer_slots


class DataParallel(Strategy):
    """One rank trains the model as it is (`single`); several train copies of it (`ddp`)."""

    def prepare(self, module: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Place the model, wrap it for several ranks, compile it, build the optimizer."""
        config, runtime = self.config, self.runtime
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.module = module.to(runtime.device).to(memory_format=layout)
        if config.ddp.sync_batchnorm and runtime.world_size > 1:
            self.module = nn.SyncBatchNorm.convert_sync_batchnorm(self.module)  # type: ignore[no-untyped-call]
        recompute_activations_(self.module, config.activation_checkpointing)
        if config.compile and config.compile_scope == "blocks":
            compile_(self.module, config, "blocks", fix="--compile-scope whole")
        self._ddp = self._wrap(self.module) if runtime.world_size > 1 else None
        self.name = "ddp" if self._ddp is not None else "single"
        self.model = self._ddp if self._ddp is not None else self.module
        self.needs_forward = self._ddp is not None
        self.eval_model = self.module
        if config.compile and config.compile_scope != "blocks":
            # in place: parameter names stay as they are, and DDP, which cannot be compiled itself, calls what was
            compile_(self.module, config, "whole")
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.module)

    def _wrap(self, module: nn.Module) -> DistributedDataParallel:
        from accelerate import Accelerator, DDPCommunicationHookType, DistributedDataParallelKwargs

        config = self.config.ddp
        options = DistributedDataParallelKwargs(
            gradient_as_bucket_view=True,
            bucket_cap_mb=config.bucket_mb or 25,
            static_graph=config.static_graph,
            find_unused_parameters=self.config.unused_parameters != "refuse",
            comm_hook=DDPCommunicationHookType.BF16 if config.bf16_gradients else DDPCommunicationHookType.NO,
        )
        # precision and compilation are the engine's: accelerate would cast every output back to fp32
        # statistics alone are sent: other buffers are the same on all ranks, or each rank's own
        left = [slot.name for slot in buffer_slots(module) if not slot.statistic]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, left)  # type: ignore[no-untyped-call]
        accelerator = Accelerator(
            cpu=self.runtime.device.type == "cpu",
            mixed_precision="no",
            dynamo_backend="no",
            kwargs_handlers=[options],
        )
        wrapped = accelerator.prepare_model(module)
        assert isinstance(wrapped, DistributedDataParallel), type(wrapped)
        wrapped.__class__ = _WithAttributes  # accelerate chooses the class
        if not options.find_unused_parameters:  # with it DDP keeps its first buckets
            settle_buckets(wrapped)
        return wrapped

    def exchange_gradients(self, on: bool) -> None:
        """DDP looks at the flag in forward and in backward (DistributedDataParallel.no_sync)."""
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = on

    def refuse_unused(self, names: Sequence[str]) -> None:
        """DDP would wait for their gradients, unless it is told not to."""
        if self._ddp is not None and self.config.unused_parameters == "refuse":
            raise no_gradient(names, self.name, "--ddp.no-static-graph " if self.config.ddp.static_graph else "")

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; with the last microbatch DDP averages them over the ranks."""
        try:
            super().backward(loss)
        except RuntimeError as error:
            if "ready only once" not in str(error):
                raise
            fix = "that call inside the model's forward, and use_reentrant=False; or --strategy fsdp"
            raise ConfigError("a parameter is used outside of the model's forward, or twice in a backward (a reentrant "
                              "checkpoint)", got=f"--unused-parameters {self.config.unused_parameters}", fix=fix,
                              expected="neither, with --strategy ddp") from error  # fmt: skip
        if self._ddp is not None and self._ddp.require_backward_grad_sync:
            self._check_exchanged(self._ddp)

    def _check_exchanged(self, ddp: DistributedDataParallel) -> None:
        """Refuse an exchange that DDP has not ended, because it waits for gradients that will not come."""
        try:
            # DDP asks the same before the next forward: after an update with gradients that are not averaged
            ddp.reducer._rebuild_buckets()
        except RuntimeError as error:
            if "finished reduction" not in str(error):
                raise
            if self.config.unused_parameters != "refuse":
                raise ConfigError("the loss does not depend on all that the model returned, and DDP waits for the "
                                  "gradients of the rest", expected="a forward that returns what the loss uses",
                                  fix="leave the rest out of what the model's forward returns") from error  # fmt: skip
            said = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            trained = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
            names = [trained[int(index)] for index in said[1].split()] if said else ["some parameters"]
            raise no_gradient(names, self.name) from error

    def gates(self) -> Sequence[tuple[nn.Module, nn.Module]] | None:
        """Rank 0's statistics are sent between DDP's forward and the module's; a hook there would be compiled again."""
        if self.config.ddp.sync_batchnorm:
            return None
        if self._ddp is None or not any(slot.statistic for slot in buffer_slots(self.module)):
            return ()
        whole = self.config.compile and self.config.compile_scope != "blocks"
        return None if whole else [(self.model, self.module)]

    def check(self) -> None:
        """Refuse what the device cannot do, and choices that contradict each other."""
        super().check()
        if self.config.ddp.static_graph and self.config.unused_parameters != "refuse":
            raise ConfigError("--ddp.static-graph says that every step uses the same parameters",
                              expected="not both", got=f"--unused-parameters {self.config.unused_parameters}",
                              fix="--ddp.no-static-graph")  # fmt: skip
        if self.config.ddp.sync_batchnorm and self.runtime.device.type != "cuda":
            raise ConfigError("--ddp.sync-batchnorm needs GPUs: torch.nn.SyncBatchNorm has no other kernel",
                              got=f"device {self.runtime.device.type}", fix="--ddp.no-sync-batchnorm")  # fmt: skip


class _WithAttributes(DistributedDataParallel):
    """Hands out what the model has by its names, such as `model.criterion`, as every other strategy does."""

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        module = self._modules["module"]
        theirs = (vars(module), module._buffers, module._parameters, module._modules) if module is not None else ()
        of_module = name not in vars(self) and name not in self._modules and any(name in names for names in theirs)
        setattr(module, name, value) if of_module else super().__setattr__(name, value)


def settle_buckets(ddp: DistributedDataParallel) -> None:
    """Have DDP lay out its final buckets, in the reverse order of registration; all ranks call it together.

    DDP lays them out again after its first backward, in the order in which the gradients became ready. The first step
    of a resumed run would be summed in other buckets than the same step of the run never killed, and with three ranks
    and more a sum depends on its place in the bucket: the last bits would differ (C3). So the first backward is one of
    zeros. Its gradients are dropped; parameters, buffers and generators stay as they are, and neither the module's own
    forward nor its hooks are called (hooks on a parameter are: they see one gradient of zeros).
    """
    module, parameters = ddp.module, [p for p in ddp.module.parameters() if p.requires_grad]
    sparse = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse}
    ddp.require_forward_param_sync = False  # the stand-in has no buffers to send
    ddp.module = _Zeros(parameters, sparse)
    try:
        with torch.enable_grad():
            # an input that is not used: on a GPU DDP takes no call without one
            loss: Tensor = ddp(torch.zeros((), device=parameters[0].device))
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        ddp.module, ddp.require_forward_param_sync = module, True
    for parameter in parameters:
        parameter.grad = None


class _Zeros(nn.Module):
    """Stands in for a module: its backward gives zeros to `parameters`, which it does not own, the last one first."""

    def __init__(self, parameters: Sequence[nn.Parameter], sparse: Set[int]) -> None:
        super().__init__()
        self.given, self.sparse = parameters, sparse

    def forward(self, _: Tensor) -> Tensor:
        """0; the backward runs what was recorded last first, among all that is ready (torch's notes on autograd)."""
        return torch.stack([_zero_of(p, id(p) in self.sparse) for p in self.given]).sum()


def _zero_of(parameter: Tensor, sparse: bool) -> Tensor:
    """0 as a 0-dim float32 tensor, computed from `parameter`; `sparse` makes its gradient a sparse one."""
    if sparse:
        first = torch.zeros(1, dtype=torch.int64, device=parameter.device)
        parameter = nn.functional.embedding(first, parameter, sparse=True)
    return (torch.view_as_real(parameter) if parameter.is_complex() else parameter).sum().float() * 0
