"""From a run directory back to a model: no process group, no lease, no optimizer."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from distkit.assemble import ALONE, build_model
from distkit.checkpoint.format import step_name
from distkit.checkpoint.read import load_tensors
from distkit.checkpoint.restore import differences, newest_verified, open_verified
from distkit.checkpoint.retention import list_checkpoints
from distkit.checkpoint.verify import VerifiedCheckpoint, step_of_weights
from distkit.cli import parse
from distkit.config import TrainConfig
from distkit.engine.resume import read_tensors, recomputed_buffers, restore_extra_states_
from distkit.engine.run_dir import SOURCE, RunDirectory
from distkit.errors import CheckpointError, ConfigError, DataError, DistkitError, say, shorten
from distkit.files import read_regular
from distkit.json_files import MAX_BYTES, JsonError, a_text, known, read_object
from distkit.recipe import Recipe
from distkit.tensors.buffers import buffer_slots, set_rank_buffers_, shared_buffers

AnyRecipe = Recipe[Any]
#: "last": the newest weights; "best": those of the best evaluation; a number: those of a step.
Which = Literal["best", "last"] | int


def load_run(
    run_dir: Path | str,
    which: Which = "last",
    *,
    recipe: AnyRecipe | Path | str | None = None,
    ema: bool | None = None,
) -> tuple[TrainConfig, nn.Module]:
    """The configuration and the trained model of a run, finished or not.

    Args:
        run_dir: the run's directory.
        which: "last", "best" (chosen as the recipe says; its checkpoint must have been kept), or a saved step.
        recipe: the recipe, or its file; None: the file that the run was started with, from where it was. "copy" takes
            the copy in the run directory: code from a directory that may be somebody else's, so it must be requested.
        ema: take the moving average of the weights; None: where the run keeps one, as its evaluations do.

    Returns:
        The configuration of the run, of the recipe's class, and the model on the CPU, in evaluation mode.

    Raises:
        ConfigError: there is no such run, recipe or step.
        CheckpointError: the checkpoint is damaged.
    """
    directory = RunDirectory(Path(run_dir), writes=False)
    if not (directory.path / "config.json").is_file():
        raise ConfigError(f"{directory.path} is not a run directory", expected="a directory with config.json",
                          fix="runs/RECIPE/RUN")  # fmt: skip
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(directory.path, recipe)
    config = load_config(directory.path, recipe)
    return config, load_model(recipe, config, directory.path, which, ema=ema)


def load_model(
    recipe: AnyRecipe, config: TrainConfig, run_dir: Path, which: Which = "last", *, ema: bool | None = None
) -> nn.Module:
    """The trained model of `config`, on the CPU, in evaluation mode; arguments and errors as in `load_run`."""
    averaged = config.ema_decay is not None if ema is None else ema
    if averaged and config.ema_decay is None:
        raise ConfigError(f"{run_dir} has no averaged weights", expected="a run with --ema-decay", fix="ema=False")
    try:
        model = build_model(recipe, config)
    except DistkitError:
        raise
    except Exception as error:
        raise ConfigError(f"the recipe {recipe.name} cannot build the model that {run_dir / 'config.json'} describes",
                          got=f"{type(error).__name__}: {error}", expected="the configuration of a run",
                          fix='recipe="copy", if the recipe has changed') from error  # fmt: skip
    load_weights_(model, RunDirectory(run_dir, writes=False), which, ema=averaged)
    return model.eval()


def load_config(run_dir: Path, recipe: AnyRecipe, flags: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a run, with `flags` (as on the recipe's command line) over it."""
    argv = [f"--config={run_dir / 'config.json'}", *flags]
    config: TrainConfig = parse(recipe.config, recipe.presets, argv, recipe.name, "")
    return config


