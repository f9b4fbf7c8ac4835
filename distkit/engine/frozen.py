"""A helper of the loss that is not trained: a teacher, a perceptual network. In no checkpoint; known by its digest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distkit.checkpoint.digest import state_digest
from distkit.config import TrainConfig
from distkit.errors import ConfigError, TrainingError
from distkit.runtime.process import Runtime


@dataclass(frozen=True)
class Frozen:
    """The module, as compute_loss gets it, and the digest of its parameters and buffers."""

    module: nn.Module
    digest: str

    def check(self) -> None:
        """Refuse to end a run whose helper was changed.

        Raises:
            TrainingError: its values are others than at the start.
        """
        if digest_of(self.module) != self.digest:
            raise TrainingError("the module of build_frozen has other values than at the start: something trains it")


def freeze(module: object, config: TrainConfig, runtime: Runtime) -> Frozen:
    """What build_frozen returned, on the device, in evaluation mode, without gradients; all ranks together.

    Raises:
        ConfigError: it is no module, or differs between ranks.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError("build_frozen returned no module", expected="one torch.nn.Module",
                          got=type(module).__name__, fix="return teacher")  # fmt: skip
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    module = module.eval().requires_grad_(False).to(runtime.device).to(memory_format=layout)
    digests = runtime.gather(digest_of(module))
    if len(set(digests)) > 1:
        error = ConfigError("build_frozen returned other values on each rank", expected="the same helper on all ranks",
                            fix="load its weights from one file")  # fmt: skip
        error.on_all_ranks = True
        raise error
    return Frozen(module, digests[0])


def digest_of(module: nn.Module) -> str:
    """Of all parameters and buffers."""
    return state_digest({name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)})
