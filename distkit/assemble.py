"""From a recipe and a configuration to a run, in stages: data, model, loop, directory.

Each stage can be called on its own. Everything is checked before anything is written.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from distkit.config import BatchSplit, CheckpointConfig, Constant, Epochs, TrainConfig, split_batch, to_json
from distkit.config.secret import check_secrets
from distkit.data import Dataset, as_dataset
from distkit.data.reading.iterable import IterableData, IterableSource
from distkit.data.reading.loader import EvaluationLoader
from distkit.data.reading.placement import Placed, Reading, TrainSource, notes_of, open_training, place, summary_of
from distkit.data.sets.fingerprint import fingerprint_of
from distkit.ema import Ema
from distkit.engine.early_stop import EarlyStop
from distkit.engine.flops import FirstBatch, describe_peak, outline_utilization
from distkit.engine.forward_timer import ForwardTimer
from distkit.engine.frozen import Frozen, freeze
from distkit.engine.guard import Guard, describe_guard
from distkit.engine.meter import Meter
from distkit.engine.modes import choose_modes_, describe_modes
from distkit.engine.probe import probe
from distkit.engine.resume import check_resume, choose_checkpoint, load_weights_, put_damaged_aside
from distkit.engine.run import Best, Data, ResumePoint, Run, Trackers
from distkit.engine.run_dir import RunDirectory, check_usable, new_path
from distkit.engine.save import build_saver
from distkit.engine.stragglers import Stragglers, hosts_of
from distkit.errors import ConfigError, DataError
from distkit.observers import build_observers
from distkit.optim import build_optimizer, default_param_groups, skips_on_device
from distkit.recipe import Recipe
from distkit.returned import (
    add_loss_,
    asked_for,
    calling,
    check_config,
    check_dataset,
    check_groups,
    check_model,
    check_nothing,
    check_schedule,
    left_out,
)
from distkit.runtime import Topology, node_name
from distkit.runtime.environment import describe_environment
from distkit.runtime.faults import fault
from distkit.runtime.process import Runtime
from distkit.runtime.seeding import derive_seed, seeded
from distkit.schedules import Schedule
from distkit.strategies import Strategy, build_strategy, set_fp32_precision
from distkit.strategies.parameters import state_dict_names
from distkit.tensors.buffers import buffer_specs, nan_buffers

C = TypeVar("C", bound=TrainConfig)
#: One process on the CPU without a process group: the default for calling a stage from a notebook.
ALONE = Runtime(topology=Topology(), device=torch.device("cpu"))


def assemble(recipe: Recipe[C], config: C, runtime: Runtime) -> Run:
    """Build every part of a run; the run directory is written last, after every check.

    Raises:
        ConfigError: the parts do not fit together, or do not fit the checkpoint; the message says what to type.
    """
    split_batch(config, runtime.world_size)
    directory = open_directory(recipe.name, config, runtime)
    try:
        return build_run(recipe, config, runtime, directory)
    except BaseException:
        directory.release()
        raise


def build_run(recipe: Recipe[C], config: C, runtime: Runtime, directory: RunDirectory) -> Run:
    """`assemble` in a directory that is already chosen; the caller releases it."""
    fault("start-up", runtime.rank, 0)
    config = resolve_config(recipe, config, runtime)
    check_secrets(config)
    check_one_schedule(recipe, config)
    resume = choose_checkpoint(config, runtime, directory)
    strategy = build_strategy(config, runtime)
    data = open_data(recipe, config, runtime)
    model = build_model(recipe, config, data.train_set)
    load_weights_(model, resume, runtime)
    frozen = build_frozen(recipe, config, runtime)
    run = open_loop(recipe, config, runtime, directory, resume, strategy, data, model, frozen)
    with runtime.raise_on_all_ranks("comparing the checkpoint with the run"):
        check_resume(run)
    if not (config.debug.enabled or run.finished):
        probe(run)
        write_directory(recipe, run)
    return run


def open_directory(recipe: str, config: TrainConfig, runtime: Runtime) -> RunDirectory:
    """--run-dir, or a new runs/RECIPE/DATE_TIME that all ranks agree on; its lease is taken if it exists.

    Raises:
        ConfigError: the directory cannot hold this run, or another process is using it.
    """
    path = runtime.broadcast(new_path(recipe) if config.run_dir is None else config.run_dir)
    writes = runtime.is_main_process and not config.debug.enabled
    hosts = runtime.gather(node_name(os.environ))
    directory = RunDirectory(path, writes=writes, fresh=config.run_dir is None, hosts=hosts)
    try:
        with runtime.raise_on_all_ranks("choosing the run directory"):
            if writes:
                check_usable(path, resumes=config.resume.source != "never")
                directory.claim()
        directory.attempt = runtime.broadcast(directory.attempt)
    except BaseException:
        directory.release()  # another rank's error
        raise
    return directory


def resolve_config(recipe: Recipe[C], config: C, runtime: Runtime = ALONE) -> C:
    """The configuration with what the data decide (the number of classes) filled in by the recipe.

    Raises:
        ConfigError: what the recipe raises.
    """
    if recipe.resolve_config is not None:
        asking = runtime.raise_on_all_ranks("asking the data what the configuration leaves to them")
        with asking, calling("resolve_config"):
            config = check_config(recipe.resolve_config(config), recipe.config)
    return config


def open_data(recipe: Recipe[C], config: C, runtime: Runtime = ALONE) -> Data:
    """The recipe's data sets, the same on every rank.

    Raises:
        DataError: they cannot be read, are too small for a global batch, or differ between ranks.
        ConfigError: the configuration needs evaluations, but there is no test set.
    """
    train_set, test_set = build_datasets(recipe, config, runtime)
    with runtime.raise_on_all_ranks("reading the data"):
        here = [(len(part), fingerprint_of(part)) for part in (train_set, test_set) if part is not None]
    first, *others = runtime.gather(here)
    with runtime.raise_on_all_ranks("comparing the data of the ranks"):
        for rank, other in enumerate(others, 1):
            if other != first:
                raise DataError(f"rank {rank} has different data from rank 0", expected=_sizes(first),
                                got=_sizes(other), fix="the same files on every machine")  # fmt: skip
    if not isinstance(train_set, IterableData):
        check_sizes(train_set, split_batch(config, runtime.world_size), config.microbatch_size)
    check_evaluation(config, test_set)
    notes = [note for part in (train_set, test_set) if part is not None for note in notes_of(part)]
    return Data(train_set=train_set, test_set=test_set, fingerprint=first[0][1], notes=tuple(dict.fromkeys(notes)))


def _sizes(parts: list[tuple[int, str | None]]) -> str:
    return ", ".join(f"{size:,} samples" + (f" ({digest})" if digest else "") for size, digest in parts)


def build_datasets(recipe: Recipe[C], config: C, runtime: Runtime) -> tuple[Dataset | IterableData, Dataset | None]:
    """The training and the test set; rank 0 first, so that a download or a cache happens once."""
    train_set: Dataset | IterableData | None = None
    test_set: Dataset | None = None
    with runtime.raise_on_all_ranks("building the data"), runtime.main_process_first():
        # the same generators for both splits and every rank: a recipe may split one set at random
        with seeded(derive_seed(config.seed, "data")):
            with calling("build_dataset"):
                train = recipe.build_dataset(config, "train")
            check_dataset(train, "train")
        with seeded(derive_seed(config.seed, "data")):
            with calling("build_dataset"):
                test = recipe.build_dataset(config, "test")
            check_dataset(test, "test")
        if train is None:
            raise DataError(f"build_dataset of recipe {recipe.name} returned None for the split train",
                            expected="a data set with __len__ and fetch or __getitem__")  # fmt: skip
        with calling("the data set of build_dataset"):
            train_set = train if isinstance(train, IterableData) else as_dataset(train)
            test_set = None if test is None else as_dataset(test)
    assert train_set is not None  # raise_on_all_ranks raises on every rank when one failed
    return train_set, test_set


def check_sizes(train_set: Dataset, split: BatchSplit, microbatch_size: int | None = None) -> None:
    """Refuse a training set with fewer samples than one global batch.

    A global batch that straddles two epochs may still contain a sample twice.
    """
    if len(train_set) < split.global_batch_size:
        unit = split.world_size * (microbatch_size or 1)
        fitting = len(train_set) // unit * unit
        cut = fitting or len(train_set) // split.world_size * split.world_size
        raise DataError(
            f"the training set of build_dataset has {len(train_set)} samples, less than one global batch",
            expected=f"--global-batch-size of at most {len(train_set)}",
            got=f"--global-batch-size {split.global_batch_size} on {split.world_size} ranks",
            fix=f"--global-batch-size {cut}" + ("" if fitting else " --microbatch-size None")
            if cut
            else f"start at most {len(train_set)} ranks",
        )


def check_one_schedule(recipe: Recipe[C], config: C) -> None:
    """Refuse a schedule that the recipe's own would hide."""
    if recipe.build_schedule is not None and config.schedule != Constant():
        raise ConfigError(f"--schedule.name {config.schedule.name}, but recipe {recipe.name} has a build_schedule",
                          expected="the schedule of one of the two", got=str(config.schedule),
                          fix="no option of --schedule, and none in the preset")  # fmt: skip


