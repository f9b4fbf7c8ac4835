"""DeepSpeed's engine around a model and an optimizer, by way of Accelerate's plugin."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distkit.errors import ConfigError
from distkit.strategies.deepspeed.config import Section

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Measures(Protocol):
    """What is replaced of DeepSpeed's optimizers."""

    scaled_global_norm: Callable[..., float]
    update_offload_overflow_tracker: Callable[[Tensor], None]
    _get_norm_groups: Callable[[], list[Tensor]]


def require_installed(strategy: str) -> None:
    """Say what to install where DeepSpeed is not there, or transformers, which Accelerate's plugin imports.

    Raises:
        ConfigError: naming what is missing.
    """
    if missing := [name for name in ("deepspeed", "transformers") if find_spec(name) is None]:
        raise ConfigError(f"--strategy {strategy} needs {' and '.join(missing)}", got="not installed",
                          fix='pip install "distkit[deepspeed]"')  # fmt: skip


def start_engine(
    module: nn.Module, optimizer: Optimizer, section: Section, device: torch.device, *, own: bool
) -> DeepSpeedEngine:
    """Lay `module` and `optimizer` over the ranks as `section` says; all ranks together.

    Args:
        own: some of `section` comes from a user's file.

    Raises:
        ConfigError: DeepSpeed knows no such option, or not with this value.
    """
    settings = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        # with these Accelerate would turn DeepSpeed into DDP, or take a GPU that nobody asked for
        "ACCELERATE_USE_CPU": None,
        "ACCELERATE_USE_PARALLELISM_CONFIG": None,
        # the names of what a launcher's file says, which Accelerate would hold against a whole configuration
        "ACCELERATE_CONFIG_DS_FIELDS": None,
        "ACCELERATE_TORCH_DEVICE": str(device),
    }
    # for good: DeepSpeed looks at it now and later
    os.environ["DS_ACCELERATOR"] = device.type
    with _environment(settings):
        from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
        from accelerate.state import AcceleratorState
        from deepspeed.runtime.config import DeepSpeedConfigError

        _quieten()
        _check_options(section)
        AcceleratorState._reset_state(reset_partial_state=True)  # a run before in this process
        accelerator = Accelerator(
            mixed_precision="no",
            dynamo_backend="no",
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=section),
            gradient_accumulation_steps=cast(int, section["gradient_accumulation_steps"]),
            kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if device.type == "cuda" else "gloo")],
        )
        try:
            engine, _ = accelerator.prepare(module, optimizer)
        except (AssertionError, DeepSpeedConfigError) as error:
            if not own:
                raise
            raise ConfigError("--zero.config holds what DeepSpeed refuses", expected="options that fit each other",
                              got=error, fix="see DeepSpeed's documentation of its JSON") from error  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
    return cast("DeepSpeedEngine", engine)


def measure_nothing_(zero: Measures) -> None:
    """Take the norm out of DeepSpeed's step: where it offloads, and in stage 3, it measures one and waits for it.

    Clipping and reports have their own. A gradient that is not finite is then seen in the loss, as everywhere;
    DeepSpeed would go on without the update and say nothing.
    """
    zero.scaled_global_norm = lambda norm_type=2.0: 1.0  # noqa: ARG005
    zero.update_offload_overflow_tracker = lambda gradient: None  # noqa: ARG005
    # of stage 3; on the CPU, so that looking at it waits for nothing
    zero._get_norm_groups = lambda: [torch.ones((), device="cpu")]


def gather_whole_(blocks: Sequence[nn.Module]) -> None:
    """Let zero3 gather all of a block before its forward; its hooks on each part would split what is compiled.

    Blocks without parts have no such hooks, and frozen parameters cannot be in a block that is gathered whole.
    """
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        if next(block.children(), None) is not None and all(p.requires_grad for p in block.parameters()):
            block.register_forward_pre_hook(_with_gradient)
            set_z3_leaf_module(block, True)


def _with_gradient(block: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
    """The block's input, with a gradient: its arrival is what tells DeepSpeed that those of the block are complete.

    Raises:
        ConfigError: the block takes no tensor that can have one.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    if not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in tensors):
        return args
    if not tensors:
        raise ConfigError(f"--compile with --strategy zero3: {type(block).__name__} is called without a floating-point "
                          "tensor as a positional argument", expected="one", fix="--no-compile")  # fmt: skip
    return tuple(arg.detach().requires_grad_() if arg is tensors[0] else arg for arg in args)


def _check_options(section: Section) -> None:
    """Ask DeepSpeed about zero_optimization, in which it refuses what it does not know; elsewhere it ignores that."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**cast(dict[str, object], section["zero_optimization"]))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"--zero.config: DeepSpeed does not take zero_optimization.{name}", expected=first["msg"],
                          got=first["input"], fix="see DeepSpeed's documentation of its JSON") from error  # fmt: skip


@contextmanager
def _environment(settings: Mapping[str, str | None]) -> Iterator[None]:
    """Inside, the process has these variables (None: not); afterwards its own again."""
    before = {name: os.environ.get(name) for name in settings}
    _set_variables(settings)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _quieten() -> None:
    """DeepSpeed without its progress on stdout, and on the CPU with torch's collectives.

    Its own ones for the CPU are compiled at the first start, and wait forever for a rank that is gone.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