def load_recipe(run_dir: Path, file: Path | str | None = None) -> AnyRecipe:
    """The recipe of a run, from its file; says on stderr when the file has changed since the run.

    Args:
        run_dir: the run's directory.
        file: see `load_run`.

    Raises:
        ConfigError: the file is not there, is in the run directory itself, or holds no such recipe.
    """
    source = read_source(run_dir)
    copy = run_dir / "recipe" / Path(str(source.get("file", ""))).name
    trust = f'recipe="copy" (--recipe copy) runs the code in {copy}: do so if you trust that directory'
    if file is None:
        if "file" not in source:
            raise ConfigError(f"{run_dir} does not say where its recipe is", expected="the recipe's file",
                              fix="recipe=FILE (--recipe FILE)")  # fmt: skip
        file = Path(str(source["file"]))
        if not file.is_file() or file.resolve().is_relative_to(run_dir.resolve()):
            raise ConfigError(f"the recipe of {run_dir} is no longer at {file}", expected="the file it was run with",
                              fix=f"recipe=FILE (--recipe FILE); or {trust}")  # fmt: skip
        if hashlib.sha256(_python(file)).hexdigest() != source.get("sha256"):
            say(f"distkit: warning: {file} has changed since the run was started; {trust}")
    elif file == "copy":
        file = copy
    return read_recipe(Path(file), None if "recipe" not in source else str(source["recipe"]))


def read_source(run_dir: Path) -> Mapping[str, object]:
    """What recipe/source.json says: recipe (its name), file, sha256; {} where there is none."""
    path = run_dir / "recipe" / SOURCE
    try:
        return known(read_object(path), {"recipe": a_text, "file": a_text, "sha256": a_text})
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, JsonError) as error:
        raise ConfigError(f"{path} cannot be read", expected="JSON that a run wrote", got=error,
                          fix="recipe=FILE (--recipe FILE)") from error  # fmt: skip


