"""The ledger of skipped steps: whose global batches moved nothing, and why. A part of a run's state (C3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import cast

from distkit.errors import NonFiniteError


@dataclass(frozen=True, kw_only=True)
class Skip:
    """One step that was left out.

    Attributes:
        step: its number; the first one is 1.
        ranks: where it arose; none where only the sum over the ranks was not finite.
        first, last: positions of its global batch in the sample stream (C1).
        why: a sentence for people.
        rolled_back: the run went back before it, and passes it over when it comes there again.
    """

    step: int
    ranks: tuple[int, ...]
    first: int
    last: int
    why: str
    rolled_back: bool


class BadStepsError(NonFiniteError):
    """The weights, or what would have moved them, are not finite, because of the steps in `skips`; on all ranks alike.

    Going back to a checkpoint and leaving these steps out helps; going on does not.
    """

    on_all_ranks = True

    def __init__(self, message: str, skips: Sequence[Skip]) -> None:
        super().__init__(message)
        self.skips = tuple(skips)


@dataclass
class Ledger:
    """All steps that a run has left out, in the order in which that was found."""

    skips: list[Skip] = field(default_factory=list)
    #: Numbers of the steps to be passed over; looked at in every step.
    passed_over: frozenset[int] = frozenset()

    def add(self, skips: Iterable[Skip]) -> None:
        """Enter `skips`."""
        self.skips += skips
        self.passed_over = frozenset(skip.step for skip in self.skips if skip.rolled_back)

    def __contains__(self, step: int) -> bool:
        return any(skip.step == step for skip in self.skips)

    def state_dict(self) -> dict[str, object]:
        """Every entry, ready for JSON."""
        return {"skips": [{**asdict(skip), "ranks": list(skip.ranks)} for skip in self.skips]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take them back in place of those that are here."""
        entries = cast(list[dict[str, object]], state["skips"])
        names = [each.name for each in fields(Skip)]
        self.skips = []
        self.add(
            Skip(**{name: entry[name] for name in names} | {"ranks": tuple(cast(list[int], entry["ranks"]))})  # type: ignore[arg-type]
            for entry in entries
        )
