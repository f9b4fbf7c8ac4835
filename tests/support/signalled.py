"""The tiny recipe, whose ranks send themselves a signal in the middle of a step: SEND=place:rank:step:signal.

`place` is forward, backward or update. Steps and batches take SLOWLY seconds each (default 0.02), so that there is time
to stop before the end.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch
from support import tiny
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distkit.entry import main
from distkit.losses import LossOutput
from distkit.recipe import Recipe

PLACE, RANK, STEP, NAME = [*os.environ.get("SEND", "").split(":"), "", "", "", ""][:4]
calls = {"forward": 0}


def send(place: str) -> None:
    mine = place == PLACE and os.environ.get("RANK", "0") == RANK and str(calls["forward"]) == STEP
    if mine:
        os.kill(os.getpid(), getattr(signal, f"SIG{NAME}"))


def build_model(config: tiny.TinyConfig) -> nn.Module:
    register: Callable[..., object] = register_optimizer_step_pre_hook
    register(lambda *_: send("update"))
    return tiny.build_model(config)


def compute_loss(config: tiny.TinyConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
    assert config.run_dir is not None
    if not (config.run_dir / "status.json").exists():
        return tiny.compute_loss(config, model, batch)  # the batch before the first step
    config.run_dir.with_suffix(".forward").touch()
    time.sleep(float(os.environ.get("SLOWLY", "0.02")))
    calls["forward"] += torch.is_grad_enabled()
    send("forward")
    output = tiny.compute_loss(config, model, batch)
    if output.loss.requires_grad:
        output.loss.register_hook(lambda gradient: (send("backward"), gradient)[1])
    return output


RECIPE = Recipe("signalled", tiny.TinyConfig, build_model, tiny.build_dataset, compute_loss,
                presets={"default": tiny.BASE}, best=("correct", "max"))  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