def read_recipe(file: Path, name: str | None = None) -> AnyRecipe:
    """The recipe `name`, or the only one, that is defined in `file`; the file is run.

    Raises:
        ConfigError: there is no such file, it is no Python, or has not that recipe in it.
    """
    _python(file)
    file = file.resolve()
    module_name = f"distkit_recipe_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:  # of a name without .py
        raise ConfigError(f"there is no recipe {file}", expected="a Python file", fix="recipes/cifar10.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    sys.path.insert(0, str(file.parent))  # as `python FILE` does
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    recipes = [value for value in vars(module).values() if isinstance(value, Recipe)]
    matching = [recipe for recipe in recipes if name in (None, recipe.name)]
    if len({id(recipe) for recipe in matching}) != 1:
        known = ", ".join(recipe.name for recipe in recipes) or "no recipe"
        raise ConfigError(f"{file} does not define the recipe {name or ''}".rstrip(), expected=name or "one recipe",
                          got=known, fix="recipe=FILE (--recipe FILE)")  # fmt: skip
    return matching[0]


def _python(file: Path) -> bytes:
    """The content of a Python file, which is not run."""
    try:
        text = read_regular(file, MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        raise ConfigError(f"there is no recipe {file}", expected="a Python file", got=error, fix="recipes/cifar10.py") \
            from error  # fmt: skip
    try:
        compile(text, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{file} is no Python", got=f"{type(error).__name__}: {error}") from error
    return text


def module_of(recipe: AnyRecipe) -> ModuleType:
    """The module that the recipe's functions come from: what else its file defines."""
    return sys.modules[recipe.compute_loss.__module__]


def load_weights_(model: nn.Module, directory: RunDirectory, which: Which, *, ema: bool) -> None:
    """Fill `model` with weights, buffers and extra states of a run; see `load_run`."""
    steps = list_checkpoints(directory.checkpoints)
    final = directory.path / ("ema.safetensors" if ema else "weights.safetensors")
    written = _step_in(final, has_others=bool(steps)) if which == "last" and os.path.lexists(final) else -1
    # a run that was continued has newer checkpoints than the weights of its first end
    if written >= max(steps, default=0):
        _load_final_(model, final)
        return
    try:
        checkpoint = choose_checkpoint(directory, which, steps)
    except CheckpointError:
        if written < 0:
            raise
        _load_final_(model, final)
    else:
        _load_checkpoint_(model, checkpoint, ema=ema)


def choose_checkpoint(directory: RunDirectory, which: Which, steps: list[int]) -> VerifiedCheckpoint:
    """The verified checkpoint that `which` means."""
    folder = directory.checkpoints
    known = f"steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
    newest = newest_verified(folder, ALONE, lambda message: say(f"distkit: warning: {message}"))
    if newest is None:
        raise ConfigError(f"{directory.path} holds no weights", expected="a checkpoint, or weights.safetensors",
                          got="a run that has saved nothing yet")  # fmt: skip
    if which == "last":
        return newest
    step = which
    if which == "best":
        best = cast(Mapping[str, float] | None, newest.parts()["trackers"]["best"])
        if best is None:
            raise ConfigError(f"{directory.path} was never evaluated, so no step is the best", expected="evaluations",
                              fix='which="last"')  # fmt: skip
        step = round(best["step"])
    if step not in steps:
        keep = "; --checkpoint.keep-best 1 keeps the best" if which == "best" else ""
        got = f"the best, which is step {step}" if which == "best" else f"step {step}"
        raise ConfigError(f"{directory.path} holds no checkpoint of step {step}", expected=known, got=got,
                          fix=f'which="last"{keep}')  # fmt: skip
    return newest if step == newest.manifest.step else open_verified(folder / step_name(int(step)), ALONE)


def _load_checkpoint_(model: nn.Module, checkpoint: VerifiedCheckpoint, *, ema: bool) -> None:
    live = {**dict(model.named_parameters()), **shared_buffers(model)}
    tensors = {f"model/{name}": tensor.detach() for name, tensor in live.items()}
    recomputed = recomputed_buffers(model, tensors, checkpoint)
    lines = differences(checkpoint.manifest, tensors, ("model/",), recomputed)
    if lines:
        raise ConfigError("\n  ".join([f"{checkpoint.directory} does not fit the recipe's model", *lines]),
                          fix='recipe="copy", if the recipe has changed')  # fmt: skip
    tensors = {name: tensor for name, tensor in tensors.items() if name not in recomputed}
    load_tensors(checkpoint.directory, checkpoint.manifest, tensors)
    if ema:
        saved = checkpoint.manifest.tensors.keys()
        averages = {f"ema/{name}": tensor.detach() for name, tensor in live.items() if f"ema/{name}" in saved}
        load_tensors(checkpoint.directory, checkpoint.manifest, averages)
    restore_extra_states_(model, checkpoint)
    set_rank_buffers_(model, read_tensors(checkpoint, "buffer/00000/"), torch.device("cpu"))


def _load_final_(model: nn.Module, file: Path) -> None:
    try:
        weights = load_file(file)
        own = {slot.name for slot in buffer_slots(model) if slot.rank_own}
        set_rank_buffers_(model, {name: weights.pop(name) for name in own & weights.keys()}, torch.device("cpu"))
        result = model.load_state_dict(weights, strict=False)
        missing = [name for name in result.missing_keys if not name.endswith("_extra_state") and name not in own]
        if missing or result.unexpected_keys:
            raise RuntimeError(f"missing {shorten(missing)}; unexpected {shorten(result.unexpected_keys)}")
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise DataError(f"{file} does not hold the weights of the recipe's model", got=error,
                        expected="weights of the same configuration") from error  # fmt: skip


def _step_in(file: Path, *, has_others: bool) -> int:
    """The step whose weights `file` holds; -1 where it cannot be read, and there are others."""
    try:
        return step_of_weights(file)
    except CheckpointError as error:
        if has_others:
            say(f"distkit: warning: {error}")
            return -1
        raise DataError(f"{file} cannot be read", expected="weights that a run has written", got=error) from error
