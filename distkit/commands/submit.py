"""`distkit submit`: a batch job for a recipe, checked before it waits in a queue, with copies of all that it runs."""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from distkit.checkpoint.retention import list_checkpoints
from distkit.commands.checks.finding import counted
from distkit.commands.parser import Answer, Parser, count, positive, product, split_flags
from distkit.commands.slurm.job import Job, by_option, seconds_of, write_script
from distkit.commands.slurm.plan import moved_to
from distkit.commands.slurm.queue import ask_queue, is_queued
from distkit.commands.slurm.site import SITE_FILE, Site, read_site
from distkit.config import FIXED, TrainConfig, split_batch, to_json
from distkit.config.check import flag
from distkit.config.secret import check_secrets, secrets_of, variable
from distkit.engine.attempts import clock_time, object_in, read_status
from distkit.engine.submission import FILE, FOLDER, jobs_of, newest_submission, submissions
from distkit.errors import ConfigError
from distkit.files import read_regular, write_bytes, write_json
from distkit.json_files import MAX_BYTES
from distkit.recipe import Recipe
from distkit.version import __version__

TEMPLATE = "train.sbatch"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Everything that is submitted, checked.

    Attributes:
        recipe, config: as its file and the flags make them.
        run_dir: where it will train; `fresh` when the name was made up just now.
        folder: of this submission, in it.
        files: copies to make in `folder`: name there -> file.
        job, links: what is asked for, and how many jobs that follow each other.
        script: the batch script.
    """

    recipe: Recipe[Any]
    config: TrainConfig
    run_dir: Path
    fresh: bool
    folder: Path
    files: dict[str, Path]
    job: Job
    links: int
    script: str


def command(args: Sequence[str]) -> Answer:
    """Submit a recipe; what was submitted, and how to follow and stop it."""
    own_args, flags = split_flags(args)
    typed = _parser().parse_args(own_args)
    submission = prepare(typed, flags)
    if typed.dry_run:
        return product(submission.script.rstrip("\n"))
    check_free(submission.run_dir)
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch here", expected="a login node of a SLURM cluster",
                          fix="--dry-run prints the script")  # fmt: skip
    jobs = submit(submission, flags)
    return Answer(report(submission, jobs), 0)


def _parser() -> Parser:
    parser = Parser(
        "distkit submit",
        description="Train RECIPE as a SLURM job that goes on by itself after time limits and preemptions. Flags, "
        "resources and the site's profile are checked first; the job runs copies of the recipe and the configuration "
        "in RUN/submissions, so that later edits do not change it. Flags of the recipe come last, after --.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="its file")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="nodes (1)")
    parser.add_argument("--gpus-per-node", type=count, default=0, metavar="N", help="GPUs on each (0)")
    parser.add_argument("--ranks", type=positive, metavar="N", help="ranks per node (its GPUs, or 1)")
    parser.add_argument("--time", metavar="TIME", help="time limit of the job, 4:00:00 or 1-12 (the cluster's)")
    parser.add_argument("--stage", metavar="DIR", help="copy DIR to each node's own disk first, and use the copy")
    parser.add_argument("--max-requeues", type=count, metavar="N", help="requeues of the job at most (the site's)")
    parser.add_argument("--chain", type=positive, metavar="N", help="jobs that follow each other, where "
                        'site.toml says continuation = "chain" (1)')  # fmt: skip
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION",
                        help="a further option of sbatch, as --sbatch=--mem=64G; may be repeated")  # fmt: skip
    parser.add_argument("--site", type=Path, default=SITE_FILE, metavar="FILE",
                        help=f"the site's profile, beside {TEMPLATE} ({SITE_FILE})")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the script, and write nothing")
    return parser


def prepare(typed: argparse.Namespace, flags: Sequence[str]) -> Submission:
    """Check everything and write nothing.

    Raises:
        ConfigError: the recipe, its flags, the resources or the site's profile are wrong.
    """
    from distkit.engine.run_dir import check_usable, new_path

    site, template = read_site(typed.site), read_template(typed.site.parent / TEMPLATE)
    ranks = typed.ranks or typed.gpus_per_node or 1
    recipe, config = read_config(typed.recipe, flags, typed.nodes * ranks)
    run_dir = config.run_dir or new_path(recipe.name)
    check_usable(run_dir, resumes=config.resume.source != "never")
    check_goes_on(run_dir, config)
    earlier = submissions(run_dir)
    folder = run_dir / FOLDER / str(int(earlier[-1].name) + 1 if earlier else 1)
    job = Job(nodes=typed.nodes, gpus=typed.gpus_per_node, ranks=ranks, time=typed.time, options=typed.sbatch,
              name=job_name(recipe.name, run_dir), output=run_dir / "job-%j.out")  # fmt: skip
    if (typed.chain or 1) > 1 and site.continuation != "chain":
        raise ConfigError(f"--chain {typed.chain}, but jobs of this site requeue themselves",
                          expected=f'continuation = "chain" in {typed.site}', fix="leave --chain out")  # fmt: skip
    flags = without_sources(flags)
    if typed.stage is not None:
        check_stage(site, typed.stage, flags)
    options = {"--ranks": ranks, "--stage": typed.stage, "--max-requeues": typed.max_requeues}
    arguments = [
        ["--site", str(folder / "site.toml")],
        *([name, str(value)] for name, value in options.items() if value is not None),
        [str(folder / typed.recipe.name)],
        ["--config", str(folder / "config.json")],
        ["--run-dir", str(run_dir)],
        *by_option(flags),
    ]
    here = typed.recipe.resolve().parent
    setup = [
        f"export PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}",
        f'export PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}"{shlex.quote(str(here))} # for what the recipe imports late',
    ]
    return Submission(
        recipe=recipe, config=config, run_dir=run_dir, fresh=config.run_dir is None, folder=folder, job=job,
        files={**modules_beside(typed.recipe), "site.toml": typed.site.resolve()}, links=typed.chain or 1,
        script=write_script(template, job.directives(site), setup, arguments),
    )  # fmt: skip


def job_name(recipe: str, run_dir: Path) -> str:
    """Jobs of one name wait for each other in a chain, so that the name tells run directories apart."""
    return f"{recipe}-{run_dir.name}-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:6]}"


def check_goes_on(run_dir: Path, config: TrainConfig) -> None:
    """Refuse what could not go on with the run in `run_dir`: another sample stream, or an end that is reached.

    Raises:
        ConfigError: naming the option.
    """
    if config.resume.source == "never" or not list_checkpoints(run_dir / "checkpoints"):
        return
    saved, status, now = object_in(run_dir / "config.json"), read_status(run_dir), to_json(config)
    for name in FIXED:
        if name in saved and saved[name] != now[name]:
            raise ConfigError(f"the run in {run_dir} has another sample stream", expected=f"{name} {saved[name]}",
                              got=f"{name} {now[name]}",
                              fix=f"{flag(name)} {saved[name]}, or -- --run-dir {run_dir}-2")  # fmt: skip
    length = ("num_steps", "num_epochs", "stop")
    if status.get("state") == "completed" and all(saved.get(name) == now[name] for name in length):
        raise ConfigError(f"the run in {run_dir} is finished", expected="a longer run, or another directory",
                          got=f"step {status.get('step')}", fix=f"-- --run-dir {run_dir}-2")  # fmt: skip


def read_template(path: Path) -> str:
    """The batch script that a submission is made of."""
    try:
        return read_regular(path, MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"there is no batch script {path}", expected="train.sbatch beside the site's profile",
                          got=error, fix="cd to the folder with slurm/ in it, or --site DIR/site.toml") \
            from error  # fmt: skip


def read_config(file: Path, flags: Sequence[str], world_size: int) -> tuple[Recipe[Any], TrainConfig]:
    """The recipe, and its configuration as the job's ranks will find it.

    Raises:
        ConfigError: there is no such recipe, or it does not take these flags on so many ranks.
    """
    from distkit.cli import parse
    from distkit.load import read_recipe

    recipe = read_recipe(file)
    config: TrainConfig = parse(recipe.config, recipe.presets, flags, file.name, recipe.name, world_size=world_size)
    if config.debug.enabled:
        raise ConfigError("debug mode is not for a training job", got="--debug",
                          fix=f"sbatch slurm/debug.sbatch {file}")  # fmt: skip
    check_secrets(config)
    check_secrets_of_job(config, next(iter(recipe.presets.values())), flags)
    split_batch(config, world_size)
    return recipe, config


def check_secrets_of_job(config: TrainConfig, preset: TrainConfig, flags: Sequence[str]) -> None:
    """Refuse a secret that was typed, or that the job would not find: it starts from a file and the first preset."""
    from distkit.cli.parse import spell

    found, typed = dict(secrets_of(preset)), {spell(word).partition("=")[0] for word in flags}
    for name, value in secrets_of(config):
        missing = value and value != found.get(name) and not os.environ.get(variable(name))
        if missing or flag(name) in typed:
            raise ConfigError(f"{flag(name)} is a secret, which no file of a job may hold",
                              expected="its value in the environment, which jobs inherit",
                              fix=f"export {variable(name)}=VALUE, and leave {flag(name)} out")  # fmt: skip


def without_sources(flags: Sequence[str]) -> list[str]:
    """The flags without --preset, --config and --run-dir: the job has a configuration in which these are resolved."""
    from distkit.cli.parse import spell, take_option

    words = [spell(flag) for flag in flags]
    for option in ("--preset", "--config", "--run-dir"):
        _, words = take_option(option, words)
    return words


def check_stage(site: Site, source: str, flags: Sequence[str]) -> None:
    """Refuse to stage what is not there, is not used, or has no place to go."""
    if not Path(source).is_dir():
        raise ConfigError(f"--stage {source} is no folder", expected="the folder of a data set")
    if not site.scratch:
        raise ConfigError(f"--stage {source}: which folder of a node?", expected="scratch in the site's profile",
                          got="nothing", fix='scratch = "/tmp"')  # fmt: skip
    moved_to(flags, source, Path(site.scratch))


def modules_beside(recipe: Path) -> dict[str, Path]:
    """The recipe's file and the modules that it has imported from its own folder: path in that folder -> file."""
    folder = recipe.resolve().parent
    found = {recipe.name: recipe.resolve()}
    for name, module in list(sys.modules.items()):
        stem = Path(*name.split("."))
        for beside in (f"{stem}.py", f"{stem}/__init__.py"):
            file = getattr(module, "__file__", None)
            if file and Path(file).resolve() == folder / beside:
                found[beside] = folder / beside
    return found


