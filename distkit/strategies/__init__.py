"""How one model is laid over ranks: one class a strategy, chosen in the table distkit.config.strategy.STRATEGIES."""

from __future__ import annotations

from importlib import import_module

import torch

from distkit.config import TrainConfig
from distkit.config.strategy import STRATEGIES
from distkit.errors import ConfigError
from distkit.runtime.process import Runtime
from distkit.strategies.base import Strategy
from distkit.strategies.precision import set_fp32_precision

__all__ = ["Strategy", "build_strategy", "set_fp32_precision"]

_LINEAR = torch.nn.functional.linear


def build_strategy(config: TrainConfig, runtime: Runtime) -> Strategy:
    """The strategy for this topology, checked against the configuration (`ConfigError`)."""
    _restore_linear()
    # imported when it is chosen: a plain run needs neither FSDP nor DeepSpeed
    module, _, name = STRATEGIES[choose(config.strategy, runtime.world_size)].implementation.rpartition(".")
    strategy: Strategy = getattr(import_module(module), name)(config, runtime)
    strategy.check()
    return strategy


def choose(name: str, world_size: int) -> str:
    """The strategy that `--strategy name` means on `world_size` ranks.

    Raises:
        ConfigError: the strategy is for one rank or for several, and there are not that many.
    """
    if name == "auto":
        return "single" if world_size == 1 else "ddp"
    ranks = STRATEGIES[name].ranks
    if ranks == ("several" if world_size == 1 else "one"):
        raise ConfigError(f"--strategy {name} on {world_size} rank{'s' if world_size > 1 else ''}",
                          expected="one rank" if ranks == "one" else "several ranks", got=world_size,
                          fix="a different number of ranks, or --strategy auto")  # fmt: skip
    return name


def _restore_linear() -> None:
    """Undo what an earlier zero3 did to this process: it replaces torch's linear with one that rounds differently."""
    if torch.nn.functional.linear.__module__.startswith("deepspeed."):
        torch.nn.functional.linear = _LINEAR
