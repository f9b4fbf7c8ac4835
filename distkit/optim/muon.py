"""Muon beside AdamW, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

from distkit.errors import ConfigError
from distkit.optim.groups import ParamGroup


class MuonWithAdamW(Optimizer):
    """Muon for hidden matrices and AdamW for everything else, as one optimizer.

    `param_groups` holds the two optimizers' own dicts, so a group's lr set here is theirs, and all share one `state`.
    """

    def __init__(self, muon: Muon, adamw: AdamW | None = None) -> None:
        self._parts: list[Optimizer] = [muon] if adamw is None else [muon, adamw]
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
