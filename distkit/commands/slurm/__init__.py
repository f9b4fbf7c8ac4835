"""`distkit slurm`: what the batch scripts in slurm/ ask. No torch, and nothing but the standard library."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distkit.commands.parser import Answer, Parser, count, positive, product
from distkit.commands.slurm.outcome import Before, decide
from distkit.commands.slurm.plan import Plan, debug_plan, environment_list, train_plan
from distkit.commands.slurm.site import SITE_FILE, read_site, sbatch_options
from distkit.commands.slurm.stage import stage


def command(args: Sequence[str]) -> Answer:
    """What slurm/*.sbatch ask: options for sbatch, a job's plan, a data set on local scratch, whether to go on."""
    typed = _parser().parse_args(args)
    return VERBS[typed.verb](typed)


def _parser() -> Parser:
    parser = Parser("distkit slurm", description="What the batch scripts in slurm/ ask.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    options = _add(verbs, "options", "print the options that this site wants, for sbatch")
    options.add_argument("--gpus", type=count, default=0, metavar="N", help="GPUs per node (0)")
    _add_site(options)
    _add_plan(_add(verbs, "plan", "print a training job's settings as bash assignments; run inside the job"))
    debug = _add(verbs, "debug-plan", "the same for slurm/debug.sbatch")
    _add_site(debug)
    _add_recipe(debug)
    codes = "Exit codes: 0 nothing is left to do, 75 it goes on, 1 it does not."
    _add_site(_add(verbs, "environment", "print the names of the variables that ranks inherit, for srun --export"))
    _add_requeue(_add(verbs, "requeue", f"decide whether a job goes on with its run. {codes}"))
    staging = _add(verbs, "stage", "copy a data set to local scratch, unless it is there")
    staging.add_argument("source", type=Path, metavar="DIR", help="the data set")
    staging.add_argument("target", type=Path, metavar="COPY", help="where the copy will lie")
    return parser


def _add(verbs: argparse._SubParsersAction[Parser], verb: str, text: str) -> Parser:
    return verbs.add_parser(verb, help=text, description=text, allow_abbrev=False)


def _add_site(parser: Parser) -> None:
    parser.add_argument("--site", type=Path, default=SITE_FILE, metavar="FILE", help=f"a site's profile ({SITE_FILE})")


def _add_recipe(parser: Parser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a Python file")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="the recipe's own")


def _add_plan(parser: Parser) -> None:
    _add_site(parser)
    parser.add_argument("--ranks", type=positive, metavar="N", help="ranks per node (its GPUs, or 1)")
    parser.add_argument("--max-requeues", type=count, metavar="N", help="requeues of this job at most (the site's)")
    parser.add_argument("--stage", metavar="DIR", help="copy DIR to local scratch first, and use the copy")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="add the flags on the array task's line of FILE")
    _add_recipe(parser)


def _add_requeue(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run directory")
    parser.add_argument("--before", type=Before.parse, default=Before(), metavar="ATTEMPT:STEP",
                        help="the plan's: last attempt and checkpoint when the job began")  # fmt: skip
    parser.add_argument("--max-requeues", type=count, required=True, metavar="N", help="requeues of this job at most")
    parser.add_argument("--told", default="", metavar="SIGNAL", help="a signal that told the batch script to stop")


def _options(typed: argparse.Namespace) -> Answer:
    return product(" ".join(sbatch_options(read_site(typed.site), typed.gpus)))


def _plan(typed: argparse.Namespace) -> Answer:
    plan = train_plan(read_site(typed.site), os.environ, typed.recipe, typed.flags, ranks=typed.ranks,
                      max_requeues=typed.max_requeues, stage_from=typed.stage, sweep=typed.sweep)  # fmt: skip
    return _print(plan, typed.site)


def _debug_plan(typed: argparse.Namespace) -> Answer:
    return _print(debug_plan(read_site(typed.site), os.environ, typed.recipe, typed.flags), typed.site)


def _print(plan: Plan, site: Path) -> Answer:
    return product(f"site={shlex.quote(str(site))}\n{plan.to_bash()}")


def _environment(typed: argparse.Namespace) -> Answer:
    return product(environment_list(read_site(typed.site), os.environ))


def _requeue(typed: argparse.Namespace) -> Answer:
    job, num_requeues = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    decision = decide(typed.run_dir, typed.before, job=job, num_requeues=num_requeues,
                      max_requeues=typed.max_requeues, told=typed.told)  # fmt: skip
    return Answer(f"slurm: {decision.why}", decision.exit_code)


def _stage(typed: argparse.Namespace) -> Answer:
    return product(stage(typed.source, typed.target))


VERBS: Mapping[str, Callable[[argparse.Namespace], Answer]] = {
    "options": _options, "plan": _plan, "debug-plan": _debug_plan, "environment": _environment, "requeue": _requeue,
    "stage": _stage,
}  # fmt: skip
