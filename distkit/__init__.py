"""distkit: a training run that is the same run everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distkit.version import __version__

if TYPE_CHECKING:
    from distkit.config import Secret, TrainConfig
    from distkit.entry import main, train
    from distkit.load import load_run
    from distkit.losses import LossOutput
    from distkit.recipe import Recipe
    from distkit.tensors.buffers import register_rank_buffer

__all__ = [
    "LossOutput",
    "Recipe",
    "Secret",
    "TrainConfig",
    "__version__",
    "load_run",
    "main",
    "register_rank_buffer",
    "train",
]

#: Name -> the module it comes from. They are imported on first use: `import distkit` does not import torch.
_HOMES = {
    "LossOutput": "distkit.losses",
    "Recipe": "distkit.entry",
    "Secret": "distkit.config",
    "TrainConfig": "distkit.config",
    "load_run": "distkit.load",
    "main": "distkit.entry",
    "register_rank_buffer": "distkit.tensors.buffers",
    "train": "distkit.entry",
}


def __getattr__(name: str) -> object:
    """A public name, from its home."""
    if name not in _HOMES:
        raise AttributeError(f"distkit has no {name}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