def check_evaluation(config: TrainConfig, test_set: Dataset | None) -> None:
    """Refuse evaluations without a test set, and a schedule that needs evaluations but gets none."""
    if test_set is None and config.schedule.needs_evaluations:
        raise ConfigError(f"--schedule.name {config.schedule.name} acts on evaluations, and the recipe has no test set",
                          expected="a test set from build_dataset, or another schedule", got="no test set",
                          fix="--schedule.name constant --eval-every None")  # fmt: skip
    if config.stop.enabled and (test_set is None or config.eval_every is None) and not config.debug.enabled:
        raise ConfigError("--stop acts on evaluations", expected="a test set, and --eval-every; or no option of --stop",
                          got="no test set" if test_set is None else "--eval-every None",
                          fix=None if test_set is None else "--eval-every 500")  # fmt: skip
    if test_set is None and config.eval_every is not None and not config.debug.enabled:
        raise ConfigError("--eval-every is set, but the recipe has no test set",
                          expected="a test set from build_dataset", got=f"--eval-every {config.eval_every}",
                          fix="--eval-every None")  # fmt: skip
    if config.schedule.needs_evaluations and config.eval_every is None:
        raise ConfigError(f"--schedule.name {config.schedule.name} acts on evaluations",
                          expected="a test set, and evaluations of it", got=f"--eval-every {config.eval_every}",
                          fix="--eval-every 500")  # fmt: skip


