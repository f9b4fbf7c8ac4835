"""Which rank the others wait for, and in what: its data, its forward (compute), or its part of a save.

In a synchronous run every rank has the same step time. So what is compared between ranks is what is a rank's own:
waiting for its batches, its forward (see `distkit.engine.forward_timer`), staging and writing its files of a save. A
rank that only waits for another one has none of it. A slow device is slow in the forward, too, so the backward, in
which ranks wait for each other, is not needed. Compute is not judged where the forward waits for other ranks inside of
what is compiled (ddp with buffers, zero3, or fsdp with units of one's own, each with --compile), nor with
--ddp.sync-batchnorm.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distkit.runtime.process import Runtime

#: A rank is slow in a phase when it takes more than this many times the median of the other ranks ...
FACTOR = 1.5
#: ... and its excess over that median is more than this share of a step ...
SHARE = 0.1
#: ... or, in a save, more than this: how long a disk takes varies.
SAVE_SECONDS = 0.5
#: It is named when that was so in this many reports (or saves) in a row, which cover as many steps and seconds.
REPORTS, STEPS, SECONDS = 3, 10, 3.0
WHERE_TO_LOOK = {
    "data": "its disk, network and cores, and --data.num-workers",
    "compute": "its device: clock, temperature, other processes",
    "save": "its way to the checkpoints' disk",
}


@dataclass(frozen=True)
class Own:
    """What one rank tells at a report, in seconds: its waiting for data since the last one, and a step's forward."""

    data: float = 0.0
    forward: float = 0.0


@dataclass
class Streak:
    """How often in a row a rank was slow in a phase, and once it is `named`, how often in a row it was not."""

    reports: int = 0
    steps: int = 0
    seconds: float = 0.0
    named: bool = False
    not_slow: int = 0


class Stragglers:
    """Follows the ranks over the reports and saves; says once when one is slow, and once when it no longer is.

    Args:
        hosts: of each rank, in their order.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._streaks: dict[tuple[str, int], Streak] = {}

    def report(self, ranks: Sequence[Own], steps: float, seconds: float) -> list[str]:
        """Notes after a report that covers `steps` steps in `seconds`."""
        steps = max(steps, 1.0)
        waits, forwards = [own.data / steps for own in ranks], [own.forward for own in ranks]
        whole, notes = seconds / steps, []
        for phase, values in (("data", waits), ("compute", forwards)):
            slow = {
                rank: f"{duration(values[rank])} of a step of {duration(whole)}, the others {duration(usual)}"
                for rank, usual in slow_ranks(values, [1.0] * len(values), SHARE * whole).items()
            }
            notes += self._follow(phase, slow, round(steps), seconds)
        return notes

    def save(self, ranks: Sequence[tuple[float, int]]) -> list[str]:
        """Notes after a save: each rank's own seconds and bytes; with more bytes it may take longer in proportion."""
        seconds, middle = [own for own, _ in ranks], others([float(nbytes) for _, nbytes in ranks])
        weights = [max(1.0, nbytes / max(usual, 1.0)) for (_, nbytes), usual in zip(ranks, middle, strict=True)]
        slow = {
            rank: f"{duration(seconds[rank])} for its part, the others {duration(usual)}"
            for rank, usual in slow_ranks(seconds, weights, SAVE_SECONDS).items()
        }
        return self._follow("save", slow, STEPS, SECONDS)

    def _follow(self, phase: str, slow: Mapping[int, str], steps: int, seconds: float) -> list[str]:
        notes = []
        for rank in slow:
            self._streaks.setdefault((phase, rank), Streak())
        for (one, rank), streak in list(self._streaks.items()):
            who = f"rank {rank} on {self._hosts[rank]}"
            if one != phase:
                continue
            if rank in slow:
                streak.reports, streak.steps = streak.reports + 1, streak.steps + steps
                streak.seconds, streak.not_slow = streak.seconds + seconds, 0
                enough = streak.reports >= REPORTS and streak.steps >= STEPS and streak.seconds >= SECONDS
                if enough and not streak.named:
                    streak.named = True
                    notes.append(f"{who} is slow in {phase}: {slow[rank]}; look at {WHERE_TO_LOOK[phase]}")
                continue
            streak.not_slow += 1
            if streak.named and streak.not_slow == REPORTS:
                notes.append(f"{who} is no longer slow in {phase}")
            if not streak.named or streak.not_slow == REPORTS:
                del self._streaks[one, rank]
        return notes


def slow_ranks(values: Sequence[float], weights: Sequence[float], least: float) -> dict[int, float]:
    """The ranks whose value is far above the median of the others, times the rank's weight; and that median.

    Args:
        values: one a rank, all in one unit.
        weights: by how much more a rank may have, 1 or more.
        least: what must be exceeded, too, by the difference.
    """
    usual = [weight * middle for weight, middle in zip(weights, others(values), strict=True)]
    return {
        rank: middle
        for rank, (value, middle) in enumerate(zip(values, usual, strict=True))
        if value > FACTOR * middle and value - middle > least
    }


def others(values: Sequence[float]) -> list[float]:
    """For each value the median of the others; alone, a value is its own."""
    if len(values) < 2:
        return list(values)
    order = sorted(range(len(values)), key=values.__getitem__)
    ranked, medians, count = [values[i] for i in order], [0.0] * len(values), len(values) - 1
    for place, index in enumerate(order):
        # the places in the middle of the others, counted without this one
        low, high = (place_ + (place_ >= place) for place_ in ((count - 1) // 2, count // 2))
        medians[index] = (ranked[low] + ranked[high]) / 2
    return medians


def hosts_of(runtime: Runtime) -> list[str]:
    """The host of each rank."""
    hosts = {peer.rank: peer.host for peer in runtime.heartbeat.peers} | {runtime.rank: socket.gethostname()}
    return [hosts[rank] for rank in sorted(hosts)]


def duration(seconds: float) -> str:
    """`12.3 ms`, or `1.23 s`."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
