"""What an observer is: it receives the values of a run and cannot change anything."""

# ruff: noqa: ARG002 (an observer ignores what it has no use for)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Scalar = str | int | float | bool | None

Event = Mapping[str, Scalar]
"""One thing that happened. Always has `event` (its kind) and `step`; the rest depends on the kind:

train: loss, lr, grad_norm, samples, samples_per_second, data_wait_seconds, mfu, the recipe's metrics by name.
eval: loss, samples, the recipe's metrics by name (sums as fractions); nonfinite_ranks where one is NaN or infinite.
skip: a step that was left out because of NaN or infinity: rank where it is one's, message, back_to after a rollback.
note: message.
checkpoint: bytes and seconds, or error.
Other kinds may have any names.
"""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known before the first step."""

    recipe: str
    """Name of the recipe."""
    run_dir: Path
    """Directory of the run; it exists."""
    num_steps: int
    """Steps of the whole run."""
    facts: Mapping[str, str]
    """Resolved choices to show, in order: device, precision, data, batch..."""


class Observer(Protocol):
    """Called by the main process, in this order: load_state_dict (only on resume), start, record..., close.

    After a rollback load_state_dict and go_back come between two records.

    An exception from `record` ends the run; an observer that can do without its output handles its own errors.
    """

    def start(self, info: RunInfo, step: int) -> None:
        """The run starts, or continues, with `step` steps done."""
        ...

    def record(self, event: Event) -> None:
        """Something happened. Values are Python scalars; a float may be NaN or infinite."""
        ...

    def go_back(self, step: int) -> None:
        """The run continues from `step`: what was recorded of later steps is void."""
        return

    def close(self, status: str, message: str) -> None:
        """The run ended: "completed", "preempted" or "failed", and why in one line. Also called without `start`."""
        ...

    def state_dict(self) -> dict[str, str]:
        """What a resumed run needs to continue in the same place; keys begin with the observer's name."""
        return {}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Take what state_dict gave, before `start`; keys of other observers are ignored."""
        return


def curves(event: Event) -> dict[str, float]:
    """The numbers of a train or eval event as {"train/loss": ...}, without its step; empty for other events."""
    kind = event["event"]
    if kind not in ("train", "eval"):
        return {}
    return {
        f"{kind}/{name}": float(value)
        for name, value in event.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
