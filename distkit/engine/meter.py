"""Sums between two reports; nothing here waits for the device until `reduce`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distkit.engine.stragglers import Own
from distkit.errors import TrainingError
from distkit.losses import LossOutput
from distkit.returned import calling, check_metrics, check_output
from distkit.runtime.process import Runtime

#: Microbatches whose values are kept before they are added up, and elements of all of them together: both bound the
#: memory of long report intervals.
FOLD_EVERY, FOLD_ELEMENTS = 256, 1 << 20
#: A recipe's compute_metrics: (sums over all samples by name, number of samples) -> metrics by name.
ComputeMetrics = Callable[[dict[str, Tensor], int], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """A value of a report that is NaN or infinite, and the rank whose samples made it so.

    Attributes:
        rank, name: where, and which value: "loss" or one of the recipe's sums.
        value: of this rank, as it was when it was no longer finite.
        begin, end: it came with the samples from `begin` to `end` - 1 of the `seen` that the rank counted.
    """

    rank: int
    name: str
    value: float
    begin: int
    end: int
    seen: int


@dataclass(frozen=True, kw_only=True)
class Means:
    """Values of one report: `loss` (the weighted mean), the recipe's metrics, every rank's `own`.

    `not_finite` says where those come from that are not finite.
    """

    samples: int
    loss: float
    metrics: dict[str, float]
    not_finite: tuple[NotFinite, ...] = ()
    own: list[Own] = field(default_factory=list)


#: Before the name of a recipe's sum, and of its mean times samples, in the names of a meter's state.
_SUMS, _MEANS = "sums/", "means/"


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    fields = {"loss", "weight", "samples"}
    missing = sorted(fields - tensors.keys())
    unknown = sorted(name for name in tensors.keys() - fields if not name.startswith((_SUMS, _MEANS)))
    if missing or unknown:
        raise KeyError(f"not the state of a meter: missing {missing}, not known {unknown}")


def _detached(values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A copy without what would keep the whole graph of the microbatch alive."""
    return {name: value.detach() if value.requires_grad else value for name, value in values.items()}


class Kept(NamedTuple):
    """What is pending of one microbatch: no part of its graph."""

    loss: Tensor
    sums: Mapping[str, Tensor]
    weight: Tensor | None
    means: Mapping[str, Tensor]
    samples: int

    def copy(self) -> Kept:
        """With memory of its own."""
        sums, means = ({name: value.clone() for name, value in values.items()} for values in (self.sums, self.means))
        weight = None if self.weight is None else self.weight.clone()
        return Kept(self.loss.clone(), sums, weight, means, self.samples)


