"""What --on-nan skip and rollback look at in every step: loss and gradients of all ranks, without waiting (C5, C6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distkit.config import TrainConfig
from distkit.losses import LossOutput
from distkit.optim import skips_on_device
from distkit.runtime.process import Runtime
from distkit.strategies import Strategy
from distkit.tensors.buffers import BufferCopies

#: Steps whose numbers stay on the device; after so many without a report the host reads them once.
READ_EVERY = 1024
#: Columns of a step's table.
LOSS, OWN, SUMMED = range(3)

#: [ranks][columns]: a rank's loss, the largest magnitude in its own gradients, and in the sums that it updates with.
Table = list[list[float]]


class Guard:
    """Decides on the device, the same on every rank, that a step moves nothing.

    Each rank puts in three numbers, which one small sum gives to all of them. One that is not finite leaves the step
    out: weights, optimizer, averaged weights and buffers stay as they were before it. The step still counts, and so do
    its samples and the schedule; random generators are where the forward left them.

    With fp16 only the loss counts: gradients that are not finite are the scaler's own business.
    """

    def __init__(self, strategy: Strategy, runtime: Runtime) -> None:
        self._strategy, self._runtime = strategy, runtime
        self._scaled = strategy.scaler.is_enabled()
        self._buffers = BufferCopies(strategy.module)
        self._log: list[tuple[int, Tensor]] = []
        self._found: list[tuple[int, Table]] = []
        if not self._scaled:
            strategy.watch_own_gradients()

    def begin(self) -> None:
        """Before the forwards of a step."""
        self._buffers.take()

    @torch.no_grad()
    def judge(self, step: int, outputs: Sequence[LossOutput]) -> Tensor:
        """After the backwards of `step`, before clipping: bool, 0-dim on the device, True where it moves nothing.

        Never waits, but once in READ_EVERY steps without a `read`.
        """
        runtime, strategy = self._runtime, self._strategy
        loss = torch.stack([output.loss.detach().float() for output in outputs]).sum()
        own, summed = (None, None) if self._scaled else (strategy.own_gradients(), strategy.largest_gradient())
        zero = torch.zeros_like(loss)
        table = torch.zeros(runtime.world_size, 3, device=runtime.device)
        table[runtime.rank] = torch.stack([loss, zero if own is None else own, zero if summed is None else summed])
        runtime.all_reduce_(table)
        bad = table.isfinite().all().logical_not()
        self._log.append((step, table))
        if len(self._log) >= READ_EVERY:
            self._found += self._read()
        if self._scaled:
            strategy.scale_gradients_(torch.where(bad, torch.nan, 1.0))
        return bad

    def end(self, bad: Tensor) -> None:
        """After the update: buffers go back where `bad`."""
        self._buffers.put_back_(bad)

    def read(self) -> list[tuple[int, Table]]:
        """The steps since the last call that moved nothing, and their tables, the same on every rank; waits."""
        found, self._found = self._found + self._read(), []
        return found

    def _read(self) -> list[tuple[int, Table]]:
        log, self._log = self._log, []
        if not log:
            return []
        tables = torch.stack([table for _, table in log])
        bad = tables.isfinite().flatten(1).all(1).logical_not().nonzero().flatten().tolist()
        return [(log[index][0], tables[index].tolist()) for index in bad]


def describe_guard(config: TrainConfig, strategy: Strategy) -> dict[str, str]:
    """What is done about NaN, and what that costs, for people; nothing for the default."""
    if config.on_nan == "raise":
        return {}
    costs = "loss and gradients of every rank are looked at in each step"
    if not skips_on_device(strategy.optimizer) or config.fsdp.cpu_offload:
        costs += f"; {config.optim.name} waits for the device once per step to skip bad updates"
    return {"on_nan": f"{config.on_nan}, at most {config.max_skips} steps; {costs}"}
