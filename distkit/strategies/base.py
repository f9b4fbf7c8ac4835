"""The interface of a strategy: lay the model over the ranks, backward, clip, update, and give access to the state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from distkit.config import TrainConfig, split_batch
from distkit.errors import ConfigError
from distkit.optim import OptimizerState, named_parameters, skips_on_device
from distkit.runtime.process import Runtime
from distkit.strategies.buffers import share_buffers_
from distkit.strategies.compiled import CompilerWatch, captures_graphs, refuse_accumulation
from distkit.strategies.parameters import OwnGradients, state_tensors
from distkit.strategies.precision import autocast
from distkit.tensors.buffers import shared_buffers
from distkit.tensors.finite import largest_magnitude


class Strategy(ABC):
    """How one model is laid over ranks. The only thing that wraps a model.

    A strategy must define `prepare` and `exchange_gradients`; everything else has a default
    for a model whose parameters, gradients and optimizer are whole on every rank.

    Attributes:
        name: as in --strategy; never "auto".
        module: the recipe's model; its parameters and buffers keep their canonical names.
        model: what the loss calls while training (wrapped, compiled).
        eval_model: what the loss calls while evaluating, inside `evaluating`, equally often on every rank.
        optimizer: the raw torch optimizer.
        scaler: fp16's gradient scaler; does nothing in the other precisions.
        skipped: updates that fp16 skipped, a 0-dim float32 tensor on the device.
        needs_forward: only a call of the whole model exchanges gradients or gathers parameters.
        keeps_changes: what a forward writes to parameters stays; False where it writes to gathered copies.
        reuses_outputs: a forward overwrites what the one before returned, as CUDA graphs do.
    """

    name: str
    module: nn.Module
    model: nn.Module
    eval_model: nn.Module
    optimizer: Optimizer
    needs_forward: bool = True
    keeps_changes: bool = True

    def __init__(self, config: TrainConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=config.precision == "fp16")
        self.skipped = torch.zeros((), device=runtime.device)
        self.reuses_outputs = runtime.device.type == "cuda" and captures_graphs(config)
        self._autocast = autocast(config.precision, runtime.device)
        self._parameters: list[nn.Parameter] = []
        self._own_gradients: OwnGradients | None = None
        self._compiler = CompilerWatch() if config.compile else None

    # --- what a strategy must define

    @abstractmethod
    def prepare(self, module: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Move `module` to the device, lay it over the ranks, then build the optimizer over the result.

        Sets `module`, `model`, `eval_model`, `optimizer`, and `_parameters`, those that this rank updates.
        """

    @abstractmethod
    def exchange_gradients(self, on: bool) -> None:
        """Say before a microbatch's forward whether its backward exchanges gradients between ranks."""

    # --- a step

    def precision(self) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        return self._autocast

    def gates(self) -> Sequence[tuple[nn.Module, nn.Module]] | None:
        """Where a forward waits for other ranks: from the first hook before the first module's forward to the last one
        before the second's. None: in other places, too."""
        return ()

    def zero_gradients(self) -> None:
        """Drop all gradients, so that the next backward writes instead of adds."""
        for parameter in self._parameters:
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (a scalar; scaled for fp16).

        Raises:
            ConfigError: the loss does not depend on some parameters, and the strategy needs a gradient for each.
        """
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def refuse_unused(self, names: Sequence[str]) -> None:  # noqa: B027  # the default does nothing
        """The first loss does not depend on the parameters `names`.

        Raises:
            ConfigError: the strategy needs a gradient for each.
        """

    def gradients(self) -> list[Tensor]:
        """The gradients of this rank's parameters; sparse ones as the dense tensor of their values."""
        gradients = []
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse:
                gradient = parameter.grad = gradient.coalesce()
                gradient = gradient._values()
            if gradient is not None:
                gradients.append(gradient)
        return gradients

    @torch.no_grad()
    def scale_gradients_(self, factor: Tensor) -> None:
        """Multiply every gradient by `factor`, a 0-dim tensor on the device."""
        gradients = self.gradients()
        if gradients:
            # offloaded ones are multiplied on the CPU, where the factor must have arrived: only then this waits
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))

    def clip_gradients_(self, measure: bool) -> Tensor | None:
        """Clip as configured; return the global L2 norm before clipping (0-dim, on the device).

        The norm is None where it is neither needed for clipping nor asked for by `measure`.
        """
        clip_norm, clip_value = self.config.max_grad_norm, self.config.max_grad_value
        if not measure and clip_norm is None and clip_value is None:
            return None
        with torch.no_grad():
            if self.scaler.is_enabled():
                self._unscale_gradients_()
            gradients = self.gradients()
            norm = self._total_norm(gradients) if measure or clip_norm is not None else None
            if clip_norm is not None and norm is not None:
                self._clip_with_norm_(clip_norm, norm)
            if clip_value is not None:
                gradients = [torch.view_as_real(each) if each.is_complex() else each for each in gradients]
                torch._foreach_clamp_min_(gradients, -clip_value)
                torch._foreach_clamp_max_(gradients, clip_value)
        return norm

    def watch_own_gradients(self) -> None:
        """From now on `own_gradients` tells what this rank's backwards gave, where ranks exchange gradients."""
        if self.runtime.world_size > 1:
            trained = [p for p in self.module.parameters() if p.requires_grad]
            self._own_gradients = OwnGradients(trained, self.runtime.device)

    def own_gradients(self) -> Tensor | None:
        """The largest magnitude of a gradient that this rank's backwards gave since the last call; never waits.

        Returns:
            0-dim float32 on the device, NaN or infinite where an element of one is; None where no one looks.
        """
        return None if self._own_gradients is None else self._own_gradients.take()

    @torch.no_grad()
    def largest_gradient(self) -> Tensor:
        """The same for the gradients of this rank's parameters after the exchange."""
        return largest_magnitude(self.gradients(), self.runtime.device)

    def _unscale_gradients_(self) -> None:
        """Divide fp16's gradients by the loss scale, once a step."""
        self.scaler.unscale_(self.optimizer)

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Global L2 norm over all parameters of the model, 0-dim (torch.nn.utils.get_total_norm)."""
        return get_total_norm(gradients)

    def _clip_with_norm_(self, max_norm: float, norm: Tensor) -> None:
        """Scale gradients by min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does."""
        clip_grads_with_norm_(self._parameters, max_norm, norm)

    def update(self, leave_out: Tensor | None = None) -> None:
        """One optimizer update; fp16 skips it on the device when a gradient is not finite, and counts that.

        Args:
            leave_out: bool, 0-dim on the device, the same on all ranks: True leaves weights and optimizer as they are.
                Optimizers that can (`skips_on_device`) read it on the device, for others the host waits for it. Not
                with fp16, whose scaler judges by the gradients alone.
        """
        if self.scaler.is_enabled():
            self._scaled_update()
        elif leave_out is None:
            self.optimizer.step()
        elif skips_on_device(self.optimizer):
            with self._found_inf_set(leave_out):
                self.optimizer.step()
        elif not leave_out:
            self.optimizer.step()

    def _scaled_update(self) -> None:
        self.scaler.step(self.optimizer)
        for found_inf in self.scaler._found_inf_per_device(self.optimizer).values():
            self.skipped.add_(found_inf)
        self.scaler.update()

    @contextmanager
    def _found_inf_set(self, leave_out: Tensor) -> Iterator[None]:
        """Inside, the optimizer's kernels read `leave_out`, as they read what fp16's scaler has found."""
        self.optimizer.found_inf = leave_out.float()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]

    def update_with_closure(self, closure: Callable[[], Tensor]) -> None:
        """One update of an optimizer that evaluates the loss itself (LBFGS); `closure` computes gradients and loss."""
        self.optimizer.step(closure)  # type: ignore[arg-type]  # torch types the closure as returning float

    @property
    def needs_closure(self) -> bool:
        """True for optimizers that evaluate the loss several times a step."""
        return self.config.optim.needs_closure

    def synchronize_buffers_(self, averages: Sequence[Tensor]) -> list[str]:
        """Give every rank the buffers that a checkpoint would hold, rank 0's, and their `averages`.

        Returns:
            names of those that differed although they are no statistics.
        """
        return share_buffers_(self.module, averages, self.runtime)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation and everything that changes the weights for it."""
        yield

    # --- the state

    def model_tensors(self) -> dict[str, Tensor]:
        """Every parameter and shared buffer of the model by its canonical name, tied ones once; all ranks together.

        Plain tensors hold the same values on every rank, DTensors and FlatShards this rank's part.
        """
        return {**dict(self.module.named_parameters()), **shared_buffers(self.module)}

    @property
    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state by parameter name."""
        return OptimizerState(self.optimizer, named_parameters(self.module), type(self.config.optim))

    def learned_tensors(self) -> Mapping[str, Tensor]:
        """Model and optimizer, as `model/NAME` and `optimizer/PARAMETER/KEY`, numbers as 0-dim tensors; all ranks.

        The same names for every strategy; values may be DTensors or FlatShards.
        """
        tensors = {f"model/{name}": tensor for name, tensor in self.model_tensors().items()}
        return tensors | {f"optimizer/{name}": value for name, value in self.optimizer_state.all_values().items()}

    def scaler_tensors(self) -> dict[str, Tensor]:
        """The live state of fp16's scaler, 0-dim tensors to be read or written in place; empty in other precisions."""
        if not self.scaler.is_enabled():
            return {}
        if self.scaler._scale is None:  # it is made when the first loss is scaled
            self.scaler._lazy_init_scale_growth_tracker(self.runtime.device)
        scale, growth_tracker = self.scaler._scale, self.scaler._growth_tracker
        assert scale is not None
        assert growth_tracker is not None
        return {"scale": scale, "growth_tracker": growth_tracker, "skipped": self.skipped}

    def refresh_copies_(self) -> None:  # noqa: B027  # the default does nothing
        """Copy weights that were written into `model_tensors` to wherever else the strategy keeps them; all ranks."""

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's state dict in whole tensors on rank 0, {} elsewhere; all ranks together."""
        return self.gather(state_tensors(self.module))

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole `tensors` (names in the same order everywhere) on rank 0, {} elsewhere; all ranks together."""
        return dict(tensors) if self.runtime.is_main_process else {}

    # --- descriptions

    @property
    def model_name(self) -> str:
        """The class of the recipe's model."""
        return type(self.module).__name__

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters of the model."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def describe(self) -> str:
        """The strategy in a few words, for people."""
        return self.name

    def compiler_notes(self) -> list[str]:
        """Graph breaks and recompilations since the last call, in lines; [] without --compile. Nothing waits for it."""
        return [] if self._compiler is None else self._compiler.lines()

    def skip_compiler_notes(self) -> None:
        """Drop those until now, which were expected."""
        if self._compiler is not None:
            self._compiler.skip()

    def check(self) -> None:
        """Refuse what this strategy, its device and the optimizer cannot do together.

        Raises:
            ConfigError: naming the flag to change.
        """
        config, optim = self.config, self.config.optim
        if self.reuses_outputs:
            refuse_accumulation(config, split_batch(config, self.runtime.world_size).accum_steps)
        if optim.flattens_parameters and config.channels_last:
            raise ConfigError(f"--optim.name {optim.name} needs contiguous weights", expected="no --channels-last",
                              fix="--no-channels-last")  # fmt: skip
        if self.needs_closure and (config.max_grad_norm is not None or config.max_grad_value is not None):
            raise ConfigError(f"--optim.name {optim.name} searches along unclipped gradients", expected="no clipping",
                              fix="--max-grad-norm None --max-grad-value None")  # fmt: skip
