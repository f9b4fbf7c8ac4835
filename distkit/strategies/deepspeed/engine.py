"""DeepSpeed's engine around a model and an optimizer, made by Accelerate's plugin."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distkit.errors import ConfigError
from distkit.strategies.deepspeed.config import Section

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def require_installed(strategy: str) -> None:
    """Refuse to start without DeepSpeed, or transformers, which Accelerate's plugin imports.

    Raises:
        ConfigError: naming what is missing.
    """
    if missing := [name for name in ("deepspeed", "transformers") if find_spec(name) is None]:
        raise ConfigError(f"--strategy {strategy} needs {' and '.join(missing)}", got="not installed",
                          fix='pip install "distkit[deepspeed]"')  # fmt: skip


def start_engine(
    module: nn.Module, optimizer: Optimizer, section: Section, device: torch.device, *, from_file: bool
) -> DeepSpeedEngine:
    """Lay `module` and `optimizer` over the ranks as `section` says; all ranks together.

    Args:
        from_file: some of `section` comes from a user's file.

    Raises:
        ConfigError: DeepSpeed knows no such option, or not with this value.
    """
    # left set: DeepSpeed reads it now and later
    os.environ["DS_ACCELERATOR"] = device.type
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment
    from deepspeed.runtime.config import DeepSpeedConfigError

    with patch_environment(
        accelerate_use_deepspeed="true",
        # with these Accelerate would turn DeepSpeed into DDP, or take a GPU that was not asked for
        accelerate_use_cpu="false",
        accelerate_use_parallelism_config="false",
        # the names of what a launcher's file says, which Accelerate would compare with a whole configuration
        accelerate_config_ds_fields="",
        accelerate_torch_device=str(device),
    ):
        _quieten()
        _check_options(section)
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this process
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
            if not from_file:
                raise
            raise ConfigError("--zero.config holds options that DeepSpeed rejects", expected="consistent options",
                              got=error, fix="see DeepSpeed's documentation of its JSON") from error  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
    return cast("DeepSpeedEngine", engine)


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
    """The block's input, with a gradient: its arrival tells DeepSpeed that those of the block are complete.

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


def _quieten() -> None:
    """Keep DeepSpeed's progress off stdout, and use torch's collectives on the CPU.

    DeepSpeed's own for the CPU are compiled at the first start, and wait forever for a rank that is gone.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