def build_model(recipe: Recipe[C], config: C, train_set: Dataset | IterableData | None = None) -> nn.Module:
    """The recipe's model with its initial weights, on the CPU, in the modes of training; the same on every rank.

    Args:
        recipe, config: of the run.
        train_set: for a recipe whose initial weights depend on data (`init_model_`); without it these are left out.
            Where `build_model` asks for it, it is built.

    Raises:
        ConfigError: the model has no parameter to train.
    """
    more = asked_for(recipe.build_model, train_set=train_set)
    if more and train_set is None:
        more["train_set"], _ = build_datasets(recipe, config, ALONE)
    with seeded(derive_seed(config.seed, "init")):
        with calling("build_model"):
            model = check_model(recipe.build_model(config, **more))
        if recipe.build_loss is not None:
            with calling("build_loss"):
                add_loss_(model, recipe.build_loss(config))
        if recipe.init_model_ is not None and train_set is not None:
            with calling("init_model_"):
                check_nothing(recipe.init_model_(config, model, train_set))
    choose_modes_(model)
    return model


def build_frozen(recipe: Recipe[C], config: C, runtime: Runtime) -> Frozen | None:
    """The recipe's helper that is not trained; None where it has none.

    Raises:
        ConfigError: it is no module, or compute_loss does not take it.
    """
    if recipe.build_frozen is None:
        return None
    if not asked_for(recipe.compute_loss, frozen=None):
        raise ConfigError(f"recipe {recipe.name} has a build_frozen, and its compute_loss does not take what it builds",
                          expected="a parameter named frozen",
                          fix="def compute_loss(config, model, batch, frozen)")  # fmt: skip
    with seeded(derive_seed(config.seed, "frozen")), calling("build_frozen"):
        module = recipe.build_frozen(config)
    return freeze(module, config, runtime)


