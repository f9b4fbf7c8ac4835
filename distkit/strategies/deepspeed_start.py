"""DeepSpeed's engine around a model and an optimizer, by way of Accelerate's plugin."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.optim import Optimizer

from distkit.errors import ConfigError
from distkit.strategies.deepspeed_config import Section

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def start_engine(module: nn.Module, optimizer: Optimizer, section: Section, device: torch.device) -> DeepSpeedEngine:
    """Lay `module` and `optimizer` over the ranks as `section` says; all ranks together.

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
        engine, _ = accelerator.prepare(module, optimizer)
        AcceleratorState._reset_state(reset_partial_state=True)
    return cast("DeepSpeedEngine", engine)


def gather_whole_(blocks: Sequence[nn.Module]) -> None:
    """Let zero3 gather all of a block before its forward; its hooks on each part would split what is compiled."""
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        set_z3_leaf_module(block, True)


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
