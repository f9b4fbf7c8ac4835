"""zero1, zero2, zero3: DeepSpeed cuts optimizer state, gradients and parameters over the ranks.

Prepared by Accelerate's DeepSpeed plugin. DeepSpeed's engine exchanges gradients and updates; weighting and clipping
are done here, on its partitions, between the two, so that all strategies do the same and nothing is measured twice.

Weights stay fp32 and forward passes are autocast by torch, in every precision: DeepSpeed's own 16-bit engines would
keep 16-bit weights and run norms and losses in them, which no other strategy does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from distkit.config import OPTIMIZERS, TrainConfig, split_batch
from distkit.errors import ConfigError
from distkit.optim import OptimizerState, named_parameters
from distkit.runtime.process import Runtime
from distkit.strategies.blocks import recompute_activations_, repeated_blocks
from distkit.strategies.compiled import compile_
from distkit.strategies.deepspeed.config import deepspeed_config
from distkit.strategies.deepspeed.engine import gather_whole_, require_installed, start_engine
from distkit.strategies.deepspeed.partitions import FlatOptimizerState, Zero3Optimizer, ZeroOptimizer, whole_numel
from distkit.strategies.parameters import state_dict_names
from distkit.strategies.sharded import Sharded, make_cuttable_
from distkit.strategies.unused import ExchangeOrder, GradientWatch, after_backward, no_gradient
from distkit.tensors.buffers import rank_buffers, shared_buffers


class DeepSpeed(Sharded):
    """`model` is DeepSpeed's engine; `optimizer` the inner one, whose parameters are flat partitions."""

    def __init__(self, config: TrainConfig, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        self.name = config.strategy
        self.stage = int(config.strategy[-1])
        self.keeps_changes = self.stage < 3
        self._found_inf: Tensor | None = None

    def prepare(self, module: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Choose what is recomputed and compiled, build the optimizer, hand both to DeepSpeed."""
        config, device = self.config, self.runtime.device
        make_cuttable_(module, self.name)
        check_dtypes(module, self.name, trained_only=self.stage < 3)
        self.module = module.to(device)
        recompute_activations_(module, config.activation_checkpointing)
        if config.compile:
            compile_(module, config, "blocks")
            if self.stage == 3:
                gather_whole_(repeated_blocks(module))
        parameters = named_parameters(module)
        names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        # now: ZeRO 3 gives the state dict other tensors
        self._aliases = state_dict_names(module)
        self.optimizer = build_optimizer(module)
        self._groups = [[names[p] for p in group["params"]] for group in self.optimizer.param_groups]
        self.optimizer.state.clear()  # that of parameters which it will not see again
        numel = sum(p.numel() for p in parameters.values())
        split = split_batch(config, self.runtime.world_size)
        section = deepspeed_config(config, split, self.stage, numel, pinned=device.type == "cuda")
        self.engine = start_engine(module, self.optimizer, section, device, from_file=config.zero.config is not None)
        assert self.engine.optimizer.optimizer is self.optimizer, type(self.engine.optimizer.optimizer)
        self.model, self.eval_model = cast(nn.Module, self.engine), module
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self._gradient_watch = GradientWatch(trained, self.name)
        self.zero = (Zero3Optimizer if self.stage == 3 else ZeroOptimizer)(self.engine.optimizer, names)
        self.zero.fill_momentum_(self.optimizer)
        self._watch_gathering()

    def _watch_gathering(self) -> None:
        """zero3 gathers a module's own parameters before its forward: on every rank in the same order."""
        names = {part: name for name, part in self.module.named_modules()}
        gates = [part for part, _ in self.gates() or ()]
        self._order = ExchangeOrder([names[part] for part in gates], (), self.name, self.runtime)
        for index, part in enumerate(gates):
            part.register_forward_pre_hook(partial(self._see_forward, index), prepend=True)

    def _see_forward(self, index: int, _module: nn.Module, _args: object) -> None:
        self._order.see(index)

    def exchange_gradients(self, on: bool) -> None:
        """zero1 exchanges once a step; zero2 and zero3 hold only parts of gradients, so each backward exchanges."""
        self.engine.set_gradient_accumulation_boundary(on)
        self._last = on

    def gates(self) -> Sequence[tuple[nn.Module, nn.Module]] | None:
        """zero3 gathers a module's own parameters before its forward; a hook in what is compiled would be, too."""
        if self.stage < 3:
            return ()
        parts = [part for part in self.module.modules() if next(part.parameters(recurse=False), None) is not None]
        return None if self.config.compile else [(part, part) for part in parts]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Afterwards nothing is gathered."""
        self._order.begin(step=False)
        try:
            yield
            self._order.end()
        finally:
            self.zero.reshard()

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step: the next one begins."""
        self._order.begin(step=True)
        self.zero.zero_gradients()

    def refuse_unused(self, names: Sequence[str]) -> None:
        """ZeRO updates all elements."""
        raise no_gradient(names, self.name, "--strategy fsdp ")

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; the mean over ranks is DeepSpeed's, that over microbatches is in the loss."""
        loss = after_backward(self.scaler.scale(loss), self._gradient_watch.check)
        self.engine.backward(loss, scale_wrt_gas=False)
        if self._last:
            self._order.end_step([])

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients, summed over ranks; parameters without one count as zeros."""
        return self.zero.gradients()

    @torch.no_grad()
    def _unscale_gradients_(self) -> None:
        """Divide by the loss scale, once a step, and learn whether a gradient of some rank is not finite."""
        if self._found_inf is None:
            scale = self.scaler_tensors()["scale"]
            found_inf = torch.zeros(1, device=self.runtime.device)
            inverse = scale.double().reciprocal().float()
            torch._amp_foreach_non_finite_check_and_unscale_(self.gradients(), found_inf, inverse)
            dist.all_reduce(found_inf, dist.ReduceOp.MAX)
            self._found_inf = found_inf

    def update(self, leave_out: Tensor | None = None) -> None:
        """One update by DeepSpeed; fp16 skips it on the device when a gradient is not finite, and counts that."""
        if self.scaler.is_enabled():
            self._scaled_update()
        elif leave_out is None:
            self.engine.step()
        else:
            with self._found_inf_set(leave_out):
                self.engine.step()

    def _scaled_update(self) -> None:
        self._unscale_gradients_()
        assert self._found_inf is not None
        found_inf, self._found_inf = self._found_inf.squeeze(), None
        # as GradScaler.step does: the optimizer's kernel reads it, and leaves weights and state alone
        with self._found_inf_set(found_inf):
            self.engine.step()
        scaler, state = self.scaler, self.scaler_tensors()
        with torch.no_grad():
            torch._amp_update_scale_(
                state["scale"], state["growth_tracker"], found_inf, scaler.get_growth_factor(),
                scaler.get_backoff_factor(), scaler.get_growth_interval(),
            )  # fmt: skip
        self.skipped.add_(found_inf)

    def model_tensors(self) -> dict[str, Tensor]:
        """Every parameter and shared buffer by its name; zero3's parameters as this rank's elements of them."""
        parameters = {name: self.zero.shard(p) for name, p in named_parameters(self.module).items()}
        return {**parameters, **shared_buffers(self.module)}

    @property
    def optimizer_state(self) -> OptimizerState:
        """The inner optimizer's state by parameter name; what belongs to elements is cut as they are."""
        return FlatOptimizerState(self.optimizer, self.zero.partitions, self._groups, type(self.config.optim))

    def refresh_copies_(self) -> None:
        """Copy the weights to offloaded master copies, and gather again what stays gathered."""
        self.zero.refresh_copies_()

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's state dict in whole tensors on rank 0, {} elsewhere; all ranks together."""
        if self.stage < 3:
            return super().whole_weights()
        tensors = {**self.model_tensors(), **rank_buffers(self.module)}
        saved = self.gather({name: t for name, t in tensors.items() if name in self._aliases.values()})
        return {name: saved[canonical] for name, canonical in self._aliases.items() if canonical in saved}

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters of the model."""
        return sum(whole_numel(parameter) for parameter in self.module.parameters())

    def check(self) -> None:
        """Refuse what DeepSpeed cannot do, or cannot do as the other strategies do."""
        super().check()
        config = self.config
        require_installed(config.strategy)
        if config.unused_parameters != "refuse":
            raise ConfigError(f"--strategy {config.strategy} needs a gradient for every parameter in every step",
                              expected="--strategy ddp or fsdp", got=f"--unused-parameters {config.unused_parameters}",
                              fix="--strategy fsdp")  # fmt: skip
        usable = [name for name, row in OPTIMIZERS.items() if row.takes_flat_shards]
        if config.optim.name not in usable:
            raise ConfigError(f"--optim.name {config.optim.name} cannot update runs of elements, as --strategy "
                              f"{config.strategy} cuts parameters", expected=", ".join(usable),
                              got=config.optim.name, fix="--optim.name adamw, or --strategy auto")  # fmt: skip
        if self.runtime.device.type not in ("cpu", "cuda"):
            raise ConfigError(f"--strategy {config.strategy} on {self.runtime.device.type}", expected="cuda or cpu",
                              fix="--strategy auto")  # fmt: skip
        self._refuse_whole_compilation("blocks")
        # fused kernels skip an update by themselves
        fused = [name for name in reversed(usable) if self.runtime.device.type in OPTIMIZERS[name].fused_on]
        skipping = {"--precision fp16": "--precision bf16"} if config.precision == "fp16" else {}
        if config.on_nan != "raise":
            skipping[f"--on-nan {config.on_nan}"] = "--on-nan raise"
        if skipping and (config.optim.name not in fused or config.zero.offload != "none"):
            raise ConfigError(f"{' and '.join(skipping)} with --strategy {config.strategy} needs an optimizer that "
                              "skips bad updates on the device",
                              expected=f"{', '.join(fused[:-1])} or {fused[-1]}, and no --zero.offload",
                              got=f"--optim.name {config.optim.name} --zero.offload {config.zero.offload}",
                              fix=" ".join(skipping.values()))  # fmt: skip


def check_dtypes(module: nn.Module, strategy: str, *, trained_only: bool) -> None:
    """Refuse parameters that DeepSpeed cannot flatten into one tensor.

    Raises:
        ConfigError: naming one whose dtype differs from the first one's, or is not among DeepSpeed's.
    """
    parameters = [(n, p.dtype) for n, p in module.named_parameters() if p.requires_grad or not trained_only]
    first_name, first = parameters[0]
    for name, dtype in parameters:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16) or dtype != first:
            raise ConfigError(f"--strategy {strategy} takes parameters of one dtype: float32, bfloat16 or float16",
                              got=f"{dtype} for {name}" + (f", {first} for {first_name}" if dtype != first else ""),
                              expected="the same one of these for all; other tensors as buffers",
                              fix="--strategy fsdp")  # fmt: skip
