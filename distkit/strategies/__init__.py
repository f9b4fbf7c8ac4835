"""How one model is laid over ranks: one class a strategy, chosen in one table."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distkit.config import TrainConfig
from distkit.errors import ConfigError
from distkit.runtime.process import Runtime
from distkit.strategies.base import Strategy
from distkit.strategies.data_parallel import DataParallel
from distkit.strategies.precision import set_fp32_precision

__all__ = ["Strategy", "build_strategy", "set_fp32_precision"]


def _fully_sharded(config: TrainConfig, runtime: Runtime) -> Strategy:
    from distkit.strategies.fsdp import FullySharded

    return FullySharded(config, runtime)


def _deepspeed(config: TrainConfig, runtime: Runtime) -> Strategy:
    from distkit.strategies.deepspeed.strategy import DeepSpeed

    return DeepSpeed(config, runtime)


_LINEAR = torch.nn.functional.linear


def _own_linear_again() -> None:
    """zero3 replaces torch's linear for the process, by one that rounds otherwise: not for the runs that follow it."""
    if torch.nn.functional.linear.__module__.startswith("deepspeed."):
        torch.nn.functional.linear = _LINEAR


#: --strategy -> what makes it; what only some runs need is imported when it is chosen.
STRATEGIES: dict[str, Callable[[TrainConfig, Runtime], Strategy]] = {
    "single": DataParallel,
    "ddp": DataParallel,
    "fsdp": _fully_sharded,
    "zero1": _deepspeed,
    "zero2": _deepspeed,
    "zero3": _deepspeed,
}


def choose(name: str, world_size: int) -> str:
    """The strategy that `--strategy name` means on `world_size` ranks.

    Raises:
        ConfigError: the strategy is for one rank or for several, and there are not that many.
    """
    if name == "auto":
        return "single" if world_size == 1 else "ddp"
    if (name == "single") != (world_size == 1):
        raise ConfigError(f"--strategy {name} on {world_size} rank{'s' if world_size > 1 else ''}",
                          expected="one rank" if name == "single" else "several ranks", got=world_size,
                          fix="another number of ranks, or --strategy auto where no launcher says more")  # fmt: skip
    return name


def build_strategy(config: TrainConfig, runtime: Runtime) -> Strategy:
    """The strategy for this topology, checked against the configuration (`ConfigError`)."""
    _own_linear_again()
    strategy = STRATEGIES[choose(config.strategy, runtime.world_size)](config, runtime)
    strategy.check()
    return strategy
