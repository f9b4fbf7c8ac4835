"""`distkit jobs`: the runs under a folder, how each stands, and what the scheduler says."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distkit.commands.parser import Answer, Parser
from distkit.commands.slurm.queue import ask_queue
from distkit.errors import ConfigError, printable

#: What a run directory has one of.
MARKS = ("status.json", "config.json", "submissions")
STYLES = {"running": "green", "completed": "bold green", "failed": "red", "killed": "red", "preempted": "yellow"}
#: Verdicts that somebody should read.
ALARMING = ("same step", "one host", "no progress")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run, as the table has it.

    Attributes:
        run: its directory.
        job: of its last attempt, or of a later submission; None outside of SLURM.
        state: submitted, running, killed, preempted, completed, failed; unreadable.
        step, num_steps: how far it is known to be, and its length; None where it does not say.
        attempts: how many.
        last_seen: when it wrote something last, seconds since 1970.
        scheduler: what squeue says of the job; None where it says nothing.
        verdict: over the attempts, with what to do; `alarming` when somebody should read it.
    """

    run: str
    job: str | None
    state: str
    step: int
    num_steps: int | None
    attempts: int
    last_seen: float | None
    scheduler: str | None = None
    verdict: str
    alarming: bool


def command(args: Sequence[str]) -> Answer:
    """A table of the runs, or JSON."""
    parser = Parser(
        "distkit jobs",
        description="The runs under a folder: SLURM job, state, step, attempts, when each was last seen, and what "
        "squeue says of the job.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="(runs)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    typed = parser.parse_args(args)
    if not typed.folder.is_dir():
        raise ConfigError(f"there is no folder {typed.folder}", expected="a folder with runs in it",
                          fix="distkit jobs FOLDER")  # fmt: skip
    rows = with_scheduler([read_row(run) for run in find_runs(typed.folder)])
    if typed.json:
        return Answer(json.dumps([asdict(row) for row in rows], indent=2), 0)
    if not rows:
        return Answer(f"no run in {typed.folder}", 0)
    return Answer(as_text(rows), 0, as_it_is=True)


def find_runs(folder: Path) -> Iterator[Path]:
    """The run directories in `folder`, or itself, by name."""
    for path, folders, files in os.walk(folder):
        if any(mark in files or mark in folders for mark in MARKS):
            folders.clear()
            yield Path(path)
        folders.sort()


def read_row(run: Path) -> Row:
    """How a run stands, from its directory; one that cannot be read does not hide the others."""
    try:
        return _read_row(run)
    except ConfigError as error:
        return Row(run=str(run), job=None, state="unreadable", step=0, num_steps=None, attempts=0, last_seen=None,
                   verdict=" ".join(str(error).split()), alarming=True)  # fmt: skip


def _read_row(run: Path) -> Row:
    from distkit.engine.attempts import last_seen, read_attempts, read_status
    from distkit.engine.lease import holder
    from distkit.engine.submission import jobs_of, newest_submission
    from distkit.engine.verdict import judge

    attempts = read_attempts(run, running=holder(run) is not None)
    verdict, last, num_steps = judge(attempts), attempts[-1] if attempts else None, read_status(run).get("num_steps")
    submission = newest_submission(run)
    waits = jobs_of(submission) if last is None or str(submission.get("submitted")) > str(last.began) else []
    return Row(
        run=str(run),
        job=waits[0] if waits else last.job if last else None,
        state=last.state if last else "submitted",
        step=last.to_step if last else 0,
        num_steps=num_steps if isinstance(num_steps, int) else None,
        attempts=last.attempt if last else 0,
        last_seen=last_seen(run),
        verdict=str(verdict),
        alarming=verdict.kind in ALARMING,
    )


def with_scheduler(rows: Sequence[Row]) -> list[Row]:
    """The rows with what squeue says, which is asked once."""
    jobs = [row.job for row in rows if row.job]
    said = ask_queue(jobs) if jobs else None
    return [replace(row, scheduler=said.get(row.job, "gone") if said is not None and row.job else None) for row in rows]


def as_text(rows: Sequence[Row]) -> str:
    """A table, as wide as the terminal, and below it the verdicts that somebody should read."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    on_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else 1000
    console = Console(width=width, force_terminal=on_terminal, highlight=False, no_color=None if on_terminal else True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "job", "state", "step", "attempts", "last seen", "scheduler"):
        right = name in ("step", "attempts")
        wraps = name in ("run", "scheduler")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=not wraps)
    for row in rows:
        step = f"{row.step:,}" + (f" of {row.num_steps:,}" if row.num_steps is not None else "")
        state = Text(printable(row.state), STYLES.get(row.state, ""))
        table.add_row(Text(printable(row.run)), Text(row.job or ""), state, step, str(row.attempts),
                      ago(row.last_seen), Text(printable(row.scheduler or "")))  # fmt: skip
    with console.capture() as captured:
        console.print(table)
        for row in rows:
            if row.alarming:
                console.print(Text(printable(f"{row.run} {row.verdict}")))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def ago(moment: float | None) -> str:
    """`3 min ago`."""
    if moment is None:
        return ""
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
