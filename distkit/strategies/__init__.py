"""How one model is laid over ranks: one class a strategy, chosen in one table."""

from __future__ import annotations

from distkit.config import TrainConfig
from distkit.runtime.process import Runtime
from distkit.strategies.base import Strategy, set_fp32_precision
from distkit.strategies.data_parallel import DataParallel

__all__ = ["Strategy", "build_strategy", "set_fp32_precision"]


def build_strategy(config: TrainConfig, runtime: Runtime) -> Strategy:
    """The strategy for this topology, checked against the configuration (`ConfigError`)."""
    strategy = DataParallel(config, runtime)
    strategy.check()
    return strategy
