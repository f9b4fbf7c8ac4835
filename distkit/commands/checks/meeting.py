"""How ranks bring their findings to rank 0: through the store at MASTER_ADDR, so that a lost rank holds up nobody.

Every rank puts what it found alone into the store. Rank 0 waits a bounded time for all of them, and decides whether
they exchange something. If so they do, put what they found together into the store, and wait for rank 0.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from distkit.commands.checks.finding import Context, Finding
from distkit.commands.checks.table import NEEDED_TO_EXCHANGE, failed, find_together, first_line
from distkit.errors import shorten

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

#: How long rank 0 waits for the others once it has itself ended the exchange, and before it closes the store.
GRACE_SECONDS = 10.0
NOT_TRIED = Finding("all-reduce", "warning", "not tried, because of other errors", "mend those first")


@dataclass(frozen=True)
class Report:
    """What one rank found, and on which node it is."""

    rank: int
    node: str
    findings: Sequence[Finding]


def meet(context: Context, alone: Sequence[Finding], judge: Callable[[Sequence[Report]], int]) -> int:
    """Bring the findings of all ranks to rank 0, which calls `judge` with them; the exit code.

    Rank 0's is what `judge` returns. The others end with 0, for a launcher ends rank 0 when another rank fails. A rank
    that cannot reach the others calls `judge` with what it found itself.
    """
    mine = Report(context.topology.rank, context.node, alone)
    if context.topology.world_size == 1:
        return judge([mine])
    if has_error(alone, "rendezvous"):
        return judge([Report(mine.rank, mine.node, [*alone, NOT_TRIED])])
    from torch.distributed.distributed_c10d import PrefixStore

    from distkit.runtime.rendezvous import open_store

    try:
        store = PrefixStore("doctor", open_store(context.topology, context.timeout_seconds))
        return _lead(context, store, mine, judge) if mine.rank == 0 else _follow(context, store, mine)
    except Exception as error:  # torch raises RuntimeError's children for a store that is gone
        message = f"rank {mine.rank} cannot meet the others: {first_line(error)}"
        remedy = "MASTER_ADDR and MASTER_PORT must lead from every node to that of rank 0; check the firewall"
        return judge([Report(mine.rank, mine.node, [*alone, Finding("rendezvous", "error", message, remedy)])])


def _lead(context: Context, store: Store, mine: Report, judge: Callable[[Sequence[Report]], int]) -> int:
    reports, late = _collect(context, store, "alone", context.timeout_seconds)
    reports.insert(0, mine)
    apart = any(has_error(report.findings, name) for report in reports for name in NEEDED_TO_EXCHANGE)
    store.set("exchange", "no" if late or apart else "yes")
    if late:
        extra = [_silence(late, f"in {context.timeout_seconds:g} s")]
    elif apart:
        extra = [NOT_TRIED]
    else:
        extra = exchange(context, store)
        # who is not stuck in it says so soon after this rank
        more, late = _collect(context, store, "together", GRACE_SECONDS)
        reports += more
        extra += [_silence(late, "after the exchange began")] if late else []
    code = judge([*reports, Report(mine.rank, mine.node, extra)])
    with contextlib.suppress(RuntimeError):  # the others are gone, and have said so
        store.set("judged", "")
    present = [f"left/{rank}" for rank in range(1, context.topology.world_size) if rank not in late]
    _wait_for(store, present, GRACE_SECONDS)
    return code


def _silence(ranks: Sequence[int], when: str) -> Finding:
    return Finding("rendezvous", "error", f"nothing came from rank {shorten(map(str, ranks))} {when}",
                   "see their own output; every rank must reach MASTER_ADDR and MASTER_PORT")  # fmt: skip


def _follow(context: Context, store: Store, mine: Report) -> int:
    _publish(store, "alone", mine)
    # rank 0 waits for the last one, and may have begun later
    patience = timedelta(seconds=3 * context.timeout_seconds)
    store.wait(["exchange"], patience)
    if store.get("exchange") == b"yes":
        _publish(store, "together", Report(mine.rank, mine.node, exchange(context, store)))
    store.wait(["judged"], patience)
    store.set(f"left/{mine.rank}", "")
    return 0


def exchange(context: Context, store: Store) -> list[Finding]:
    """Join a gloo group over the store, and find what all ranks find together."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    try:
        dist.init_process_group("gloo", store=PrefixStore("gloo", store), rank=context.topology.rank,
                                world_size=context.topology.world_size,
                                timeout=timedelta(seconds=context.timeout_seconds))  # fmt: skip
    except Exception as error:
        return [failed("all-reduce", error)]
    try:
        return find_together(context)
    finally:
        dist.destroy_process_group()


def has_error(findings: Sequence[Finding], name: str) -> bool:
    """Whether one of `name` is an error."""
    return any(finding.name == name and finding.level == "error" for finding in findings)


def _publish(store: Store, kind: str, report: Report) -> None:
    store.set(f"{kind}/{report.rank}", json.dumps(asdict(report)))


def _collect(context: Context, store: Store, kind: str, seconds: float) -> tuple[list[Report], list[int]]:
    """What the other ranks publish within `seconds`, and the ranks that do not."""
    deadline = time.monotonic() + seconds
    reports, late = [], []
    for rank in range(1, context.topology.world_size):
        if _wait_for(store, [f"{kind}/{rank}"], max(0.1, deadline - time.monotonic())):
            value = json.loads(store.get(f"{kind}/{rank}"))
            reports.append(Report(rank, value["node"], [Finding(**finding) for finding in value["findings"]]))
        else:
            late.append(rank)
    return reports, late


def _wait_for(store: Store, keys: list[str], seconds: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError:  # DistStoreError: not in time
        return False
    return True
