"""Configurations: frozen, validated when made, documented field by field. No torch here."""

from distkit.config.checkpoint import CheckpointConfig, ResumeConfig
from distkit.config.data import DataConfig, Placement
from distkit.config.optim import OPTIMIZERS, OptimConfig
from distkit.config.schedule import SCHEDULES, ScheduleConfig
from distkit.config.strategy import (
    ActivationCheckpointingConfig,
    DDPConfig,
    FSDPConfig,
    StrategyName,
    ZeroConfig,
)
from distkit.config.train import (
    BatchSplit,
    CompileBackend,
    CompileMode,
    CompileScope,
    DebugConfig,
    Device,
    ObserveConfig,
    Precision,
    Split,
    TrainConfig,
    split_batch,
    to_json,
)

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "ActivationCheckpointingConfig",
    "BatchSplit",
    "CheckpointConfig",
    "CompileBackend",
    "CompileMode",
    "CompileScope",
    "DDPConfig",
    "DataConfig",
    "DebugConfig",
    "Device",
    "FSDPConfig",
    "ObserveConfig",
    "OptimConfig",
    "Placement",
    "Precision",
    "ResumeConfig",
    "ScheduleConfig",
    "Split",
    "StrategyName",
    "TrainConfig",
    "ZeroConfig",
    "split_batch",
    "to_json",
]