class Meter:
    """Collects LossOutputs of microbatches; `reduce` gives their means over all ranks.

    A microbatch only leaves references to its tensors: adding each up at once would cost a kernel a value in every step
    (6 to 10 µs on a CPU). Sums are float64 where the device has it: float32 stops counting exactly at 2^24.

    Args:
        runtime: this process.
        compute_metrics: makes the metrics out of the sums of all ranks, float64 on the CPU; None: sum / samples.
        copies: copy them instead, because the next forward writes over them (Strategy.reuses_outputs).
        drops_bad: leave values that are not finite out of the sums, and such losses out of their mean.
    """

    def __init__(
        self,
        runtime: Runtime,
        compute_metrics: ComputeMetrics | None = None,
        *,
        copies: bool = False,
        drops_bad: bool = False,
    ) -> None:
        self._runtime, self._compute_metrics = runtime, compute_metrics
        self._copies, self._drops_bad = copies, drops_bad
        self._dtype = torch.float32 if runtime.device.type == "mps" else torch.float64
        self._nothing = torch.zeros((), dtype=self._dtype, device=runtime.device)
        #: Microbatches that may be pending; 0 before the first.
        self._fold_every = 0
        #: Norm of the last step's gradients (0-dim, on the device), where it was measured.
        self.grad_norm: Tensor | None = None
        #: Seconds that steps have waited for data since the last report.
        self.data_wait_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        #: By `sums/NAME` and `means/NAME`.
        self._sums: dict[str, Tensor] = {}
        self._loss = self._weight = self._nothing
        self._pending: list[Kept] = []
        self._samples = 0
        #: The sum of losses after so many samples, from time to time: near which a loss was not finite.
        self._folded: list[tuple[int, Tensor]] = []

    @property
    def is_empty(self) -> bool:
        """True when nothing was counted since the last report."""
        return not (self._pending or self._samples)

    def add(self, output: LossOutput, samples: int) -> None:
        """Count one microbatch of `samples` samples. Never waits for the device."""
        if not self._fold_every:
            check_output(output, any_shape=self._compute_metrics is not None)
            largest = max((value.numel() for value in output.sums.values()), default=1)
            self._fold_every = max(1, min(FOLD_EVERY, FOLD_ELEMENTS // max(1, largest)))
        # detached, or the whole graph of the microbatch would be kept alive
        weight = None if output.weight is None else output.weight.detach()
        sums = _detached(output.sums) if output.sums else output.sums
        means = _detached(output.means) if output.means else output.means
        kept = Kept(output.loss.detach(), sums, weight, means, samples)
        self._pending.append(kept.copy() if self._copies else kept)
        if len(self._pending) == self._fold_every:
            self._fold()

    def _fold(self) -> None:
        """Add up what is pending: one kernel or two a name, whatever the number of microbatches."""
        kept = self._pending
        # by size and on the host: a tensor of sizes would be a copy to the device that waits for it
        groups: dict[int | None, list[Kept]] = {}
        for each in kept:
            groups.setdefault(each.samples if each.weight is None else None, []).append(each)
            self._samples += each.samples
        for size, alike in groups.items():
            losses = torch.stack([each.loss for each in alike])
            if size is None:
                self._add_weighted(losses, torch.stack([each.weight for each in alike if each.weight is not None]))
            else:
                self._add_losses(losses, size)
        for name in sorted({name for each in kept for name in each.sums}):
            self._add_values(_SUMS + name, [each.sums[name] for each in kept if name in each.sums])
        self._add_means([each for each in kept if each.means])
        if kept:
            self._folded.append((self._samples, self._loss))
        self._pending = []

    # nothing is added in place: `_folded` keeps what the sums were

    def _add_values(self, name: str, parts: list[Tensor], times: int = 1) -> None:
        """Add `parts`, each so many `times`, to the sum `name`."""
        try:
            values = torch.stack(parts)
        except RuntimeError as error:
            shapes = ", ".join(sorted({str(list(part.shape)) for part in parts}))
            what, _, name = name.partition("/")
            raise TrainingError(f"compute_loss returned {what}[{name!r}] in several shapes: {shapes}") from error
        value = (torch.where(values.isfinite(), values, 0) if self._drops_bad else values).sum(0, dtype=self._dtype)
        value = value if times == 1 else value * times
        self._sums[name] = value + self._sums[name] if name in self._sums else value

    def _add_means(self, kept: list[Kept]) -> None:
        """Add each mean times its samples, where there are any."""
        for size in {each.samples for each in kept}:
            alike = [each.means for each in kept if each.samples == size]
            for name in sorted({name for means in alike for name in means}):
                self._add_values(_MEANS + name, [means[name] for means in alike if name in means], size)

    def _add_losses(self, losses: Tensor, size: int) -> None:
        """Add `losses`, each the mean of `size` samples."""
        weight: Tensor | int = size * len(losses)
        if self._drops_bad:
            good = losses.isfinite()
            losses, weight = torch.where(good, losses, 0.0), good.sum() * size
        self._loss = self._loss + losses.sum(dtype=self._dtype) * size
        self._weight = self._weight + weight

    def _add_weighted(self, losses: Tensor, weights: Tensor) -> None:
        """Add `losses`, of which each is a mean over one of `weights`."""
        if self._drops_bad:
            good = losses.isfinite() & weights.isfinite()
            losses, weights = torch.where(good, losses, 0.0), torch.where(good, weights, 0)
        weights = weights.to(self._dtype)
        self._loss = self._loss + (losses * weights).sum()
        self._weight = self._weight + weights.sum()

    def state_tensors(self) -> dict[str, Tensor]:
        """What was counted since the last report, on this rank; never waits for the device.

        Returns:
            `loss` and `weight` (sums), `samples` (int64, on the CPU), `means/NAME` (times samples), all 0-dim, and
            `sums/NAME`; all but `samples` the live ones, float64 on the device (float32 where it has no float64).
        """
        self._fold()
        samples = torch.tensor(self._samples, dtype=torch.int64, device="cpu")
        return {"loss": self._loss, "weight": self._weight, "samples": samples, **self._sums}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from copies of `state_tensors`, from any device: the next report is the same to the bit.

        Raises:
            KeyError: a name is missing or not known; the meter is unchanged then.
        """
        _check_names(tensors)
        device, dtype = self._runtime.device, self._dtype
        own = {
            name: value.detach().to(device, dtype, copy=True) for name, value in tensors.items() if name != "samples"
        }
        self._reset()
        self._loss, self._weight, self._samples = own.pop("loss"), own.pop("weight"), int(tensors["samples"])
        self._sums = own
        self._folded.append((self._samples, self._loss))

    @staticmethod
    def merge(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Several ranks' `state_tensors` added up in their order, in float64 on the CPU; of none, an empty meter's.

        Raises:
            KeyError: a name is missing or not known.
        """
        merged = {name: torch.zeros((), dtype=torch.float64) for name in ("loss", "weight")}
        merged["samples"] = torch.zeros((), dtype=torch.int64)
        for state in states:
            _check_names(state)
            for name, value in state.items():
                # what a rank has not seen is 0 there
                total = merged.setdefault(name, torch.zeros(value.shape, dtype=torch.float64))
                total += value.detach().to("cpu", total.dtype)
        return merged

    def reduce(self, own: Own = Own()) -> Means:  # noqa: B008  # it is immutable
        """Means over all ranks since the last call, and start again from zero. Waits for the device.

        Args:
            own: what this rank tells the others with it.

        Raises:
            TrainingError: ranks reported different names, or nothing was counted.
        """
        recent = self._pending
        self._fold()
        # a rank may have had no sample to evaluate, and then knows no names
        here = sorted((name, tuple(value.shape)) for name, value in self._sums.items())
        answers = self._runtime.gather((here, self._samples, own))
        seen = [shapes for shapes, samples, _ in answers if samples]
        shapes = seen[0] if seen else []
        if any(other != shapes for other in seen):
            raise TrainingError(f"compute_loss must return the same sums and means on every rank, here {seen}")
        sums = [self._sums.get(name, self._nothing.expand(shape)) for name, shape in shapes]
        samples = sum(counted for _, counted, _ in answers)
        if samples == 0:
            raise TrainingError("nothing to report: no sample was seen on any rank")
        names = [name for name, _ in shapes]
        if self._compute_metrics is None:  # numbers alone
            loss, weight, *numbers = self._runtime.all_reduce_(torch.stack([self._loss, self._weight, *sums])).tolist()
            is_finite = all(map(math.isfinite, (loss, weight, *numbers)))
            metrics = {name.partition("/")[2]: value / samples for name, value in zip(names, numbers, strict=True)}
        else:
            flat = torch.cat([value.flatten() for value in (self._loss, self._weight, *sums)])
            flat = self._runtime.all_reduce_(flat).cpu()
            (loss, weight), is_finite = flat[:2].tolist(), bool(flat.isfinite().all())
            parts = torch.split(flat[2:], [value.numel() for value in sums])
            totals = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
            metrics = self._own_metrics(totals, samples)
        not_finite = () if is_finite else self._sources(recent)
        self._reset()
        mean = loss / weight if weight else float("nan")
        return Means(samples=samples, loss=mean, metrics=metrics, not_finite=not_finite,
                     own=[told for *_, told in answers])  # fmt: skip

    def _own_metrics(self, totals: Mapping[str, Tensor], samples: int) -> dict[str, float]:
        """What the recipe makes of the sums over all ranks, `sums/NAME`, and its `means/NAME`."""
        assert self._compute_metrics is not None
        sums = {name.removeprefix(_SUMS): value for name, value in totals.items() if name.startswith(_SUMS)}
        means = {name.removeprefix(_MEANS): value.item() / samples for name, value in totals.items()
                 if name.startswith(_MEANS)}  # fmt: skip
        with calling("compute_metrics"):
            return check_metrics(self._compute_metrics(sums, samples), means) | means

    def _sources(self, recent: Sequence[Kept]) -> tuple[NotFinite, ...]:
        """What is not finite on each rank; all ranks together. `recent` was pending before the last fold."""
        here = [] if math.isfinite(loss := self._loss.item()) else [("loss", *self._first_bad_loss(recent, loss))]
        for name, value in self._sums.items():
            if (bad := value[~value.isfinite()]).numel():
                here.append((name.partition("/")[2], bad[0].item(), 0, self._samples))
        return tuple(
            NotFinite(rank=rank, name=name, value=value, begin=begin, end=end, seen=seen)
            for rank, (found, seen) in enumerate(self._runtime.gather((here, self._samples)))
            for name, value, begin, end in found
        )

    def _first_bad_loss(self, recent: Sequence[Kept], total: float) -> tuple[float, int, int]:
        """The first loss of this rank that was not finite, and between which samples it came."""
        begin = 0
        for end, value in self._folded[:-1] if recent else self._folded:
            if not value.isfinite().item():
                return value.item(), begin, end
            begin = end
        for each in recent:
            value = each.loss if each.weight is None else each.loss * each.weight
            if not value.isfinite().item():
                return each.loss.item(), begin, begin + each.samples
            begin += each.samples
        return total, 0, self._samples
