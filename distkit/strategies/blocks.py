"""The parts a large model repeats: found, recomputed in the backward, compiled. Names and classes stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distkit.config import ActivationCheckpointingConfig, TrainConfig
from distkit.errors import ConfigError, nearest

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks: of the classes that stand several times beside each other, the one with most parameters.

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


def captures_graphs(config: TrainConfig) -> bool:
    """Whether what `compile_` makes runs in CUDA graphs on a GPU (torch._inductor.list_mode_options)."""
    if not config.compile:
        return False
    return config.compile_backend == "cudagraphs" or (
        config.compile_backend == "inductor" and config.compile_mode != "default"
    )


def refuse_accumulation(config: TrainConfig, accum_steps: int) -> None:
    """CUDA graphs give gradients in memory of their own, over which the next microbatch writes.

    Seen by others (https://github.com/pytorch/pytorch/issues/169545 and 96693): an error, or silently wrong sums.

    Raises:
        ConfigError: there is a next microbatch.
    """
    if accum_steps > 1:
        typed = "backend cudagraphs" if config.compile_backend == "cudagraphs" else f"mode {config.compile_mode}"
        raise ConfigError(f"--compile-{typed} captures CUDA graphs, which cannot add up gradients of {accum_steps} "
                          "microbatches", expected="one microbatch a step on each rank", got=accum_steps,
                          fix="--compile-mode default --compile-backend inductor, or no --microbatch-size")  # fmt: skip


def compile_(model: nn.Module, config: TrainConfig, scope: str) -> None:
    """torch.compile, in place: of `model`'s call (whole), or of the forward of each repeated block.

    A block's hooks stay outside, where a strategy gathers its parameters.

    Raises:
        ConfigError: the model has no repeated block.
    """
    # only inductor has modes
    mode = config.compile_mode if config.compile_backend == "inductor" else None
    backend, fullgraph, dynamic = config.compile_backend, config.compile_fullgraph, config.compile_dynamic or None
    if scope == "whole":
        model.compile(backend=backend, mode=mode, fullgraph=fullgraph, dynamic=dynamic)
        return
    blocks = repeated_blocks(model)
    if not blocks:
        # what is cut cannot be compiled as one
        fix = "--compile-scope whole" if config.strategy in ("auto", "single", "ddp") else "--no-compile"
        raise ConfigError("--compile-scope blocks: the model repeats no block", fix=fix)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, mode=mode, fullgraph=fullgraph, dynamic=dynamic)
