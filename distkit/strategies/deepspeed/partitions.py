"""DeepSpeed's optimizers of ZeRO 1, 2 and 3: their flat partitions, and the optimizer state cut along the parameters.

DeepSpeed updates one flat tensor a parameter group (ZeRO 3: a part of one) and keeps the optimizer's state for that.
Here it is cut along the parameters, so that checkpoints, digests and comparisons see what every other strategy has.
Cutting shares memory; only `FlatOptimizerState.install` copies. All private attributes of DeepSpeed that are used are
used in this file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, Optimizer

from distkit.config import OptimConfig
from distkit.errors import CheckpointError
from distkit.optim import OptimizerState
from distkit.tensors.flat_shard import FlatShard


@dataclass(frozen=True)
class Fragment:
    """Elements of the parameter `name`, which has `shape`: `numel` from `start` on, at `begin` of a flat tensor."""

    name: str
    shape: tuple[int, ...]
    start: int
    begin: int
    numel: int

    def of(self, flat: Tensor) -> FlatShard:
        """These elements, a view of `flat` or of a state of the same length."""
        return FlatShard(flat.detach()[self.begin : self.begin + self.numel], self.shape, self.start)


@dataclass(frozen=True)
class Partition:
    """One flat tensor that DeepSpeed's inner optimizer updates on this rank.

    Attributes:
        flat: fp32 weights [elements], some of them padding.
        group: its parameter group.
        fragments: every parameter of it, including those with no element on this rank.
    """

    flat: Tensor
    group: int
    fragments: tuple[Fragment, ...]


class ZeroOptimizer:
    """DeepSpeed's optimizer of ZeRO 1 and 2: every rank has the whole weights, and updates its partition of each group.

    fp32 weights become their own master copy, unless they are offloaded; norms are not measured.

    Args:
        zero: DeepSpeed's optimizer.
        names: of the model's parameters.

    Attributes:
        offloaded: the master weights and the optimizer's state are in CPU memory.
    """

    def __init__(self, zero: Any, names: Mapping[Tensor, str]) -> None:
        self.zero = zero
        # gradients are unscaled by the strategy
        zero.torch_autocast_gradscaler = None
        measure_nothing_(zero)
        self.offloaded = self._is_offloaded()
        for master, weights in self._masters():
            # for stage 3 DeepSpeed means to do so itself, but compares a device with the name of one
            if not self.offloaded and master.device.type == weights.device.type:
                master.data = weights
        self.partitions = list(self._partitions(names))

    def _is_offloaded(self) -> bool:
        return bool(self.zero.cpu_offload)

    def _masters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each flat master copy, and the flat weights of this rank that belong to it."""
        weights = (ranks[dist.get_rank()] for ranks in self.zero.parallel_partitioned_bit16_groups)
        return zip(self.zero.single_partition_of_fp32_groups, weights, strict=True)

    def _partitions(self, names: Mapping[Tensor, str]) -> Iterator[Partition]:
        if not self.offloaded:
            self.zero._link_all_hp_params()  # to the masters that have moved
        for group, flat in enumerate(self.zero.single_partition_of_fp32_groups):
            fragments = []
            for parameter in self.zero.bit16_groups[group]:
                mapping = getattr(parameter, "_hp_mapping", None)
                start, begin, numel = 0, 0, 0
                if mapping is not None:
                    start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                    begin = mapping.hp_fragment_address.start
                fragments.append(Fragment(names[parameter], tuple(parameter.shape), start, begin, numel))
            yield Partition(flat, group, tuple(fragments))

    def fill_momentum_(self, optimizer: Optimizer) -> None:
        """Momentum of 0 for fused SGD, as distkit.optim.build fills it in for whole parameters."""
        for partition in self.partitions:
            group = optimizer.param_groups[partition.group]
            if isinstance(optimizer, SGD) and group["momentum"] and group.get("fused"):
                optimizer.state[partition.flat]["momentum_buffer"] = torch.zeros_like(partition.flat)

    def shard(self, parameter: Tensor) -> Tensor:
        """What this rank keeps of a parameter."""
        return parameter

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients, summed over ranks; parameters without one count as zeros."""
        if self.offloaded:
            self._wait_for_offloading()
            return [p.flat.grad for p in self.partitions if p.flat.grad is not None]
        return [part for parts in self.zero.averaged_gradients.values() for part in parts or ()]

    def _wait_for_offloading(self) -> None:
        self.zero._wait_for_offload_copies()

    def zero_gradients(self) -> None:
        """DeepSpeed drops gradients itself."""

    def reshard(self) -> None:
        """Nothing is gathered."""

    @torch.no_grad()
    def refresh_copies_(self) -> None:
        """The weights were written: copy them to master copies that are not the weights themselves."""
        for master, weights in self._masters():
            if master.data_ptr() != weights.data_ptr():
                master.copy_(weights)


class Zero3Optimizer(ZeroOptimizer):
    """DeepSpeed's optimizer of ZeRO 3: every rank has its part of each parameter, and gathers the rest for a moment."""

    def _is_offloaded(self) -> bool:
        return bool(self.zero.offload_optimizer)

    def _masters(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_partitioned_groups_flat, strict=True)

    def _partitions(self, names: Mapping[Tensor, str]) -> Iterator[Partition]:
        for index, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            fragments, begin = [], 0
            for parameter in self.zero.fp16_groups[index]:
                start, numel = _range_here(parameter)
                fragments.append(Fragment(names[parameter], tuple(parameter.ds_shape), start, begin, numel))
                begin += parameter.partition_numel()
            yield Partition(flat, self.zero.sub_group_to_group_id[index], tuple(fragments))

    def shard(self, parameter: Any) -> Tensor:
        """This rank's elements of a parameter, sharing its memory."""
        start, numel = _range_here(parameter)
        return FlatShard(parameter.ds_tensor.detach().reshape(-1)[:numel], parameter.ds_shape, start)

    def _wait_for_offloading(self) -> None:
        """DeepSpeed has waited."""

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Without this an old gradient would count where a backward gives none."""
        if not self.offloaded:
            self.zero.grad_partitions_flat_buffer.zero_()

    def reshard(self) -> None:
        """Drop what a forward without a backward left gathered, whose weights are out of date."""
        self.zero._partition_all_parameters()

    def refresh_copies_(self) -> None:
        """The weights were written: copy them to offloaded master copies, and gather again what stays gathered."""
        super().refresh_copies_()
        if gathered := self.zero.persistent_parameters:
            gathered[0].all_gather(gathered)


def _range_here(parameter: Any) -> tuple[int, int]:
    """First element and number of elements here of a parameter that ZeRO 3 cuts: equal parts, the last one padded."""
    part, numel = parameter.partition_numel(), parameter.ds_numel
    start = min(dist.get_rank() * part, numel)
    return start, min(part, numel - start)


def whole_numel(parameter: Any) -> int:
    """Elements of a parameter, even if ZeRO 3 has cut it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def measure_nothing_(zero: Any) -> None:
    """Take the norm out of DeepSpeed's step: where it offloads, and in stage 3, it measures one and waits for it.

    The strategy measures its own. A gradient that is not finite is then seen in the loss, as everywhere; DeepSpeed
    would skip the update and say nothing.
    """
    zero.scaled_global_norm = lambda norm_type=2.0: 1.0  # noqa: ARG005
    zero.update_offload_overflow_tracker = lambda gradient: None  # noqa: ARG005
    # of stage 3; on the CPU, so that reading it waits for nothing
    zero._get_norm_groups = lambda: [torch.ones((), device="cpu")]


