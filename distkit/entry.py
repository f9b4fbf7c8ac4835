"""From a command line to an exit code: what a recipe's file calls last."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Sequence
from pathlib import Path
from traceback import extract_tb
from types import TracebackType
from typing import TypeVar, cast

from distkit.cli import parse
from distkit.config import TrainConfig, ranks_that_fit, reset_for_debugging, split_batch
from distkit.config.secret import check_secrets
from distkit.engine.endings import RunFailedError, complain, ending_together, leave
from distkit.engine.run_dir import holds_run
from distkit.errors import ConfigError, masked, say
from distkit.recipe import Recipe
from distkit.runtime import Topology, rank_for_messages, read_accelerate_env, read_topology
from distkit.runtime.faults import check_faults
from distkit.runtime.signals import StopSignals

C = TypeVar("C", bound=TrainConfig)
_other_errors = sys.excepthook


def refuse_file(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a recipe's file that refuses itself before `main`, such as a preset with a wrong value, as `main` would."""
    if not isinstance(error, ConfigError) or hasattr(sys, "ps1"):
        _other_errors(kind, error, trace)
        return
    if rank_for_messages(os.environ) == 0:
        others = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<")
        calls = [call for call in extract_tb(trace) if not call.filename.startswith(others)]
        say("\n".join([f"distkit: error: {error}", *[f"  in:       {c.filename}:{c.lineno}" for c in calls[-1:]]]))
    leave(ConfigError.exit_code)


sys.excepthook = refuse_file