def open_loop(
    recipe: Recipe[C],
    config: C,
    runtime: Runtime,
    directory: RunDirectory,
    resume: ResumePoint,
    strategy: Strategy,
    data: Data,
    model: nn.Module,
    frozen: Frozen | None = None,
) -> Run:
    """Lay the model over the ranks, open the loaders, and put the run together; nothing is written."""
    set_fp32_precision(config.precision)
    split = split_batch(config, runtime.world_size)
    steps_per_epoch = len(data.train_set) / split.global_batch_size
    num_steps = count_steps(config, steps_per_epoch)
    aliases = {name: canonical for name, canonical in state_dict_names(model).items() if name != canonical}
    utilization = outline_utilization(config, runtime, model)
    strategy.prepare(model, optimizer_builder(recipe, config, resume.warnings))
    reading = Reading(
        data=config.data,
        seed=config.seed,
        device=runtime.device,
        channels_last=config.channels_last,
        local_world_size=runtime.topology.local_world_size,
        in_process=config.debug.enabled,
        timeout_seconds=config.timeout_seconds,
    )
    train = open_training(data.train_set, reading, split, runtime.rank)
    test = None if data.test_set is None else place(data.test_set, reading)
    best = Best(*recipe.best)
    saves = config.checkpoint.enabled and not config.debug.enabled and resume.completed_steps < num_steps
    schedule = build_schedule(recipe, config, num_steps, steps_per_epoch)
    guard = None if config.on_nan == "raise" else Guard(strategy, runtime)
    return Run(
        recipe=recipe.name,
        config=config,
        runtime=runtime,
        split=split,
        num_steps=num_steps,
        data=data,
        strategy=strategy,
        loader=train.loader if utilization is None else FirstBatch(train.loader, utilization.see),
        test_loader=None if test is None else EvaluationLoader(test.fetcher, len(test.dataset)),
        compute_loss=partial(recipe.compute_loss, config, **({} if frozen is None else {"frozen": frozen.module})),
        frozen=frozen,
        compute_metrics=recipe.compute_metrics,
        schedule=schedule,
        plateau=config.schedule.tracker(),
        early_stop=EarlyStop(config.stop) if config.stop.enabled and not config.debug.enabled else None,
        ema=None if config.ema_decay is None else Ema(strategy.module, config.ema_decay, strategy.model_tensors()),
        directory=directory,
        resume=resume,
        data_state=train.loader if isinstance(train.loader, IterableSource) else None,
        aliases=aliases,
        buffer_specs=buffer_specs(strategy.module),
        nan_buffers=nan_buffers(strategy.module),
        utilization=utilization,
        facts=describe(config, runtime, strategy, split, num_steps, train, test)
        | ({"schedule": "build_schedule of the recipe"} if recipe.build_schedule is not None else {})
        | describe_guard(config, strategy)
        | describe_peak(config, runtime),
        meter=Meter(runtime, recipe.compute_metrics, copies=strategy.reuses_outputs, drops_bad=guard is not None),
        guard=guard,
        trackers=Trackers(best),
        saver=build_saver(directory.checkpoints, runtime, config.checkpoint, recipe=recipe.name, strategy=strategy.name,
                          best=best, source=resume.own_step) if saves else None,
        forward_timer=build_forward_timer(config, runtime, strategy),
        stragglers=Stragglers(hosts_of(runtime)),
        observers=build_observers(config.observe, directory.path, runtime.is_main_process),
    )  # fmt: skip


def build_schedule(recipe: Recipe[C], config: C, num_steps: int, steps_per_epoch: float) -> Schedule:
    """The recipe's own schedule where it has one, else that of the configuration."""
    if recipe.build_schedule is None:
        return config.schedule.build(num_steps=num_steps, steps_per_epoch=steps_per_epoch)
    more = asked_for(recipe.build_schedule, steps_per_epoch=steps_per_epoch)
    with calling("build_schedule"):
        return check_schedule(recipe.build_schedule(config, num_steps, **more), num_steps)


def build_forward_timer(config: TrainConfig, runtime: Runtime, strategy: Strategy) -> ForwardTimer:
    """What measures the forward, where there is another rank to compare it with."""
    gates = strategy.gates() if runtime.world_size > 1 else None
    return ForwardTimer() if gates is None else ForwardTimer(config.report_every, runtime.device, gates)


