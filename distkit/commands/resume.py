"""`distkit verify-resume`: run a recipe straight, kill it, resume it, compare."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distkit.commands.parser import Parser, positive
from distkit.verify_resume import Trial, report


def command(args: Sequence[str]) -> str:
    """Do the trial; its text, or a TrainingError (exit 1) that names the first step and tensor that differ."""
    mine, flags = list(args), []
    if "--" in mine:
        at = mine.index("--")
        mine, flags = mine[:at], mine[at + 1 :]
    parser = Parser(
        "distkit verify-resume",
        description="Run RECIPE straight, then again with SIGKILL to every rank and a resume, and compare weights, "
        "optimizer, random generators and metric lines. Exit codes: 0 bitwise equal, 1 not, 2 wrong arguments.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="its file; flags for it come last, behind --")
    parser.add_argument("--nproc", type=positive, default=1, metavar="N", help="ranks on this machine (1)")
    parser.add_argument("--steps", type=positive, default=40, metavar="N", help="length of both runs (40)")
    parser.add_argument("--kill-at", type=positive, metavar="N", help="the step of the kill (two thirds of the run)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep both runs there (a temporary folder)")
    typed = parser.parse_args(mine)
    trial = Trial(
        recipe=typed.recipe,
        flags=flags,
        nproc=typed.nproc,
        num_steps=typed.steps,
        kill_at=max(2, typed.steps * 2 // 3) if typed.kill_at is None else typed.kill_at,
        folder=Path(tempfile.gettempdir()) / f"distkit-verify-resume-{os.getpid()}"
        if typed.folder is None
        else typed.folder,
    )
    return report(trial, keep=typed.folder is not None)
