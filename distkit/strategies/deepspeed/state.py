"""ZeRO's flat partitions as what they hold: this rank's elements of each parameter and its optimizer state, by name.

DeepSpeed updates one flat tensor a parameter group (ZeRO 3: a part of one) and keeps the optimizer's state for that.
A `ParameterView` cuts all of it along the parameters, so that checkpoints, digests and comparisons see what every
other strategy has. Cutting shares memory; only `install` copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from distkit.errors import CheckpointError
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
        fragments: every parameter of it, also those of which no element lies here.
    """

    flat: Tensor
    group: int
    fragments: tuple[Fragment, ...]


class Zero(Protocol):
    """What is read of DeepSpeed's optimizers of stage 1 and 2."""

    single_partition_of_fp32_groups: Sequence[Tensor]
    parallel_partitioned_bit16_groups: Sequence[Sequence[Tensor]]
    bit16_groups: Sequence[Sequence[nn.Parameter]]
    averaged_gradients: dict[int, Sequence[Tensor] | None]
    cpu_offload: bool
    zero_grad: Callable[[], None]
    _link_all_hp_params: Callable[[], None]
    _wait_for_offload_copies: Callable[[], None]


class Cut(Protocol):
    """What is read of a parameter that ZeRO 3 has cut."""

    ds_numel: int
    ds_tensor: Tensor
    partition_numel: Callable[[], int]
    all_gather: Callable[[Sequence[Cut]], object]


class Zero3(Protocol):
    """What is read of DeepSpeed's optimizer of stage 3."""

    fp32_partitioned_groups_flat: Sequence[Tensor]
    fp16_partitioned_groups_flat: Sequence[Tensor]
    fp16_groups: Sequence[Sequence[nn.Parameter]]
    sub_group_to_group_id: Mapping[int, int]
    averaged_gradients: dict[int, Sequence[Tensor] | None]
    grad_partitions_flat_buffer: Tensor
    offload_optimizer: bool
    overflow: bool
    persistent_parameters: Sequence[Cut]
    _partition_all_parameters: Callable[[], None]


def flat_partitions(zero: Zero, names: Mapping[Tensor, str]) -> list[Partition]:
    """The flat tensors of stage 1 and 2; `names` are those of the model's parameters."""
    found = []
    for group, flat in enumerate(zero.single_partition_of_fp32_groups):
        fragments = []
        for parameter in zero.bit16_groups[group]:
            mapping = getattr(parameter, "_hp_mapping", None)
            start, begin, numel = 0, 0, 0
            if mapping is not None:
                start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                begin = mapping.hp_fragment_address.start
            fragments.append(Fragment(names[parameter], tuple(parameter.shape), start, begin, numel))
        found.append(Partition(flat, group, tuple(fragments)))
    return found


def flat_partitions_3(zero: Zero3, names: Mapping[Tensor, str]) -> list[Partition]:
    """The flat tensors of stage 3."""
    found = []
    for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
        fragments, begin = [], 0
        for parameter in zero.fp16_groups[index]:
            start, numel = own_range(parameter)
            fragments.append(Fragment(names[parameter], tuple(whole_shape(parameter)), start, begin, numel))
            begin += cast(Cut, parameter).partition_numel()
        found.append(Partition(flat, zero.sub_group_to_group_id[index], tuple(fragments)))
    return found


def whole_shape(parameter: Tensor) -> torch.Size:
    """Of a parameter that ZeRO 3 has cut, or of any other."""
    return cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))


def own_range(parameter: Tensor) -> tuple[int, int]:
    """First element and number of elements here of a parameter that ZeRO 3 has cut: equal parts, the last padded."""
    cut = cast(Cut, parameter)
    part, numel = cut.partition_numel(), cut.ds_numel
    start = min(dist.get_rank() * part, numel)
    return start, min(part, numel - start)


