"""`distkit generate`: text from a run of a language model. No GPU and no process group; any world size and strategy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distkit.commands.parser import Answer, Parser, product, split_flags
from distkit.commands.show import read_json
from distkit.config import TrainConfig
from distkit.errors import ConfigError
from distkit.json_files import a_text, known, optional
from distkit.recipe import Recipe


def command(args: Sequence[str]) -> Answer:
    """The prompt, and what the model gives after it."""
    own_args, flags = split_flags(args)
    typed = _parser().parse_args(own_args)
    _check(typed)

    from distkit.checkpoint.format import step_of
    from distkit.commands.tools.locate import is_checkpoint, run_of
    from distkit.load import load_config, load_model, load_recipe, module_of

    checkpoint = is_checkpoint(typed.run)
    run = run_of(typed.run) if checkpoint else typed.run
    if not (run / "config.json").exists():
        raise ConfigError(f"{typed.run} is not a run", expected="a directory with config.json, or a checkpoint in one",
                          fix="distkit generate runs/gpt/RUN")  # fmt: skip
    recipe = load_recipe(run, typed.recipe)
    module = module_of(recipe)
    if not hasattr(module, "sample"):
        raise ConfigError(f"the recipe {recipe.name} cannot generate text", expected="a run of a language model",
                          got=f"{module.__file__} without sample", fix="distkit generate runs/gpt/RUN")  # fmt: skip
    config = load_config(run, recipe, flags)
    check_data(run, recipe, config)
    which = step_of(typed.run.resolve().name) if checkpoint else None
    model = load_model(recipe, config, run, "last" if which is None else which, ema=typed.weights == "ema")
    sample: str = module.sample(config, model, typed.prompt, num_new=typed.max_tokens, temperature=typed.temperature,
                                top_k=typed.top_k, seed=typed.seed)  # fmt: skip
    return product(sample)


def _parser() -> Parser:
    parser = Parser(
        "distkit generate",
        description="Text from a run, the same each time for the same seed. RUN is its directory: the weights of its "
        "last step or, where it has not ended, those of its newest checkpoint that verifies; or one checkpoint. "
        "Options of the recipe come last, after --, such as -- --text FILE if the text has moved.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run directory, or a checkpoint in it")
    parser.add_argument("--prompt", metavar="TEXT", default="\n", help="text to continue from (a line break)")
    parser.add_argument("--max-tokens", type=int, default=500, metavar="N", help="tokens to add (500)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T",
                        help="0 takes the most likely token, 1 samples the model's distribution (0.8)")  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens (all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sampling (0)")
    parser.add_argument("--weights", choices=["last", "ema"], default="last",
                        help="last: as trained; ema: their average, where the run keeps one (last)")  # fmt: skip
    parser.add_argument("--recipe", metavar="FILE", help="the recipe's file (where it was when the run was started); "
                        "copy: the one that RUN keeps, code that you must trust")  # fmt: skip
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
            raise ConfigError(f"--{name} has an invalid value", expected=expected, got=got,
                              fix=f"--{name} {example}")  # fmt: skip


def check_data(run: Path, recipe: Recipe[Any], config: TrainConfig) -> None:
    """Refuse a text that has been replaced: its characters are not those that the model has learned.

    Raises:
        ConfigError: the data set says that it is another one than the run's.
    """
    from distkit.data.sets.fingerprint import fingerprint_of

    told = known(read_json(run / "environment.json") or {}, {"data": optional(a_text)}).get("data")
    here = fingerprint_of(recipe.build_dataset(config, "train"))
    if None not in (told, here) and told != here:
        raise ConfigError(f"{run} was trained on different data", expected=f"data {told}", got=f"data {here}",
                          fix="-- --text FILE, with the text that it was trained on")  # fmt: skip
