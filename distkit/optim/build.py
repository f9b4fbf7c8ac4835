"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from distkit.config.optim import NO_WEIGHT_DECAY, TAKES, OptimConfig
from distkit.errors import ConfigError
from distkit.optim.groups import ParamGroup
from distkit.optim.muon import MuonInShards, MuonWithAdamW

_CLASSES: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
    "sparse_adam": torch.optim.SparseAdam,
    "lbfgs": torch.optim.LBFGS,
}
#: Our field -> torch's argument, where they differ.
_RENAMED = {"clip_threshold": "d", "line_search": "line_search_fn", "adjust_lr": "adjust_lr_fn"}
#: Muon's fields that go to the AdamW beside it.
_MUONS_ADAMW = frozenset({"betas", "eps"})
#: Devices on which torch >= 2.11 has the fused kernel (adagrad's CUDA kernel is younger than that).
_FUSED = dict.fromkeys(("sgd", "adam", "adamw"), frozenset({"cuda", "mps", "cpu"})) | {"adagrad": frozenset({"cpu"})}
#: Fused kernels that also take DTensors (torch.distributed.tensor has no sharding rule for the other two).
_FUSED_DTENSOR = frozenset({"adam", "adamw"})


def build_optimizer(config: OptimConfig, groups: Sequence[ParamGroup]) -> Optimizer:
    """The optimizer that `config` names, over `groups`; each group's "initial_lr" is the lr that `set_lr` multiplies.

    Fused where torch has a fused kernel for all parameters, else torch's own choice (foreach on CUDA). Measured on one
    CPU core, torch 2.15, microseconds an update, single-tensor / foreach / fused (fused leads on two cores too):

        Linear(16, 4)          sgd 30 / 49 / 28         adam 72 / 126 / 50         adagrad 43 / 85 / 37
        ResNet-18, 62 tensors  sgd 8900 / 27600 / 4000  adam 25800 / 19800 / 6000  adagrad 12800 / 16900 / 4400

    Raises:
        ConfigError: the groups do not suit the optimizer.
    """
    copies = [dict(group) for group in groups]
    if not any(len(group["params"]) for group in copies):
        raise ConfigError("the parameter groups hold no parameter", got=f"{len(copies)} groups")
    options = {name: value for name in sorted(TAKES[config.name]) if (value := getattr(config, name)) is not None}
    optimizer = _build_muon(config, copies, options) if config.name == "muon" else _build(config, copies, options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _build(config: OptimConfig, groups: list[ParamGroup], options: dict[str, object]) -> Optimizer:
    if config.name == "lbfgs" and len(groups) > 1:
        raise ConfigError("--optim.name lbfgs takes one parameter group", expected="1 group", got=f"{len(groups)}",
                          fix="a build_param_groups in the recipe that returns one group")  # fmt: skip
    fused = can_fuse(config, groups)
    arguments = {_RENAMED.get(name, name): value for name, value in options.items()} | {"lr": config.lr}
    if config.name not in NO_WEIGHT_DECAY:
        arguments["weight_decay"] = config.weight_decay
    if fused:
        arguments["fused"] = True
    optimizer = _CLASSES[config.name](groups, **arguments)
    if fused and config.name == "sgd":
        fill_momentum_(optimizer)
    return optimizer


def can_fuse(config: OptimConfig, groups: Sequence[ParamGroup]) -> bool:
    """True where torch has a fused kernel of this optimizer for every parameter in `groups`."""
    # the momentum of fused SGD starts wrong where there is dampening: see fill_momentum_
    if any(group.get("kind") == "sparse" or group.get("dampening", config.dampening) for group in groups):
        return False
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(
        parameter.is_floating_point()
        and parameter.device.type in _FUSED.get(config.name, ())
        and (type(parameter) in (Tensor, nn.Parameter) or config.name in _FUSED_DTENSOR)
        for parameter in parameters
    )


def fill_momentum_(optimizer: Optimizer) -> None:
    """Give fused SGD's parameters without momentum a momentum of 0: without dampening the first update is the same.

    torch allocates the momentum uninitialised in the first update. It stays so when fp16 skips that update, and a
    parameter that joins later raises a TypeError (seen in torch 2.15).
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _build_muon(config: OptimConfig, groups: list[ParamGroup], options: dict[str, object]) -> Optimizer:
    strange = {str(group.get("kind")) for group in groups} - {"muon", "adamw"}
    if strange:
        raise ConfigError('--optim.name muon needs to know each group\'s "kind"', expected="muon or adamw",
                          got=", ".join(sorted(strange)), fix='{"params": [...], "kind": "muon"}')  # fmt: skip
    matrices = [group for group in groups if group["kind"] == "muon"]
    if not matrices:
        raise ConfigError("--optim.name muon found no hidden matrix in the model", expected="parameters with two dims",
                          got="none but embeddings and the last nn.Linear", fix="--optim.name adamw")  # fmt: skip
    shared = {"lr": config.lr, "weight_decay": config.weight_decay}
    for_muon = {_RENAMED.get(name, name): value for name, value in options.items() if name not in _MUONS_ADAMW}
    in_shards = any(isinstance(parameter, DTensor) for group in matrices for parameter in group["params"])
    muon = (MuonInShards if in_shards else Muon)(matrices, **shared, **for_muon)  # type: ignore[arg-type]  # checked by OptimConfig
    rest = [group for group in groups if group["kind"] == "adamw"]
    if not rest:
        return MuonWithAdamW(muon)
    for_adamw = {name: value for name, value in options.items() if name in _MUONS_ADAMW}
    fused = {"fused": True} if can_fuse(OptimConfig(name="adamw"), rest) else {}
    return MuonWithAdamW(muon, AdamW(rest, **shared, **for_adamw, **fused))  # type: ignore[arg-type]


def set_lr(optimizer: Optimizer, multiplier: float) -> None:
    """Give every group `multiplier` times its initial lr."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def skips_on_device(optimizer: Optimizer) -> bool:
    """True when fp16 can skip its update on the device; otherwise GradScaler.step waits for the device each step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
