"""zero1, zero2, zero3: DeepSpeed cuts optimizer state, gradients and parameters over the ranks.

Prepared by Accelerate's DeepSpeed plugin. DeepSpeed's engine exchanges gradients and updates; weighting and clipping
are done here, on its partitions, between the two, so that all strategies do the same and nothing is measured twice.

Weights stay fp32 and forward passes are autocast by torch, in every precision: DeepSpeed's own 16-bit engines would
keep 16-bit weights and run norms and losses in them, which no other strategy does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from distkit.config import TrainConfig, split_batch
from distkit.errors import ConfigError
from distkit.optim import (
    allocate_optimizer_state,
    compare_optimizers,
    install_optimizer_state,
    named_optimizer_state,
    named_parameters,
    optimizer_structure,
    optimizer_tensors,
)
from distkit.runtime.process import Runtime
from distkit.strategies.blocks import compile_, recompute_activations_, repeated_blocks
from distkit.strategies.deepspeed.config import deepspeed_config
from distkit.strategies.deepspeed.scaling import LossScaling
from distkit.strategies.deepspeed.start import gather_whole_, measure_nothing_, require_installed, start_engine
from distkit.strategies.deepspeed.state import (
    ParameterView,
    Zero,
    Zero3,
    flat_partitions,
    flat_partitions_3,
    shard_of,
    unequal_groups,
    whole_shape,
)
from distkit.strategies.parameters import GradientWatch, refuse_scalars, state_dict_names, state_tensors
from distkit.strategies.sharded import Sharded

#: Optimizers that treat each element by itself, so that they can update a run of elements of any parameters.
ELEMENTWISE = ("sgd", "adam", "adamw", "adamax", "nadam", "radam", "rmsprop", "rprop", "adadelta", "asgd")


class DeepSpeed(Sharded):
    """`model` is DeepSpeed's engine; `optimizer` the inner one, whose parameters are flat partitions."""

    def __init__(self, config: TrainConfig, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        self.name = config.strategy
        self.stage = int(config.strategy[-1])
        self._scaling = LossScaling(self.scaler, runtime.device)

    def prepare(self, module: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Choose what is recomputed and compiled, build the optimizer, hand both to DeepSpeed."""
        config = self.config
        refuse_scalars(module, self.name)
        self.module = module.to(self.runtime.device)
        recompute_activations_(module, config.activation_checkpointing)
        if config.compile:
            compile_(module, config, "blocks")
            if self.stage == 3:
                gather_whole_(repeated_blocks(module))
        parameters = named_parameters(module)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        # now: ZeRO 3 gives the state dict other tensors
        self._aliases = state_dict_names(module)
        self.optimizer = build_optimizer(module)
        self._groups = [[self._names[p] for p in group["params"]] for group in self.optimizer.param_groups]
        self.optimizer.state.clear()  # that of parameters which it will not see again
        numel = sum(p.numel() for p in parameters.values())
        pinned = self.runtime.device.type == "cuda"
        split = split_batch(config, self.runtime.world_size)
        section = deepspeed_config(config, split, self.stage, numel, pinned=pinned)
        own = config.zero.config is not None
        self.engine = start_engine(module, self.optimizer, section, self.runtime.device, own=own)
        self.model, self.eval_model = cast(nn.Module, self.engine), module
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self._first_gradients = GradientWatch(trained, self.name)
        self._adopt()

    def _adopt(self) -> None:
        """Find DeepSpeed's partitions, and let fp32 weights be their own master copy."""
        zero = self.engine.optimizer
        assert zero.optimizer is self.optimizer, type(zero.optimizer)
        # gradients are unscaled here
        zero.torch_autocast_gradscaler = None
        # and measured
        measure_nothing_(zero)
        if self.stage == 3:
            self._zero3 = cast(Zero3, zero)
            weights = self._zero3.fp16_partitioned_groups_flat
            for master, flat in zip(self._zero3.fp32_partitioned_groups_flat, weights, strict=True):
                # DeepSpeed means to do so itself, but compares a device with the name of one
                if master.device.type == flat.device.type and not self._zero3.offload_optimizer:
                    master.data = flat
            self._partitions = flat_partitions_3(self._zero3, self._names)
        else:
            self._zero = cast(Zero, zero)
            if not self._zero.cpu_offload:
                for group, master in enumerate(self._zero.single_partition_of_fp32_groups):
                    master.data = self._zero.parallel_partitioned_bit16_groups[group][self.runtime.rank]
                self._zero._link_all_hp_params()
            self._partitions = flat_partitions(self._zero, self._names)
        if isinstance(self.optimizer, SGD):
            _fill_momentum_(self.optimizer, [(p.flat, p.group) for p in self._partitions])

    def exchange_gradients(self, on: bool) -> None:
        """zero1 exchanges once a step; zero2 and zero3 hold only parts of gradients, so each backward exchanges."""
        self.engine.set_gradient_accumulation_boundary(on)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Afterwards zero3 has nothing gathered: a forward without a backward leaves what it used."""
        try:
            yield
        finally:
            if self.stage == 3:
                self._zero3._partition_all_parameters()

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """DeepSpeed drops gradients itself; zero3 would take an old one where a backward gives none."""
        if self.stage == 3 and not self._zero3.offload_optimizer:
            self._zero3.grad_partitions_flat_buffer.zero_()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; the mean over ranks is DeepSpeed's, that over microbatches is in the loss."""
        self.engine.backward(self.scaler.scale(loss), scale_wrt_gas=False)

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients, summed over ranks; parameters without one count as zeros."""
        if self.stage == 3:
            zero3 = self._zero3
            if zero3.offload_optimizer:
                return _there(p.flat.grad for p in self._partitions)
            return [part for parts in zero3.averaged_gradients.values() for part in parts or ()]
        if self._zero.cpu_offload:
            self._zero._wait_for_offload_copies()
            return _there(p.flat.grad for p in self._partitions)
        return [part for parts in self._zero.averaged_gradients.values() for part in parts or ()]

    @torch.no_grad()
    def _clip_gradients_(self, measure: bool) -> Tensor | None:
        if self.scaler.is_enabled():
            self._scaling.unscale_(self.gradients())
        scaler, self.scaler = self.scaler, torch.amp.GradScaler(enabled=False)
        try:
            return super()._clip_gradients_(measure)
        finally:
            self.scaler = scaler

    def update(self) -> None:
        """One update by DeepSpeed; fp16 skips it on the device when a gradient is not finite, and counts that."""
        self.check_gradients()
        if self.scaler.is_enabled():
            self.skipped.add_(self._scaling.update(self.gradients(), self.optimizer, self.engine.step))
            return
        self.engine.step()

    def model_tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by its canonical name; zero3's parameters as this rank's elements of them."""
        found: dict[str, Tensor] = dict(named_parameters(self.module).items())
        if self.stage == 3:
            found = {name: shard_of(parameter) for name, parameter in found.items()}
        return {**found, **dict(self.module.named_buffers())}

    def _view(self) -> ParameterView:
        return ParameterView(self.optimizer, self._partitions, self._groups)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The tensors of the optimizer's state, as `PARAMETER/KEY`; what belongs to elements is cut as they are."""
        view = self._view()
        return optimizer_tensors(view.optimizer, view.module)

    def optimizer_structure(self) -> dict[str, object]:
        """Everything else of the optimizer's state, as another strategy would describe it."""
        view = self._view()
        return optimizer_structure(view.optimizer, view.module)

    def learned_tensors(self) -> Mapping[str, Tensor]:
        """Model and optimizer, as `model/NAME` and `optimizer/PARAMETER/KEY`."""
        view = self._view()
        tensors = {f"model/{name}": tensor for name, tensor in self.model_tensors().items()}
        state = named_optimizer_state(view.optimizer, view.module)
        return tensors | {f"optimizer/{name}": tensor for name, tensor in state.items()}

    def compare_optimizer(self, structure: Mapping[str, object]) -> list[str]:
        """Why a saved optimizer does not fit, in lines; [] if it does."""
        view = self._view()
        return compare_optimizers(structure, view.optimizer, view.module) or unequal_groups(structure, self._groups)

    def allocate_optimizer(
        self, structure: Mapping[str, object], forms: Mapping[str, tuple[torch.dtype, Sequence[int]]]
    ) -> dict[str, Tensor]:
        """Tensors that take this rank's elements of a saved optimizer's state, by name."""
        view = self._view()
        return allocate_optimizer_state(view.optimizer, view.module, structure, forms)

    def install_state(
        self, structure: Mapping[str, object], model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        """Go on with a saved state, when all of it has been read; all ranks together.

        Raises:
            CheckpointError: it cannot be that of flat partitions.
        """
        view = self._view()
        install_optimizer_state(view.optimizer, view.module, structure, optimizer)
        view.install()
        self.install_weights(model)

    @torch.no_grad()
    def install_weights(self, model: Mapping[str, Tensor]) -> None:
        """The model's tensors have new values: give them to offloaded master copies, and to what stays gathered."""
        del model  # its tensors are the model's own
        if self.stage < 3:
            if self._zero.cpu_offload:
                for group, master in enumerate(self._zero.single_partition_of_fp32_groups):
                    master.copy_(self._zero.parallel_partitioned_bit16_groups[group][self.runtime.rank])
            return
        zero3 = self._zero3
        for master, weights in zip(zero3.fp32_partitioned_groups_flat, zero3.fp16_partitioned_groups_flat, strict=True):
            if master.data_ptr() != weights.data_ptr():
                master.copy_(weights)
        if kept := zero3.persistent_parameters:
            kept[0].all_gather(kept)

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's state dict in whole tensors on rank 0, {} elsewhere; all ranks together."""
        if self.stage < 3:
            return self.gather(state_tensors(self.module))
        found = self.gather({name: t for name, t in self.model_tensors().items() if name in self._aliases.values()})
        return {name: found[canonical] for name, canonical in self._aliases.items()} if found else {}

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters of the model."""
        return sum(whole_shape(parameter).numel() for parameter in self.module.parameters())

    def check(self) -> None:
        """Refuse what DeepSpeed cannot do, or cannot do as the other strategies do."""
        super().check()
        config = self.config
        require_installed(config.strategy)
        if config.optim.name not in ELEMENTWISE:
            raise ConfigError(f"--optim.name {config.optim.name} cannot update runs of elements, as --strategy "
                              f"{config.strategy} cuts parameters", expected=", ".join(ELEMENTWISE),
                              got=config.optim.name, fix="--optim.name adamw, or --strategy auto")  # fmt: skip
        if self.runtime.device.type not in ("cpu", "cuda"):
            raise ConfigError(f"--strategy {config.strategy} on {self.runtime.device.type}", expected="cuda or cpu",
                              fix="--strategy auto")  # fmt: skip
        if config.compile and config.compile_scope == "whole":
            raise ConfigError(f"--compile-scope whole with --strategy {config.strategy}",
                              expected="blocks", got="whole", fix="--compile-scope blocks")  # fmt: skip
        if config.precision == "fp16" and (
            config.optim.name not in ("sgd", "adam", "adamw") or config.zero.offload != "none"
        ):
            raise ConfigError(f"--precision fp16 with --strategy {config.strategy} needs an optimizer that skips bad "
                              "updates on the device", expected="adamw, adam or sgd, and no --zero.offload",
                              got=f"--optim.name {config.optim.name} --zero.offload {config.zero.offload}",
                              fix="--precision bf16")  # fmt: skip


def _there(gradients: Iterator[Tensor | None]) -> list[Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


@torch.no_grad()
def _fill_momentum_(optimizer: Optimizer, partitions: Sequence[tuple[Tensor, int]]) -> None:
    """Momentum of 0 for fused SGD, as distkit.optim.build fills it in for whole parameters."""
    for flat, group in partitions:
        settings = optimizer.param_groups[group]
        if settings["momentum"] and settings.get("fused"):
            optimizer.state[flat]["momentum_buffer"] = torch.zeros_like(flat)
