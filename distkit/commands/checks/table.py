"""The checks, in the order of the screen. A new one is a function and a row here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from distkit.commands.checks import devices, disk, launch, limits, network, signals, together, versions
from distkit.commands.checks.finding import Context, Finding

Scope = Literal["rank", "node", "all"]


@dataclass(frozen=True)
class Check:
    """A row.

    Attributes:
        name: of its findings, unless they have names of their own.
        run: the check.
        scope: rank: it runs on every rank by itself; node: on one rank of each node; all: on every rank, once all have
            met, and they exchange something inside.
    """

    name: str
    run: Callable[[Context], Sequence[Finding]]
    scope: Scope


CHECKS: Sequence[Check] = (
    Check("versions", versions.versions, "rank"),
    Check("devices", devices.devices, "node"),
    Check("launch", launch.launch, "rank"),
    Check("interface", network.interface, "node"),
    Check("rendezvous", network.rendezvous, "rank"),
    Check("nodes", together.hosts, "all"),
    Check("all-reduce", together.all_reduce, "all"),
    Check("clocks", together.clocks, "all"),
    Check("shared memory", limits.shared_memory, "node"),
    Check("cores", limits.cores, "rank"),
    Check("memory", limits.memory, "node"),
    Check("limits", limits.processes, "rank"),
    Check("checkpoints", disk.checkpoints, "node"),
    Check("shared folder", together.shared_folder, "all"),
    Check("signals", signals.signals, "rank"),
)
#: Where one of these finds an error, the ranks cannot exchange anything.
NEEDED_TO_EXCHANGE = frozenset({"launch", "interface", "rendezvous"})


def find_alone(context: Context) -> list[Finding]:
    """What this rank finds by itself."""
    scopes = {"rank", "node"} if context.topology.local_rank == 0 else {"rank"}
    found: list[Finding] = []
    for check in CHECKS:
        if check.scope in scopes:
            try:
                found += check.run(context)
            except Exception as error:
                found.append(failed(check.name, error))
    return found


def find_together(context: Context) -> list[Finding]:
    """What this rank finds with all others; an exchange that fails is the last one, for it leaves the ranks apart."""
    found: list[Finding] = []
    for check in CHECKS:
        if check.scope == "all":
            try:
                found += check.run(context)
            except Exception as error:
                return [*found, failed(check.name, error)]
    return found


def failed(name: str, error: Exception) -> Finding:
    """The finding of a check that raised."""
    return Finding(
        name, "error", f"the check itself failed: {first_line(error)}", "mend what it names, and run it again"
    )


def first_line(error: Exception) -> str:
    """`RuntimeError: what it says first`; torch's go on for a screen."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
