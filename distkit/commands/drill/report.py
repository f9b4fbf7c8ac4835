"""What a drill says: a table, what to do, and JSON."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from distkit.commands.drill.cases import Case, Landmarks
from distkit.commands.drill.scheduler import UNDISTURBED, Drill, Outcome
from distkit.commands.trial import Ended, without_secrets

HEAD = ("case", "rank", "step", "ended", "lost", "resumed")


def as_text(drill: Drill, undisturbed: Ended, outcomes: Sequence[Outcome], skipped: Sequence[Case]) -> str:
    """The table, with what the runs were before it and what did not hold after it."""
    device = ", on the CPU: this machine has fewer GPUs than ranks" if drill.on_cpu else ""
    lines = [f"{drill.recipe}: {num_steps(drill)} steps on {ranks(drill.nproc)}{device}; undisturbed they take "
             f"{undisturbed.seconds:.1f} s", ""]  # fmt: skip
    table = [HEAD, *map(cells, outcomes)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines += ["", *(f"{case.name} is left out: the run has no {case.phase}" for case in skipped)]
    failed = [outcome for outcome in outcomes if outcome.failure]
    lines += [f"{outcome.case.name}: {outcome.failure}" for outcome in failed]
    lines.append(f"{len(outcomes) - len(failed)} of {len(outcomes)} cases ended with the bits and the metrics of the "
                 "undisturbed run")  # fmt: skip
    return "\n".join(lines)


def cells(outcome: Outcome) -> tuple[str, ...]:
    """A row."""
    case = outcome.case
    lost = f"{outcome.steps_lost} {'step' if outcome.steps_lost == 1 else 'steps'}, {outcome.seconds_lost:.1f} s"
    end = f"{codes(outcome.codes)}, {outcome.state or 'no status.json'}"
    how = "differs" if outcome.differs else "see below" if outcome.failure else "same bits, same metrics"
    return case.name, str(case.rank) if case.phase else "all", str(outcome.step), end, lost, how


def codes(numbers: Sequence[int]) -> str:
    """Exit codes of the ranks, once where they are the same."""
    words = [signal.Signals(-code).name if code < 0 else str(code) for code in numbers]
    return words[0] if len(set(words)) == 1 else " ".join(words)


def num_steps(drill: Drill) -> int:
    """The length of the runs, which the user's flags may have changed."""
    return Landmarks.of(drill.folder / UNDISTURBED).last


def ranks(nproc: int) -> str:
    """`1 rank`, `2 ranks`."""
    return "1 rank" if nproc == 1 else f"{nproc} ranks"


def what_to_do(drill: Drill, outcomes: Sequence[Outcome], deterministic: bool) -> list[str]:
    """After a drill that found something."""
    lines = []
    if any(outcome.differs for outcome in outcomes) and not deterministic:
        lines.append("two undisturbed runs differ as well, so the recipe is not deterministic here: look for "
                     "randomness without a seed, the clock, --no-deterministic")  # fmt: skip
    elif any(outcome.differs for outcome in outcomes):
        verify = ["distkit", "verify-resume", str(drill.recipe), "--nproc", str(drill.nproc)]
        flags = [
            *without_secrets(drill.flags, drill.folder / UNDISTURBED),
            *(["--device", "cpu"] if drill.on_cpu else []),
        ]
        lines.append("the recipe keeps something that no checkpoint holds (a counter, a cache, its own generator): "
                     "make it a buffer, or the extra state of a module. What differs first, by tensor:")  # fmt: skip
        lines.append(f"  {shlex.join([*verify, *(['--', *flags] if flags else [])])}")
    if any(outcome.failure.startswith("hung") for outcome in outcomes):
        lines.append("a hung run was killed after --timeout-seconds; the ranks' output says where it was")
    return [*lines, f"runs and output are kept: {drill.folder}"]


def as_json(
    drill: Drill, undisturbed: Ended, outcomes: Sequence[Outcome], skipped: Sequence[Case]
) -> Mapping[str, object]:
    """The same for programs."""
    cases = []
    for outcome in outcomes:
        fields = asdict(outcome)
        fields |= {"case": outcome.case.name, "rank": outcome.case.rank if outcome.case.phase else None}
        cases.append({**fields, "codes": list(outcome.codes), "holds": not outcome.failure})
    flags = without_secrets(drill.flags, drill.folder / UNDISTURBED)
    return {"recipe": str(drill.recipe), "flags": flags, "nproc": drill.nproc, "steps": num_steps(drill),
            "undisturbed_seconds": undisturbed.seconds, "left_out": [case.name for case in skipped],
            "holds": not any(outcome.failure for outcome in outcomes), "cases": cases}  # fmt: skip
