"""The tiny recipe with samples that are not finite, chosen by their numbers.

`bad_loss` makes the input of these samples infinite: their loss and its gradients are NaN. `bad_gradient` leaves the
loss as it is, up to rounding, and makes its gradients NaN. `bad_test` are samples of the test set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from support import tiny
from torch import Tensor, nn

from distkit.config import Constant, Split
from distkit.data import SampleStream
from distkit.entry import main
from distkit.losses import LossOutput
from distkit.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PlantedConfig(tiny.TinyConfig):
    """What is planted where."""

    bad_loss: tuple[int, ...] = ()
    """Training samples with infinite inputs."""
    bad_gradient: tuple[int, ...] = ()
    """Training samples with NaN in the gradients alone."""
    explode_at: int = 0
    """The step whose learning rate is so large that the weights become infinite."""
    bad_test: tuple[int, ...] = ()
    """Test samples with infinite inputs."""


def sample_at(step: int, offset: int, size: int = 8) -> int:
    """The number of the training sample at `offset` of the global batch of step `step`; the first step is 1."""
    return int(SampleStream(0, tiny.NUM_TRAIN, size).global_batch(step - 1)[offset])


def steps_with(samples: tuple[int, ...], num_steps: int, size: int = 8) -> list[int]:
    """The steps that read one of `samples`."""
    stream = SampleStream(0, tiny.NUM_TRAIN, size)
    return [step + 1 for step in range(num_steps) if set(samples) & set(stream.global_batch(step).tolist())]


def build_dataset(config: PlantedConfig, split: Split) -> tiny.Vectors:
    vectors = tiny.build_dataset(config, split)
    for index in config.bad_loss if split == "train" else config.bad_test:
        vectors.inputs[index] = torch.inf
    return vectors


def compute_loss(config: PlantedConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
    output = tiny.compute_loss(config, model, batch)
    loss, indices = output.loss, batch["indices"]
    if config.bad_gradient and loss.requires_grad:
        planted = torch.isin(indices, torch.tensor(config.bad_gradient)).any()
        # the root of 0 has an infinite slope, times 0
        loss = loss + (0 * loss + (~planted).float()).sqrt() - (~planted).float()
    return replace(output, loss=loss)


def build_schedule(config: PlantedConfig, num_steps: int) -> Callable[[int], float]:
    return lambda step: 1e300 if step + 1 == config.explode_at else 1.0


BASE = PlantedConfig(**{f.name: getattr(tiny.BASE, f.name) for f in fields(tiny.BASE)} | {"schedule": Constant()})
RECIPE = Recipe("planted", PlantedConfig, tiny.build_model, build_dataset, compute_loss, presets={"default": BASE},
                build_schedule=build_schedule, best=("correct", "max"))  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
