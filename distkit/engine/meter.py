"""Sums on the device between two reports; nothing here waits for it until `reduce`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distkit.errors import TrainingError
from distkit.losses import LossOutput
from distkit.runtime.process import Runtime


@dataclass(frozen=True, kw_only=True)
class Means:
    """Values of one report: `loss` (the weighted mean) and each of the recipe's sums / samples."""

    samples: int
    loss: float
    metrics: dict[str, float]


class Meter:
    """Adds up LossOutputs of microbatches; `reduce` gives their means over all ranks.

    Sums are float64 where the device has it: a float32 sum of counts stops being exact at 2^24.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._dtype = torch.float32 if runtime.device.type == "mps" else torch.float64
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._loss, self._weight = self._zero(), self._zero()
        self._host_weight = self._samples = 0

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=self._dtype, device=self._runtime.device)

    def add(self, output: LossOutput, samples: int) -> None:
        """Count one microbatch of `samples` samples. Never waits for the device."""
        loss = output.loss.detach()
        if output.weight is None:
            self._loss.add_(loss, alpha=samples)
            self._host_weight += samples
        else:
            self._loss.addcmul_(loss.to(self._dtype), output.weight.to(self._dtype))
            self._weight.add_(output.weight)
        for name, value in output.sums.items():
            if name not in self._sums:
                self._sums[name] = self._zero()
            self._sums[name].add_(value.detach())
        self._samples += samples

    def reduce(self) -> Means:
        """Means over all ranks since the last call, and start again from zero. Waits for the device.

        Raises:
            TrainingError: ranks reported different names, or nothing was counted.
        """
        names = sorted(self._sums)
        values = [self._loss, self._weight + self._host_weight, self._zero() + self._samples]
        values += [self._sums[name] for name in names]
        if any(seen != names for seen in self._runtime.gather(names)):
            raise TrainingError(f"compute_loss must return the same sums on every rank, here {names}")
        loss, weight, samples, *sums = self._runtime.all_reduce_(torch.stack(values)).tolist()
        if samples == 0:
            raise TrainingError("nothing to report: no sample was seen on any rank")
        self._reset()
        metrics = {name: value / samples for name, value in zip(names, sums, strict=True)}
        return Means(samples=round(samples), loss=loss / weight if weight else float("nan"), metrics=metrics)
