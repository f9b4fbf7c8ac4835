"""`distkit drill`: prove here that a recipe survives what schedulers and machines do to it (C3, C6)."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distkit.commands.drill.cases import ALL, DEFAULT, parse_cases
from distkit.commands.drill.report import as_json, as_text, what_to_do
from distkit.commands.drill.scheduler import AGAIN, UNDISTURBED, Drill, Outcome, compare, outcomes, run_undisturbed
from distkit.commands.parser import Answer, Parser, positive, split_flags
from distkit.commands.trial import interruptible
from distkit.errors import ConfigError
from distkit.files import write_json


def command(args: Sequence[str]) -> Answer:
    """Do the drill; the table, and 1 where a case does not hold."""
    own_args, flags = split_flags(args)
    typed = _parser().parse_args(own_args)
    names = list(ALL) if typed.all else typed.cases.split(",") if typed.cases else list(DEFAULT)
    cases = parse_cases(names, typed.nproc)
    if typed.json is not None and not os.access(typed.json.absolute().parent, os.W_OK):
        raise ConfigError(f"--json {typed.json} cannot be written", expected="a file in a directory that is writable",
                          fix=f"--json {typed.json.name}")  # fmt: skip
    keep = typed.dir is not None
    if keep and typed.dir.exists() and not (typed.dir.is_dir() and not any(typed.dir.iterdir())):
        raise ConfigError(f"--dir {typed.dir} is not empty", expected="a new directory", fix=f"--dir {typed.dir}-2")
    folder = typed.dir if keep else Path(tempfile.mkdtemp(prefix="distkit-drill-"))
    try:
        drill = Drill(recipe=typed.recipe, flags=flags, nproc=typed.nproc, folder=folder, num_steps=typed.steps,
                      timeout_seconds=typed.timeout_seconds)  # fmt: skip
        with interruptible():
            drill, undisturbed = run_undisturbed(drill)
            found = list(outcomes(drill, cases, undisturbed, keep=keep))
            if not found:
                raise ConfigError(f"none of these cases can happen to {typed.recipe}", expected="a phase of its runs",
                                  got=", ".join(case.name for case in cases), fix=f"--cases {DEFAULT[1]}")  # fmt: skip
            failed = any(outcome.failure for outcome in found)
            advice = what_to_do(drill, found, is_deterministic(drill, found)) if failed else []
        skipped = [case for case in cases if case not in [outcome.case for outcome in found]]
        text = "\n".join([as_text(drill, undisturbed, found, skipped), *advice])
        if typed.json is not None:
            write_json(typed.json, as_json(drill, undisturbed, found, skipped))
    except BaseException:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if not failed and not keep:
        shutil.rmtree(folder)
    return Answer(text, int(failed))


def is_deterministic(drill: Drill, found: Sequence[Outcome]) -> bool:
    """Where a resumed run differs: whether a second undisturbed run does not. True where none differs."""
    if not any(outcome.differs for outcome in found):
        return True
    ended = drill.start(AGAIN)
    return not any(ended.codes) and not compare(drill.folder / UNDISTURBED, drill.folder / AGAIN)


def _parser() -> Parser:
    parser = Parser(
        "distkit drill",
        description="Start RECIPE for a short run, undisturbed and then once for each case: a signal that asks for a "
        "stop, or SIGKILL, to a rank in a phase, or a file STOP. Start it again until it is done, and say what was "
        "lost, how it ended, and whether it has the bits and the metrics of the undisturbed run. Exit codes: 0 each "
        "case does, 1 one does not, 2 wrong arguments.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="its file; flags for it come last, after --")
    parser.add_argument("--nproc", type=positive, default=2, metavar="N", help="ranks on this machine (2)")
    parser.add_argument("--steps", type=positive, default=12, metavar="N", help="length of each run (12)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cases", metavar="CASE,CASE", help=f"which cases, such as kill:save or kill:save:0 "
                       f"({','.join(DEFAULT)})")  # fmt: skip
    which.add_argument("--all", action="store_true", help=f"all {len(ALL)} of them")
    parser.add_argument("--timeout-seconds", type=_seconds, default=300.0, metavar="S",
                        help="a start that takes longer hangs, and is killed (300)")  # fmt: skip
    parser.add_argument("--dir", type=Path, metavar="DIR", help="keep runs and output there (a temporary directory, "
                        "kept where a case does not hold)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON, too")
    return parser


def _seconds(text: str) -> float:
    """A time above 0, as argparse's `type`."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