def check_free(run_dir: Path) -> None:
    """Refuse a directory in which a run trains, or for which a job waits already."""
    from distkit.engine.lease import holder
    from distkit.engine.run_dir import check_files

    check_files(run_dir)
    who, jobs = holder(run_dir), jobs_of(newest_submission(run_dir))
    if who is not None:
        raise ConfigError(f"--run-dir {run_dir} is in use by another run", expected="one run per directory", got=who,
                          fix=f"--run-dir {run_dir}-2, or wait until it ends")  # fmt: skip
    waiting = [job for job, said in (ask_queue(jobs) or {}).items() if is_queued(said)]
    if waiting:
        raise ConfigError(f"job {waiting[0]} was submitted for --run-dir {run_dir}", expected="one job per directory",
                          fix=f"scancel {' '.join(waiting)}, or --run-dir {run_dir}-2")  # fmt: skip


def submit(submission: Submission, flags: Sequence[str]) -> list[str]:
    """Write the copies and the script and give it to sbatch; the jobs. What sbatch refuses leaves nothing behind.

    Raises:
        ConfigError: it cannot be written, or sbatch refuses it.
    """
    folder, jobs = submission.folder, []
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        facts = freeze(submission, flags)
        for _ in range(submission.links):
            jobs.append(sbatch(submission))
        write_json(folder / FILE, {**facts, "jobs": jobs})
    except (OSError, ConfigError) as error:
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)
        shutil.rmtree(folder, ignore_errors=True)
        for path in made[1:]:
            with suppress(OSError):
                path.rmdir()  # unless somebody has put something in it
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot write {folder}", expected="a directory that you can write to", got=error,
                          fix="-- --run-dir DIR") from error  # fmt: skip
    return jobs