def write_directory(recipe: Recipe[C], run: Run) -> None:
    """Make the run directory and write what the run is.

    Raises:
        ConfigError: it cannot be made or written, or another process has it.
    """
    with run.runtime.raise_on_all_ranks("making the run directory"):
        environment = describe_environment(run.runtime) | {"data": run.data.fingerprint}
        run.directory.num_steps = run.num_steps
        run.directory.create(to_json(run.config), environment, recipe_file(recipe), saves=run.saver is not None)
    put_damaged_aside(run)


def recipe_file(recipe: Recipe[C]) -> tuple[str, Path] | None:
    """The recipe's name and the file that its functions come from; None where they were typed into a notebook."""
    file = getattr(sys.modules.get(recipe.compute_loss.__module__), "__file__", None)
    return None if file is None else (recipe.name, Path(file).resolve())


def count_steps(config: TrainConfig, steps_per_epoch: float) -> int:
    """Length of the run in steps; a last part of a step is rounded up."""
    if config.debug.enabled and config.debug.overfit_batches is None:
        return config.debug.num_steps
    if config.num_steps is not None:
        return config.num_steps
    assert config.num_epochs is not None  # TrainConfig holds exactly one of the two
    # without the rounding 160 epochs of 390.625 steps could become 62,501 through a last binary digit
    return math.ceil(round(config.num_epochs * steps_per_epoch, 6))


def optimizer_builder(recipe: Recipe[C], config: C, notes: list[str]) -> Callable[[nn.Module], Optimizer]:
    """model -> optimizer, over the recipe's own parameter groups where it has them; what they leave out is noted."""

    def build(model: nn.Module) -> Optimizer:
        if recipe.build_param_groups is None:
            return build_optimizer(config.optim, default_param_groups(model, config.optim))
        with calling("build_param_groups"):
            groups = check_groups(recipe.build_param_groups(config, model), model)
        if note := left_out(groups, model):
            notes.append(note)
        try:
            return build_optimizer(config.optim, groups)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"build_param_groups returned groups that --optim.name {config.optim.name} does not take",
                              expected='[{"params": [...], "lr": ...}, ...]', got=error) from error  # fmt: skip

    return build


def describe(
    config: TrainConfig,
    runtime: Runtime,
    strategy: Strategy,
    split: BatchSplit,
    num_steps: int,
    train: TrainSource,
    test: Placed | None,
) -> dict[str, str]:
    """The resolved choices, as printed at the start and repeated in summary.json."""
    threads = f", {torch.get_num_threads()} threads each" if runtime.device.type == "cpu" else ""
    ranks = "1 rank" if runtime.world_size == 1 else f"{runtime.world_size} ranks"
    parameters = strategy.num_parameters
    waits = config.precision == "fp16" and not skips_on_device(strategy.optimizer)
    return {
        "device": f"{runtime.device.type}, {ranks} ({strategy.describe()}{threads}), "
        f"started by {runtime.topology.launcher}",
        "precision": config.precision
        + (", compiled" if config.compile else "")
        + (f"; {config.optim.name} waits for the device once per step to skip bad updates" if waits else ""),
        "model": f"{strategy.model_name}, {parameters:,} parameters"
        + (f"; in evaluation mode: {kept}" if (kept := describe_modes(strategy.module)) else ""),
        "train_data": train.summary,
        "test_data": "none" if test is None else summary_of(test.dataset),
        "placement": train.placement,
        "global_batch": f"{split.global_batch_size} = {split.microbatch_size} x {ranks} x {split.accum_steps} "
        + ("microbatch" if split.accum_steps == 1 else "microbatches"),
        "length": f"{num_steps:,} steps, {train.num_samples / split.global_batch_size:,.1f} per epoch",
        "checkpoints": describe_saves(config.checkpoint) if config.checkpoint.enabled else "none",
        "optimizer": f"{config.optim.name}, lr {config.optim.lr:g}",
        "schedule": config.schedule.name,
    }


def describe_saves(config: CheckpointConfig) -> str:
    """When a run saves, and which checkpoints are kept."""
    every = config.save_every
    interval = f"{every.number:g} epochs" if isinstance(every, Epochs) else f"{every or 0:,} steps"
    when = "at the end" if every is None else f"every {interval} and at the end"
    kept = "all are kept" if config.keep_last is None else f"the last {config.keep_last} are kept"
    best = "" if config.keep_best is None else f", and the best {config.keep_best}"
    return f"{when}; {kept}{best}" + ("" if config.keep_every is None else f", and every {config.keep_every:,}th step")
