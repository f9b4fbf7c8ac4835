"""One screen of what all ranks found: what several say alike is one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from distkit.commands.checks.finding import Finding, counted
from distkit.commands.checks.meeting import Report
from distkit.commands.checks.table import CHECKS
from distkit.errors import shorten


@dataclass(frozen=True)
class Line:
    """A finding, with the nodes and ranks that have it."""

    finding: Finding
    nodes: tuple[str, ...]
    ranks: tuple[int, ...]


def merge(reports: Sequence[Report]) -> list[Line]:
    """Each finding once, in the order of the checks."""
    places: dict[Finding, list[tuple[str, int]]] = {}
    for report in reports:
        for finding in report.findings:
            places.setdefault(finding, []).append((report.node, report.rank))
    order = {check.name: number for number, check in enumerate(CHECKS)}
    lines = [
        Line(finding, tuple(dict.fromkeys(node for node, _ in where)), tuple(sorted({rank for _, rank in where})))
        for finding, where in places.items()
    ]
    return sorted(lines, key=lambda line: order.get(line.finding.name, len(order)))


def exit_code(lines: Sequence[Line]) -> int:
    """1 with an error, else 0."""
    return int(any(line.finding.level == "error" for line in lines))


def as_text(lines: Sequence[Line]) -> str:
    """The screen."""
    places = [_place(line, lines) for line in lines]
    widths = max(len(line.finding.name) for line in lines), max(map(len, places))
    rows = []
    for line, place in zip(lines, places, strict=True):
        found = line.finding
        rows.append(f"{found.level:<7}  {found.name:<{widths[0]}}  {place:<{widths[1]}}  {found.message}")
        if found.remedy:
            rows.append(f"{'':<7}  {'':<{widths[0]}}  {'':<{widths[1]}}  -> {found.remedy}")
    counts = [sum(line.finding.level == level for line in lines) for level in ("error", "warning")]
    return "\n".join([*rows, f"{counted(counts[0], 'error')}, {counted(counts[1], 'warning')}"])


def _place(line: Line, lines: Sequence[Line]) -> str:
    """The nodes; with the ranks, where another rank of these nodes found something else of the same name."""
    others = {rank for other in lines if other.finding.name == line.finding.name and set(other.nodes) & set(line.nodes)
              for rank in other.ranks}  # fmt: skip
    nodes = shorten(line.nodes)
    return nodes if others == set(line.ranks) else f"{nodes} rank {shorten(map(str, line.ranks))}"


def as_json(lines: Sequence[Line]) -> str:
    """The same for programs."""
    findings = [{**asdict(line.finding), "nodes": line.nodes, "ranks": line.ranks} for line in lines]
    return json.dumps({"findings": findings, "exit_code": exit_code(lines)}, indent=2)
