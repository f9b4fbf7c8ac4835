"""Optimizers by name, their parameter groups, and their state by parameter name."""

from distkit.optim.build import build_optimizer, can_fuse, set_lr, skips_on_device
from distkit.optim.groups import ParamGroup, default_param_groups, named_parameters
from distkit.optim.muon import MuonWithAdamW
from distkit.optim.restore import allocate_optimizer_state, compare_optimizers, install_optimizer_state
from distkit.optim.state import named_optimizer_state, optimizer_structure, optimizer_tensors

__all__ = [
    "MuonWithAdamW",
    "ParamGroup",
    "allocate_optimizer_state",
    "build_optimizer",
    "can_fuse",
    "compare_optimizers",
    "default_param_groups",
    "install_optimizer_state",
    "named_optimizer_state",
    "named_parameters",
    "optimizer_structure",
    "optimizer_tensors",
    "set_lr",
    "skips_on_device",
]
