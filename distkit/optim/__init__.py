"""Optimizers by name, their parameter groups, and their state by parameter name."""

from distkit.optim.build import build_optimizer, can_fuse, set_lr, skips_on_device
from distkit.optim.groups import ParamGroup, default_param_groups, named_parameters
from distkit.optim.muon import MuonWithAdamW
from distkit.optim.state import OptimizerState

__all__ = [
    "MuonWithAdamW",
    "OptimizerState",
    "ParamGroup",
    "build_optimizer",
    "can_fuse",
    "default_param_groups",
    "named_parameters",
    "set_lr",
    "skips_on_device",
]
