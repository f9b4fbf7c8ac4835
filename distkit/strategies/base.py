"""What the engine asks of a strategy: lay the model over the ranks, backward, clip, update, give up its state."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from distkit.config import TrainConfig, split_batch
from distkit.errors import ConfigError
from distkit.optim import (
    allocate_optimizer_state,
    compare_optimizers,
    install_optimizer_state,
    named_optimizer_state,
    optimizer_structure,
    optimizer_tensors,
)
from distkit.runtime.process import Runtime
from distkit.strategies.blocks import captures_graphs, refuse_accumulation
from distkit.strategies.parameters import GradientWatch, state_tensors

if TYPE_CHECKING:
    from distkit.strategies.compiled import CompilerWatch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Strategy(ABC):
    """How one model is laid over ranks. The only thing that wraps a model.

    Attributes:
        module: the recipe's model; its parameters and buffers keep their canonical names.
        model: what the loss calls while training (wrapped, compiled).
        eval_model: what the loss calls while evaluating, inside `evaluating`, as often on every rank.
        optimizer: the raw torch optimizer.
        scaler: fp16's gradient scaler; passes everything through in the other precisions.
        skipped: updates that fp16 skipped, a 0-dim float32 tensor on the device.
        reuses_outputs: a forward writes over what the one before returned, as CUDA graphs do.
    """

    name: str
    module: nn.Module
    model: nn.Module
    eval_model: nn.Module
    optimizer: Optimizer

    def __init__(self, config: TrainConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=config.precision == "fp16")
        self.skipped = torch.zeros((), device=runtime.device)
        self.reuses_outputs = runtime.device.type == "cuda" and captures_graphs(config)
        self._autocast = self._make_autocast()
        self._parameters: list[nn.Parameter] = []
        self._first_gradients: GradientWatch | None = None
        self._watch: CompilerWatch | None = None
        if config.compile:
            from distkit.strategies.compiled import CompilerWatch  # it imports the compiler

            self._watch = CompilerWatch()

    @abstractmethod
    def prepare(self, module: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Move `module` to the device, lay it over the ranks, then build the optimizer over what came out."""

    @abstractmethod
    def exchange_gradients(self, on: bool) -> None:
        """Say before a microbatch's forward whether its backward exchanges gradients between ranks."""

    @abstractmethod
    def synchronize_buffers_(self, averages: Sequence[Tensor]) -> None:
        """Give every rank the buffers (BatchNorm statistics) that a checkpoint would hold, and their `averages`."""

    def _make_autocast(self) -> AbstractContextManager[object]:
        dtype = AUTOCAST.get(self.config.precision)
        if dtype is None:
            return nullcontext()
        device = self.runtime.device
        # torch would emulate it, at a fraction of the speed of fp32
        if dtype is torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            raise ConfigError("--precision bf16 needs an NVIDIA GPU of compute capability 8.0 or later",
                              got=torch.cuda.get_device_name(device), fix="--precision fp16")  # fmt: skip
        # weights change every step, and accumulation re-enters: torch drops the cast copies at each exit
        return torch.autocast(device.type, dtype=dtype)

    def precision(self) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        return self._autocast

    def zero_gradients(self) -> None:
        """Drop all gradients, so that the next backward writes instead of adds."""
        for parameter in self._parameters:
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (a scalar; scaled for fp16)."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def gradients(self) -> list[Tensor]:
        """The gradients of this rank's parameters; sparse ones as the dense tensor of their values."""
        found = []
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse:
                gradient = parameter.grad = gradient.coalesce()
                gradient = gradient._values()
            if gradient is not None:
                found.append(gradient)
        return found

    @torch.no_grad()
    def scale_gradients_(self, factor: Tensor) -> None:
        """Multiply every gradient by `factor`, a 0-dim tensor on the device."""
        gradients = self.gradients()
        if gradients:
            # offloaded ones are multiplied on the CPU, where the factor must have arrived: this waits, and only then
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))

    def clip_gradients_(self, measure: bool) -> Tensor | None:
        """Clip as configured; return the global L2 norm before clipping (0-dim, on the device).

        The norm is None where it is neither needed for clipping nor asked for by `measure`.
        """
        clip_norm, clip_value = self.config.max_grad_norm, self.config.max_grad_value
        if not measure and clip_norm is None and clip_value is None:
            return None
        return self._clip_gradients_(measure)

    @torch.no_grad()
    def _clip_gradients_(self, measure: bool) -> Tensor | None:
        clip_norm, clip_value = self.config.max_grad_norm, self.config.max_grad_value
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        gradients = self.gradients()
        norm = self.total_norm(gradients) if measure or clip_norm is not None else None
        if clip_norm is not None and norm is not None:
            self.clip_with_norm_(clip_norm, norm)
        if clip_value is not None:
            torch._foreach_clamp_min_(gradients, -clip_value)
            torch._foreach_clamp_max_(gradients, clip_value)
        return norm

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Global L2 norm over all parameters of the model, 0-dim (torch.nn.utils.get_total_norm)."""
        return get_total_norm(gradients)

    def clip_with_norm_(self, max_norm: float, norm: Tensor) -> None:
        """Scale gradients by min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does."""
        clip_grads_with_norm_(self._parameters, max_norm, norm)

    def check_gradients(self) -> None:
        """Once, where the strategy needs a gradient for each parameter: name those without (`ConfigError`)."""
        if self._first_gradients is not None:
            watch, self._first_gradients = self._first_gradients, None
            watch.check()

    def update(self) -> None:
        """One optimizer update; fp16 skips it on the device when a gradient is not finite, and counts that."""
        self.check_gradients()
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return
        self.scaler.step(self.optimizer)
        for found_inf in self.scaler._found_inf_per_device(self.optimizer).values():
            self.skipped.add_(found_inf)
        self.scaler.update()

    def update_with_closure(self, closure: Callable[[], Tensor]) -> None:
        """One update of an optimizer that evaluates the loss itself (LBFGS); `closure` computes gradients and loss."""
        self.optimizer.step(closure)  # type: ignore[arg-type]  # torch types the closure as returning float

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

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation and everything that changes the weights for it."""
        yield

    def model_tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the model by its canonical name, tied ones once; all ranks together.

        Plain tensors hold the same values on every rank, DTensors this rank's part.
        """
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    @property
    def model_name(self) -> str:
        """The class of the recipe's model."""
        return type(self.module).__name__

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters of the model."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The tensors of the optimizer's state, as `PARAMETER/KEY`; all ranks together."""
        return optimizer_tensors(self.optimizer, self.module)

    def optimizer_structure(self) -> dict[str, object]:
        """Everything else of the optimizer's state, ready for JSON (distkit.optim.optimizer_structure)."""
        return optimizer_structure(self.optimizer, self.module)

    def learned_tensors(self) -> Mapping[str, Tensor]:
        """Model and optimizer, as `model/NAME` and `optimizer/PARAMETER/KEY`, numbers as 0-dim tensors; all ranks.

        The same names for every strategy; values may be DTensors.
        """
        tensors = {f"model/{name}": tensor for name, tensor in self.model_tensors().items()}
        state = named_optimizer_state(self.optimizer, self.module)
        return tensors | {f"optimizer/{name}": tensor for name, tensor in state.items()}

    def compare_optimizer(self, structure: Mapping[str, object]) -> list[str]:
        """Why a saved optimizer does not fit, in lines; [] if it does (distkit.optim.compare_optimizers)."""
        return compare_optimizers(structure, self.optimizer, self.module)

    def allocate_optimizer(
        self, structure: Mapping[str, object], forms: Mapping[str, tuple[torch.dtype, Sequence[int]]]
    ) -> dict[str, Tensor]:
        """Tensors that take a saved optimizer's state, by name; nothing of this run changes yet.

        Args:
            structure: from `optimizer_structure`.
            forms: dtype and shape of each saved tensor, under the names of `optimizer_tensors`.
        """
        return allocate_optimizer_state(self.optimizer, self.module, structure, forms)

    def install_state(
        self, structure: Mapping[str, object], model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        """Go on with a saved state, when all of it has been read; all ranks together.

        Args:
            structure: from `optimizer_structure`.
            model: what `model_tensors` gave, filled in place.
            optimizer: what `allocate_optimizer` gave, filled.
        """
        self.install_weights(model)
        install_optimizer_state(self.optimizer, self.module, structure, optimizer)

    def install_weights(self, model: Mapping[str, Tensor]) -> None:
        """Start from weights alone: `model` is what `model_tensors` gave, filled in place; all ranks together."""
        del model  # its tensors are the model's own

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's state dict in whole tensors on rank 0, {} elsewhere; all ranks together."""
        return self.gather(state_tensors(self.module))

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` (names in the same order everywhere) in whole on rank 0, {} elsewhere; all ranks together."""
        return dict(tensors) if self.runtime.is_main_process else {}

    def compiler_notes(self) -> list[str]:
        """Graph breaks and recompilations since the last call, in lines; [] without --compile. Nothing waits for it."""
        return [] if self._watch is None else self._watch.lines()

    def skip_compiler_notes(self) -> None:
        """Those until now were expected."""
        if self._watch is not None:
            self._watch.skip()

    @property
    def needs_closure(self) -> bool:
        """True for optimizers that evaluate the loss several times a step."""
        return self.config.optim.name == "lbfgs"

    def describe(self) -> str:
        """The strategy in a few words, for people."""
        return self.name

    def check(self) -> None:
        """Refuse what this strategy's device and optimizer cannot do together.

        Raises:
            ConfigError: naming the flag to change.
        """
        config, device = self.config, self.runtime.device
        if config.precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
            raise ConfigError("--precision tf32 needs an NVIDIA GPU of compute capability 8.0 or later",
                              got=f"device {device}", fix="--precision fp32")  # fmt: skip
        if self.reuses_outputs:
            refuse_accumulation(config, split_batch(config, self.runtime.world_size).accum_steps)
        if self.needs_closure and config.channels_last:
            raise ConfigError("--optim.name lbfgs needs contiguous weights", expected="no --channels-last",
                              fix="--no-channels-last")  # fmt: skip
        clips = config.max_grad_norm is not None or config.max_grad_value is not None
        if self.needs_closure and clips:
            raise ConfigError("--optim.name lbfgs searches along unclipped gradients", expected="no clipping",
                              fix="--max-grad-norm None --max-grad-value None")  # fmt: skip


def set_fp32_precision(precision: str) -> None:
    """fp32 means IEEE fp32, also in cuDNN's convolutions, where torch's default is tf32 (torch.backends docs)."""
    tf32 = precision == "tf32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there are newer names
        # who asks by the older names (inductor's convolutions, cudnn.flags) gets an error where the two say different
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    choice = "tf32" if tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = choice
    torch.backends.cudnn.conv.fp32_precision = choice  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = choice  # type: ignore[attr-defined]