def freeze(submission: Submission, flags: Sequence[str]) -> dict[str, object]:
    """Write what the job will run; what submission.json says of it."""
    from distkit.runtime.environment import git_revision

    folder = submission.folder
    submission.run_dir.mkdir(parents=True, exist_ok=not submission.fresh)
    folder.mkdir(parents=True)
    for name, file in submission.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, file.read_bytes())
    write_json(folder / "config.json", to_json(submission.config))
    write_bytes(folder / "job.sbatch", submission.script.encode(), 0o777)
    facts: dict[str, object] = {
        "recipe": submission.recipe.name,
        "flags": list(flags),
        "nodes": submission.job.nodes,
        "ranks_per_node": submission.job.ranks,
        "distkit": __version__,
        "git_revision": git_revision(Path.cwd()),
        "submitted": clock_time(),
        "files": {name: str(file) for name, file in submission.files.items()},
    }
    write_json(folder / FILE, facts)
    return facts


def sbatch(submission: Submission) -> str:
    """Submit the script; SLURM's number of the job."""
    options = ["--dependency=singleton"] if submission.links > 1 else []
    command = ["sbatch", "--parsable", *options, str(submission.folder / "job.sbatch")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError("sbatch refuses the job", expected="resources that this cluster has", got=done.stderr.strip(),
                          fix="other resources, or other settings in the site's profile")  # fmt: skip
    return done.stdout.strip().partition(";")[0]


def report(submission: Submission, jobs: Sequence[str]) -> str:
    """What was submitted, and how to follow and stop it."""
    job, run = submission.job, shlex.quote(str(submission.run_dir))
    limit = "" if job.time is None else f", for {timedelta(seconds=seconds_of(job.time))} at most"
    name = "job" if len(jobs) == 1 else "jobs"
    output = shlex.quote(str(job.output).replace("%j", jobs[0]))
    return (
        f"submitted {name} {', '.join(jobs)}: {counted(job.nodes, 'node')} x {counted(job.ranks, 'rank')}{limit}\n"
        f"  follow  tail -F {output}\n"
        f"  status  distkit show {run}\n"
        f"  stop    touch {run}/STOP   (saves first; the same directory goes on later)\n"
        f"  cancel  scancel {' '.join(jobs)}"
    )