def shard_of(parameter: Tensor) -> FlatShard:
    """This rank's elements of a parameter that ZeRO 3 has cut, sharing its memory."""
    start, numel = own_range(parameter)
    return FlatShard(cast(Cut, parameter).ds_tensor.detach().reshape(-1)[:numel], whole_shape(parameter), start)


class _Named(nn.Module):
    """Stands in for the model where only the names of its parameters are asked for."""

    def __init__(self, shards: Mapping[str, FlatShard]) -> None:
        super().__init__()
        self.shards = shards

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter's elements here."""
        return iter(cast(Mapping[str, nn.Parameter], self.shards).items())


class ParameterView:
    """DeepSpeed's inner optimizer as one over the model's parameters, of which each rank has some elements.

    Attributes:
        optimizer: of the same class as the inner one, with its hyperparameters; never stepped.
        module: with the parameters' names.
    """

    def __init__(self, inner: Optimizer, partitions: Sequence[Partition], groups: Sequence[Sequence[str]]) -> None:
        self._inner, self._partitions = inner, partitions
        shards = {f.name: f.of(p.flat) for p in partitions for f in p.fragments}
        self._shards = shards
        self.module = _Named(shards)
        self.optimizer: Optimizer = object.__new__(type(inner))
        self.optimizer.param_groups = [
            {**group, "params": [shards[name] for name in names]}
            for group, names in zip(inner.param_groups, groups, strict=True)
        ]
        self.optimizer.state = defaultdict(dict)
        for partition in partitions:
            if state := inner.state.get(partition.flat):
                for fragment in partition.fragments:
                    self.optimizer.state[shards[fragment.name]] = {
                        key: fragment.of(value) if _is_flat(value, partition.flat) else value
                        for key, value in state.items()
                    }

    @torch.no_grad()
    def install(self) -> None:
        """Give the inner optimizer the state that `optimizer` has got meanwhile.

        Raises:
            CheckpointError: numbers differ between parameters of one group, of which ZeRO keeps one; nothing changes.
        """
        made = {partition.flat: self._state_for(partition) for partition in self._partitions}
        self._inner.state.clear()
        self._inner.state.update({flat: state for flat, state in made.items() if state})

    def _state_for(self, partition: Partition) -> dict[str, object]:
        states = [(f, self.optimizer.state.get(self._shards[f.name], {})) for f in partition.fragments]
        state: dict[str, object] = {}
        for key, first in (states[0][1] if states else {}).items():
            for fragment, other in states:
                if key not in other or not _same_number(first, other[key]):
                    raise CheckpointError(
                        f"the optimizer's {key} of {fragment.name} differs from that of {states[0][0].name} in the "
                        "same parameter group: ZeRO keeps one for both; go on with the strategy that saved it"
                    )
            if not isinstance(first, FlatShard):
                state[key] = first.clone() if isinstance(first, Tensor) else first
                continue
            flat = torch.zeros_like(partition.flat, dtype=first.dtype)
            for fragment, other in states:
                fragment.of(flat).local.copy_(other[key].local)
            state[key] = flat
        return state


def _is_flat(value: object, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and value.shape == flat.shape


def _same_number(one: object, other: object) -> bool:
    if isinstance(one, FlatShard):
        return isinstance(other, FlatShard) and one.dtype == other.dtype
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return one == other


def unequal_groups(structure: Mapping[str, object], groups: Sequence[Sequence[str]]) -> list[str]:
    """Why a saved state cannot be that of flat tensors, in lines: some parameters of a group have state, some none."""
    saved = cast(Mapping[str, Mapping[str, object]], structure.get("state", {}))
    lines = []
    for names in groups:
        kinds = {tuple(sorted(saved.get(name, {}))) for name in names}
        if len(kinds) > 1:
            without = next((name for name in names if not saved.get(name)), names[0])
            lines.append(
                f"optimizer: no state of {without}, but of others in its parameter group (it has had no gradient yet): "
                "ZeRO keeps one for the group"
            )
    return lines
