"""`distkit doctor`: what would go wrong here, on one screen, before a run does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from distkit.commands.parser import Answer, Parser, count, positive
from distkit.errors import LaunchError
from distkit.runtime import Topology, node_name, rank_for_messages, read_topology


def command(args: Sequence[str]) -> Answer:
    """Run every check; the screen on rank 0, nothing on the others; 1 where there is an error."""
    from distkit.commands.checks.finding import Context
    from distkit.commands.checks.footprint import footprint, parse_params
    from distkit.commands.checks.meeting import Report, meet
    from distkit.commands.checks.report import as_json, as_text, exit_code, merge
    from distkit.commands.checks.table import find_alone

    typed = _parser().parse_args(args)
    topology, launch_error = _topology()
    params = None if typed.params is None else parse_params(typed.params)
    context = Context(
        env=dict(os.environ),
        topology=topology,
        launch_error=launch_error,
        node=node_name(os.environ),
        run_dir=typed.run_dir,
        footprint=footprint(typed.run_dir, params, typed.checkpoint, typed.keep, topology.world_size),
        data_workers=typed.data_workers,
        device=typed.device,
        timeout_seconds=typed.timeout_seconds,
    )
    screen = ""

    def judge(reports: Sequence[Report]) -> int:
        nonlocal screen
        lines = merge(reports)
        screen = as_json(lines) if typed.json else as_text(lines)
        return exit_code(lines)

    code = meet(context, find_alone(context), judge)
    return Answer(screen, code)


def _topology() -> tuple[Topology, str | None]:
    """This process among its ranks; where the launcher contradicts itself, a single one and the contradiction."""
    try:
        return read_topology(os.environ), None
    except LaunchError as error:
        return Topology(rank=rank_for_messages(os.environ)), str(error)


def _parser() -> Parser:
    parser = Parser(
        "distkit doctor",
        description="Look for what would fail or slow down a run here: on a laptop, a login node, or on every rank of "
        "an allocation (srun python -m distkit doctor, torchrun ... -m distkit doctor, launch/local.sh -n 2 -m distkit "
        "doctor). Each line is ok, warning or error, with what to do. Exit codes: 0 no error, 1 an error, 2 wrong "
        "arguments.",
        allow_abbrev=False,
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), metavar="DIR",
                        help="where checkpoints will lie (runs); if some are there, they tell the size")  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--params", metavar="N", help="parameters of the model, such as 124M: the size of a checkpoint")
    size.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="a checkpoint or a run that tells the size instead"
    )
    parser.add_argument("--keep", type=positive, metavar="N", help="checkpoints kept at a time (as the run in "
                        "--run-dir, else 4: --checkpoint.keep-last and .keep-best)")  # fmt: skip
    parser.add_argument("--data-workers", type=count, metavar="N", help="data workers of a rank (cores / ranks)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="as for a recipe (auto)")
    parser.add_argument("--timeout-seconds", type=positive, default=60, metavar="S", help="how long ranks wait for "
                        "each other (60)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