class FlatOptimizerState(OptimizerState):
    """The state of DeepSpeed's inner optimizer as one over the model's parameters, of which each rank has elements.

    `optimizer` is a stand-in of the inner one's class, with its hyperparameters; it is never stepped.

    Args:
        inner: the optimizer that updates flat partitions.
        partitions: of this rank.
        groups: names of the parameters in each parameter group.
        facts: as of OptimizerState.
    """

    def __init__(
        self,
        inner: Optimizer,
        partitions: Sequence[Partition],
        groups: Sequence[Sequence[str]],
        facts: type[OptimConfig],
    ) -> None:
        self._inner, self._partitions, self._groups = inner, partitions, groups
        shards: dict[str, Tensor] = {f.name: f.of(p.flat) for p in partitions for f in p.fragments}
        stand_in: Optimizer = object.__new__(type(inner))
        stand_in.param_groups = [
            {**group, "params": [shards[name] for name in names]}
            for group, names in zip(inner.param_groups, groups, strict=True)
        ]
        stand_in.state = defaultdict(dict)
        for partition in partitions:
            if state := inner.state.get(partition.flat):
                for fragment in partition.fragments:
                    stand_in.state[shards[fragment.name]] = {
                        key: fragment.of(value) if _is_flat(value, partition.flat) else value
                        for key, value in state.items()
                    }
        super().__init__(stand_in, shards, facts)

    def compare(self, structure: Mapping[str, object]) -> list[str]:
        """Also: a saved state cannot be flat where some parameters of a group have state and some have none."""
        lines = super().compare(structure)
        if lines:
            return lines
        saved = cast(Mapping[str, Mapping[str, object]], structure.get("state", {}))
        for names in self._groups:
            if len({tuple(sorted(saved.get(name, {}))) for name in names}) > 1:
                without = next((name for name in names if not saved.get(name)), names[0])
                lines.append(
                    f"optimizer: no state of {without}, but of others in its parameter group (it has had no gradient "
                    "yet): ZeRO keeps one for the group"
                )
        return lines

    @torch.no_grad()
    def install(self, structure: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """As for every optimizer; then the inner one gets flat copies of it.

        Raises:
            CheckpointError: numbers differ between parameters of one group, of which ZeRO keeps one; nothing changes.
        """
        super().install(structure, tensors)
        states = {partition.flat: self._flat_state(partition) for partition in self._partitions}
        self._inner.state.clear()
        self._inner.state.update({flat: state for flat, state in states.items() if state})

    def _flat_state(self, partition: Partition) -> dict[str, object]:
        states = [(f, self.optimizer.state.get(self.parameters[f.name], {})) for f in partition.fragments]
        flat_state: dict[str, object] = {}
        for key, first in (states[0][1] if states else {}).items():
            for fragment, state in states:
                if key not in state or not _same_number(first, state[key]):
                    raise CheckpointError(
                        f"the optimizer's {key} of {fragment.name} differs from that of {states[0][0].name} in the "
                        "same parameter group: ZeRO keeps one for both; resume with the strategy that saved it"
                    )
            if not isinstance(first, FlatShard):
                flat_state[key] = first.clone() if isinstance(first, Tensor) else first
                continue
            flat = torch.zeros_like(partition.flat, dtype=first.dtype)
            for fragment, state in states:
                fragment.of(flat).local.copy_(state[key].local)
            flat_state[key] = flat
        return flat_state


def _is_flat(value: object, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and value.shape == flat.shape


def _same_number(one: object, other: object) -> bool:
    """Whether two states are equal, or runs of elements of one dtype."""
    if isinstance(one, FlatShard):
        return isinstance(other, FlatShard) and one.dtype == other.dtype
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return one == other
