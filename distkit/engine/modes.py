"""Which modules of a model train in evaluation mode: what the recipe left in it, and what is frozen."""

from __future__ import annotations

from torch import nn


def choose_modes_(model: nn.Module) -> None:
    """Put `model` into training mode, except the parts that `build_model` left in evaluation mode or froze.

    A part is frozen when it has parameters and none of them requires gradients; its dropout does nothing then, and the
    statistics of its BatchNorms stay. A model that is in evaluation mode as a whole was loaded so, as pretrained ones
    are, and trains. A layer's own `train` is called, and may keep more.
    """
    left = [module for module in model.modules() if not module.training]
    if len(left) == sum(1 for _ in model.modules()):
        left = []
    frozen = [part for module in model.modules() if is_frozen(module) for part in module.modules()]
    model.train()
    for module in (*left, *frozen):
        module.training = False


def is_frozen(module: nn.Module) -> bool:
    """True when nothing in it is trained, though there is something."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def describe_modes(model: nn.Module) -> str:
    """`backbone, head.norm`: the outermost parts that stay in evaluation mode; "" where there is none."""
    names: list[str] = []
    for name, module in model.named_modules():
        if not module.training and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
