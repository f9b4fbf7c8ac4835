"""`distkit generate`: text from a run of a language model. No GPU and no process group; any world size and strategy."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Literal, cast

from distkit.cli import parse
from distkit.commands.parser import Parser, split_flags
from distkit.config import TrainConfig
from distkit.errors import CheckpointError, ConfigError

Weights = Literal["last", "ema"]
#: What a run leaves when it ends.
FILES: dict[Weights, str] = {"last": "weights.safetensors", "ema": "ema.safetensors"}


def command(args: Sequence[str]) -> str:
    """The prompt, and what the model gives after it."""
    own_args, flags = split_flags(args)
    typed = _parser().parse_args(own_args)
    _check(typed)

    from distkit.commands.tools.locate import is_checkpoint, run_of

    run = run_of(typed.run) if is_checkpoint(typed.run) else typed.run
    if not (run / "config.json").exists():
        raise ConfigError(f"{typed.run} is no run", expected="a directory with config.json, or a checkpoint in one",
                          fix="distkit generate runs/gpt/RUN")  # fmt: skip
    with found_weights(typed.run, run, typed.weights) as (name, weights):
        module = load_recipe(name, typed.recipe)
        recipe = module.recipe
        config = parse(
            recipe.config, recipe.presets, [f"--config={run / 'config.json'}", *flags], "generate", ""
        ).config
        check_data(run, module, config)
        model = module.load_model(config, weights)
    text: str = module.sample(config, model, typed.prompt, num_new=typed.max_tokens, temperature=typed.temperature,
                              top_k=typed.top_k, seed=typed.seed)  # fmt: skip
    return text


def _parser() -> Parser:
    parser = Parser(
        "distkit generate",
        description="Text from a run, the same each time for the same seed. RUN is its directory: the weights of its "
        "last step or, where it has not ended, those of its newest checkpoint that verifies; or one checkpoint. "
        "Options of the recipe come last, behind --, such as -- --text FILE where the text has moved.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run directory, or a checkpoint in it")
    parser.add_argument("--prompt", metavar="TEXT", default="\n", help="what to go on from (a line break)")
    parser.add_argument("--max-tokens", type=int, default=500, metavar="N", help="tokens to add (500)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T",
                        help="0 takes the likeliest token, 1 draws as the model says (0.8)")  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens (all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (0)")
    parser.add_argument("--weights", choices=list(FILES), default="last",
                        help="last: as trained; ema: their average, where the run keeps one (last)")  # fmt: skip
    parser.add_argument("--recipe", metavar="FILE", type=Path, help="the recipe's file (recipes/NAME.py)")
    return parser


def _check(typed: argparse.Namespace) -> None:
    """Refuse numbers out of range before torch is imported; `not (a <= b)` also refuses NaN."""
    bad = {
        "max-tokens": (not typed.max_tokens >= 0, "0 or more", 500),
        "temperature": (not 0 <= typed.temperature < float("inf"), "a number of 0 or more", 0.8),
        "top-k": (typed.top_k is not None and typed.top_k < 1, "1 or more", 40),
        "seed": (not 0 <= typed.seed < 2**63, "0 to 2^63 - 1", 0),
    }
    for name, (wrong, expected, example) in bad.items():
        if wrong:
            got = getattr(typed, name.replace("-", "_"))
            raise ConfigError(f"--{name} has a value it cannot take", expected=expected, got=got,
                              fix=f"--{name} {example}")  # fmt: skip


@contextmanager
def found_weights(path: Path, run: Path, which: Weights) -> Iterator[tuple[str, Path]]:
    """The recipe's name and a safetensors file with the weights, which may go away afterwards.

    Args:
        path: what was typed: `run` or one checkpoint.
        run: the run directory.
        which: "last" or "ema".

    Raises:
        ConfigError: there are no such weights.
        CheckpointError: the checkpoint that was named is damaged, or each one of the run is.
    """
    from distkit.checkpoint.format import step_name
    from distkit.checkpoint.retention import list_checkpoints
    from distkit.commands.tools.locate import FOLDER, is_checkpoint

    ended = run / FILES[which]
    steps = list_checkpoints(run / FOLDER)
    if not is_checkpoint(path):
        if ended.exists():
            name, step = _read_metadata(ended)
            # a run that goes on has newer checkpoints than the weights of its first end
            steps = [newer for newer in steps if newer > step]
            if not steps:
                yield name, ended
                return
        elif not steps:
            raise ConfigError(f"{run} holds no weights", expected=f"{ended.name}, or a checkpoint",
                              got="a run that has saved nothing yet")  # fmt: skip
    candidates = [path] if is_checkpoint(path) else [run / FOLDER / step_name(step) for step in reversed(steps)]
    with tempfile.TemporaryDirectory(prefix="distkit-generate-") as folder:
        out = Path(folder) / "weights.safetensors"
        try:
            _export_first(candidates, out, which)
        except CheckpointError:
            if is_checkpoint(path) or not ended.exists():
                raise
            out = ended
        yield _read_metadata(out)[0], out


def _export_first(candidates: Sequence[Path], out: Path, which: Weights) -> None:
    """Write the weights of the first of `candidates` that verifies; the others are named on stderr."""
    from distkit.commands.tools.export import export

    for place, directory in enumerate(candidates):
        try:
            export(directory, out, ema=which == "ema")
        except CheckpointError as error:
            if place == len(candidates) - 1:
                raise
            print(f"distkit: warning: {directory} is passed over: {error}", file=sys.stderr)
        else:
            return


def _read_metadata(file: Path) -> tuple[str, int]:
    """Recipe and step of a safetensors file of distkit."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
        return metadata["recipe"], int(metadata["step"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read", expected="weights that a run has written", got=error) from error


def load_recipe(name: str, file: Path | None) -> ModuleType:
    """The module of the recipe `name`, which can load a model and sample from it.

    Raises:
        ConfigError: there is no such file, it is another recipe, or one that samples nothing.
    """
    if file is None:
        known = [parent / "recipes" / f"{name}.py" for parent in (Path(), Path(__file__).parents[2])]
        file = next((path for path in known if path.exists()), known[0])
    spec = importlib.util.spec_from_file_location(f"distkit_recipe_{os.getpid()}", file)
    if spec is None or spec.loader is None or not file.exists():
        raise ConfigError(f"the recipe {name} is not at {file}", expected="the file that the run was started with",
                          fix=f"--recipe FILE/{name}.py")  # fmt: skip
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    own = cast(object, getattr(getattr(module, "recipe", None), "name", None))
    if own != name:
        raise ConfigError(f"the run is of the recipe {name}", expected=f"the file of {name}", got=f"{file}: {own}",
                          fix=f"--recipe recipes/{name}.py")  # fmt: skip
    if not (hasattr(module, "sample") and hasattr(module, "load_model")):
        raise ConfigError(f"the recipe {name} generates nothing", expected="a run of a language model, such as gpt",
                          got=f"{file} without load_model and sample", fix="distkit generate runs/gpt/RUN")  # fmt: skip
    return module


def check_data(run: Path, module: ModuleType, config: TrainConfig) -> None:
    """Refuse a text that has been replaced: its characters are not those that the model has learned.

    Raises:
        ConfigError: the data set says that it is another one than the run's.
    """
    from distkit.data.sets.fingerprint import fingerprint_of

    environment = run / "environment.json"
    told = json.loads(environment.read_text()).get("data") if environment.exists() else None
    here = fingerprint_of(module.recipe.build_dataset(config, "train"))
    if None not in (told, here) and told != here:
        raise ConfigError(f"{run} was trained on other data", expected=f"data {told}", got=f"data {here}",
                          fix="-- --text FILE, with the text that it was trained on")  # fmt: skip