def main(recipe: Recipe[C], argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 configuration, 75 stopped and resumable."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    signals = StopSignals(announces=rank_for_messages(os.environ) == 0) if on_main_thread else None
    code = launch(recipe, sys.argv[1:] if argv is None else argv, signals)
    distributed = sys.modules.get("torch.distributed")
    if code and distributed is not None and distributed.is_initialized():
        leave(code)
    sys.exit(code)


def launch(recipe: Recipe[C], argv: Sequence[str], signals: StopSignals | None = None) -> int:
    """Parse, train, and say how it went as an exit code. Errors are one message on stderr.

    Args:
        recipe, argv: what to train, and the flags.
        signals: those that ask for a stop, noted so far; debug mode is ended by them as any program is.
    """
    topology = Topology(rank=rank_for_messages(os.environ))
    debugger = False
    try:
        topology = read_topology(os.environ)
        check_faults()
        launched = read_accelerate_env(os.environ, topology.world_size)
        prog, summary = f"{recipe.name}.py", recipe_summary(recipe)
        config = parse(recipe.config, recipe.presets, argv, prog, summary, launched, topology.world_size)
        check_secrets(config)
        sys.argv = [masked(word) for word in sys.argv]  # which other libraries write down
        debugger = config.debug.pdb
        if config.debug.enabled:
            config = debug_config(config, topology)
            if signals is not None:
                signals.close()
                signals = None
        check_split(config, topology.world_size)
        run_recipe(recipe, config, topology, signals)
    except Exception as error:
        code = complain(error, topology.rank, topology.world_size)
        if debugger:
            post_mortem()
        return code
    return 0


def check_split(config: TrainConfig, world_size: int) -> None:
    """Refuse ranks over which the global batch does not divide, before torch is imported.

    Raises:
        ConfigError: with sizes that do; for a run that goes on, whose global batch must stay, with numbers of ranks.
    """
    try:
        split_batch(config, world_size)
    except ConfigError as error:
        run_dir, ranks = config.run_dir, ranks_that_fit(config, world_size)
        if run_dir is None or config.resume.source == "never" or not ranks or not holds_run(run_dir):
            raise
        cut = "" if config.microbatch_size is None else f" x microbatches of {config.microbatch_size}"
        raise ConfigError(
            f"the run in {run_dir} does not go on with {world_size} ranks",
            expected=f"ranks over which its global batch of {config.global_batch_size} divides",
            got=f"{world_size} ranks{cut}",
            fix=f"start {' or '.join(map(str, ranks))} ranks"
            + (", or --microbatch-size None" if config.global_batch_size % world_size == 0 else ""),
        ) from error


def recipe_summary(recipe: Recipe[C]) -> str:
    """The docstring of the recipe's file."""
    module = sys.modules.get(recipe.compute_loss.__module__)
    return (module.__doc__ if module is not None else None) or recipe.name


def post_mortem() -> None:
    """Open the debugger at the exception being handled."""
    import pdb

    error = sys.exception()
    error = error.error if isinstance(error, RunFailedError) else error
    pdb.post_mortem(None if error is None else error.__traceback__)


def debug_config(config: C, topology: Topology) -> C:
    """The configuration of debug mode, before CUDA starts.

    Raises:
        ConfigError: more than one process, or an option that debug mode would ignore.
    """
    if topology.world_size > 1:
        raise ConfigError("--debug runs in one process", expected="1 process", got=f"{topology.world_size} ranks",
                          fix="python RECIPE --debug")  # fmt: skip
    if config.run_dir is not None:
        raise ConfigError("--debug writes no run directory", got=f"--run-dir {config.run_dir}", fix="--run-dir None")
    if config.resume.source != "auto":
        raise ConfigError("--debug starts from fresh weights", got=f"--resume {config.resume.source}",
                          fix="--resume auto")  # fmt: skip
    if config.observe.tensorboard or config.observe.wandb or config.observe.also:
        raise ConfigError("--debug reports to the terminal only", expected="no other observer",
                          fix="--observe.no-tensorboard --observe.no-wandb --observe.also None")  # fmt: skip
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    return reset_for_debugging(config)


def train(recipe: Recipe[C], config: C) -> dict[str, object]:
    """Train `recipe` with `config` from Python: a notebook, or a search over hyperparameters.

    What it changes in this process (threads, determinism, global random generators, environment variables) is as
    before afterwards, so it can be called many times.

    Returns:
        What summary.json holds; {} for a run that was finished already, and in debug mode.

    Raises:
        DistkitError: the run failed or was stopped; ConfigError where nothing was begun.
    """
    topology = read_topology(os.environ)
    check_faults()
    from distkit.runtime.process_state import unchanged_process

    with unchanged_process():
        config = debug_config(config, topology) if config.debug.enabled else config
        split_batch(config, topology.world_size)
        try:
            return run_recipe(recipe, config, topology, None)
        except RunFailedError as failed:
            if failed.is_first:
                raise failed.error  # noqa: B904  # its own traceback says more
            raise


def run_recipe(recipe: Recipe[C], config: C, topology: Topology, signals: StopSignals | None) -> dict[str, object]:
    """Train `recipe` as `config` says in this process; returns the summary.

    Raises:
        RunFailedError: with the first cause and its exit code.
        Stopped: the run was told to stop, and can be continued.
    """
    from distkit.assemble import build_run, open_directory
    from distkit.debug import debug
    from distkit.engine.fit import fit
    from distkit.engine.watchdog import watching
    from distkit.runtime.process import start

    runtime = start(config, topology)
    summary: dict[str, object] = {}
    watched = None if config.debug.enabled else config.watchdog_seconds  # a debugger stops for as long as it likes
    with ending_together(runtime, signals) as ending, watching(ending, watched):
        ending.directory = open_directory(recipe.name, config, runtime)
        run = build_run(recipe, config, runtime, ending.directory)
        if config.debug.enabled:
            expected_loss = recipe.expected_initial_loss
            debug(run, None if expected_loss is None else expected_loss(cast(C, run.config)))
        elif run.finished:
            if runtime.is_main_process:
                done = run.resume.completed_steps
                print(f"{run.directory.path} is finished: {done:,} steps are done (more: --num-steps N)")
        else:
            summary = fit(run)
    runtime.close()
    return summary
