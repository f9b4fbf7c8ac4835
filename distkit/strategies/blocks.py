"""The blocks that a large model repeats, and activations that are recomputed in the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distkit.config import ActivationCheckpointingConfig
from distkit.errors import ConfigError, nearest

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks: of the classes that occur several times side by side, the one with the most parameters.

    Transformer layers in an nn.ModuleList, residual blocks in several nn.Sequential; what repeats inside a block does
    not count. [] where nothing repeats.
    """
    found: dict[type[nn.Module], dict[nn.Module, None]] = {}

    def visit(parent: nn.Module) -> None:
        beside: dict[type[nn.Module], list[nn.Module]] = {}
        for child in _children(parent):
            beside.setdefault(type(child), []).append(child)
        for kind, modules in beside.items():
            if len(modules) > 1 and any(next(module.parameters(), None) is not None for module in modules):
                found.setdefault(kind, {}).update(dict.fromkeys(modules))
            else:
                for module in modules:
                    visit(module)

    visit(model)
    sizes = {kind: sum(p.numel() for module in modules for p in module.parameters()) for kind, modules in found.items()}
    return list(found[max(sizes, key=lambda kind: sizes[kind])]) if found else []


def _children(parent: nn.Module) -> Iterator[nn.Module]:
    """Children, and instead of containers what they hold."""
    for child in parent.children():
        if type(child) in _CONTAINERS:
            yield from _children(child)
        else:
            yield child


def modules_of_class(model: nn.Module, names: Sequence[str], option: str) -> list[nn.Module]:
    """The modules whose class has one of `names`.

    Raises:
        ConfigError: the model has no module of a class; `option` is the flag that named it.
    """
    classes = {type(module).__name__ for module in model.modules()}
    for name in names:
        if name not in classes:
            own = sorted(classes)
            raise ConfigError(f"{option}: the model has no module of class {name}", expected=", ".join(own[:12]),
                              got=name, fix=f"{option} {nearest(name, own) or own[0]}")  # fmt: skip
    return [module for module in model.modules() if type(module).__name__ in names]


def chosen_blocks(model: nn.Module, config: ActivationCheckpointingConfig) -> list[nn.Module]:
    """The modules whose activations are computed again.

    Raises:
        ConfigError: the model has no such module.
    """
    if config.mode == "none":
        return []
    if config.blocks is not None:
        return modules_of_class(model, config.blocks, "--activation-checkpointing.blocks")
    blocks = repeated_blocks(model)
    step = config.every or 1
    # the last of each n, so that the first blocks, whose activations live longest, are not all kept
    chosen = blocks[step - 1 :: step]
    if not chosen:
        raise ConfigError(
            f"--activation-checkpointing.mode {config.mode}: the model has {len(blocks)} repeated blocks",
            expected=f"at least {step}",
            fix=f"--activation-checkpointing.every {len(blocks)}"
            if len(blocks) > 1
            else "--activation-checkpointing.mode blocks --activation-checkpointing.blocks CLASS",
        )
    return chosen


def recompute_activations_(model: nn.Module, config: ActivationCheckpointingConfig) -> None:
    """Let the backward compute the activations of the chosen blocks again (non-reentrant torch.utils.checkpoint).

    The generators are put back for it, so that dropout draws the same numbers; a chosen block inside another is left to
    the outer one.
    """
    chosen = chosen_blocks(model, config)
    inner = {module for block in chosen for module in block.modules() if module is not block}
    for block in chosen:
        if block not in inner:
            block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)
