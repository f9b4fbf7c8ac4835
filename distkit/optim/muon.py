"""Muon and AdamW as one optimizer, for whole and for sharded matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer

from distkit.config.optim import AdamW as AdamWConfig
from distkit.errors import ConfigError
from distkit.optim.build import can_fuse
from distkit.optim.groups import ParamGroup
from distkit.tensors.shards import local_part, whole

#: What an update takes from its group, besides the momentum.
_SETTINGS = ("lr", "weight_decay", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")


class MuonWithAdamW(Optimizer):
    """Muon for hidden matrices and AdamW for everything else, as one optimizer.

    `param_groups` holds the two optimizers' own dicts, so a group's lr set here is theirs, and all share one `state`.

    Args:
        groups: each with "kind": "muon" or "adamw".
        lr: of both.
        weight_decay: of both.
        betas: AdamW's.
        eps: AdamW's.
        muon_options: Muon's own arguments.

    Raises:
        ConfigError: a group of another kind, or none for Muon.
    """

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        **muon_options: Any,
    ) -> None:
        if strange := {str(group.get("kind")) for group in groups} - {"muon", "adamw"}:
            raise ConfigError('--optim.name muon needs to know each group\'s "kind"', expected="muon or adamw",
                              got=", ".join(sorted(strange)), fix='{"params": [...], "kind": "muon"}')  # fmt: skip
        matrices = [group for group in groups if group["kind"] == "muon"]
        rest = [group for group in groups if group["kind"] == "adamw"]
        if not matrices:
            raise ConfigError("--optim.name muon found no hidden matrix in the model",
                              expected="parameters with two dims", got="none but embeddings and the last nn.Linear",
                              fix="--optim.name adamw")  # fmt: skip
        in_shards = any(isinstance(parameter, DTensor) for group in matrices for parameter in group["params"])
        muon_class = MuonInShards if in_shards else Muon
        self._parts: list[Optimizer] = [muon_class(matrices, lr=lr, weight_decay=weight_decay, **muon_options)]
        if rest:
            fused = can_fuse(AdamWConfig, rest) or None
            self._parts.append(AdamW(rest, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Make the parts work on this optimizer's groups and state."""
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict replaces the groups and the state through here
        super().__setstate__(state)
        self._share()

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Only the constructor adds groups.

        Raises:
            ConfigError: a group that is neither Muon's nor AdamW's.
        """
        if not any(param_group is group for part in self._parts for group in part.param_groups):
            raise ConfigError("MuonWithAdamW takes its groups when it is made", fix="build_optimizer(config, groups)")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of both; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


class MuonInShards(Muon):
    """torch.optim.Muon over matrices in shards (DTensors): each is gathered for its update, one at a time.

    The iteration multiplies matrices in bf16. On shards its sums would be rounded differently than in one process,
    by as much as bf16 rounds; gathered, every rank computes the same update and keeps its part.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns what `closure` returned. All ranks together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: DTensor, gradient: Tensor, group: ParamGroup) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        matrix = nn.Parameter(whole(parameter))
        matrix.grad = whole(update)
        # the momentum is in the update already
        Muon([matrix], momentum=0.0, nesterov=False, **{name: group[name] for name in _SETTINGS}).step()  # type: ignore[no-untyped-call]
        cut = distribute_tensor(matrix.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
        local_part(parameter).copy_(local_part(cut))
