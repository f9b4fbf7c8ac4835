"""`--help`: the options of the recipe and the common ones on one screen; `--help all` or one group in full."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from typing import NoReturn

from distkit.cli.options import Option, as_typed, describe, options_of
from distkit.config import CHOICES, TrainConfig
from distkit.config.check import flag
from distkit.config.secret import is_secret
from distkit.errors import MASK, ConfigError, nearest

ALL = "all"
#: Lines of `--help` without a topic.
NUM_LINES = 60
#: Column at which descriptions begin.
COLUMN = 34
#: What `--help` without a topic shows besides the recipe's own options.
COMMON = (
    "num_epochs",
    "num_steps",
    "global_batch_size",
    "microbatch_size",
    "precision",
    "strategy",
    "device",
    "compile",
    "seed",
    "run_dir",
    "report_every",
    "eval_every",
    "optim.name",
    "optim.lr",
    "optim.weight_decay",
    "schedule.name",
    "schedule.warmup_steps",
    "schedule.warmup_epochs",
    "data.source",
    "data.root",
    "checkpoint.save_every",
    "resume.source",
    "observe.tensorboard",
    "observe.wandb",
    "debug.enabled",
)


def show_help(
    config_type: type[TrainConfig],
    values: Mapping[str, object],
    topic: str,
    *,
    presets: Iterable[str],
    preset: str,
    prog: str,
    summary: str,
) -> NoReturn:
    """Print the help and leave with exit code 0; `values` are shown as the defaults.

    Args:
        topic: "" for the options of the recipe and the common ones, "all", or a group.

    Raises:
        ConfigError: there is no such group.
    """
    groups = group_options(config_type, values)
    topics = [ALL, *groups]
    if topic and topic not in topics:
        close = nearest(topic, topics) or ALL
        raise ConfigError(f"--help has no topic {topic}", expected=", ".join(topics), got=topic, fix=f"--help {close}")
    width = max(80, min(120, shutil.get_terminal_size((120, 24)).columns))
    if topic:
        shown = groups.items() if topic == ALL else [(topic, groups[topic])]
        lines = [line for group, options in shown for line in full_group(group, options, values, width)]
    else:
        heading = [
            f"usage: {prog} [--preset NAME] [--config FILE] [--OPTION VALUE ...]",
            "",
            f"--preset {{{','.join(presets)}}}  preset to start from (now: {preset})",
            "--config FILE  load a run's config.json; other flags override both",
            *textwrap.wrap(f"--help GROUP  everything about one of {', '.join(topics)}", width),
            "Options are shown with their current values. (off), (on): a switch; --no-NAME turns it off.",
        ]
        lines = one_screen(heading, summary.strip().splitlines(), groups, values, width)
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # what reads it has seen enough (head); without this Python would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def group_options(config_type: type[TrainConfig], values: Mapping[str, object]) -> dict[str, list[Option]]:
    """The options by group: those that the recipe adds, those of every run, and one group per section."""
    chosen = {section: values[f"{section}.name"] for section in CHOICES}
    common = options_of(TrainConfig, chosen)
    groups: dict[str, list[Option]] = {"recipe": [], "run": []}
    for name, option in options_of(config_type, chosen).items():
        section, dot, _ = name.partition(".")
        group = "recipe" if name not in common else section if dot else "run"
        groups.setdefault(group, []).append(option)
    return {group: options for group, options in groups.items() if options}


def one_screen(
    heading: list[str],
    summary: list[str],
    groups: Mapping[str, list[Option]],
    values: Mapping[str, object],
    width: int,
) -> list[str]:
    """At most NUM_LINES lines, each option on one; a long summary and a recipe's many options are cut."""
    common: list[str] = []
    for group, options in groups.items():
        if group != "recipe" and (few := [option for option in options if option.name in COMMON]):
            more = f", {len(options) - len(few)} more" if len(few) < len(options) else ""
            common += [f"{group} options (--help {group}{more})"]
            common += [shorten(line_of(option, values), width) for option in few]
    own = groups.get("recipe", [])
    # the heading, the common options, two blank lines and the recipe's title; one line at least is the summary's
    room = NUM_LINES - len(heading) - len(common) - 4
    hidden = max(0, len(own) - room)
    recipe = [f"recipe options (--help recipe{f', {hidden} more' if hidden else ''})"] if own else []
    recipe += [shorten(line_of(option, values), width) for option in own[: len(own) - hidden]]
    room = max(1, NUM_LINES - len(heading) - len(common) - len(recipe) - 2)
    return [*heading[:2], *(line[:width] for line in summary[:room]), "", *heading[2:], "", *recipe, *common]


def full_group(group: str, options: list[Option], values: Mapping[str, object], width: int) -> list[str]:
    """Every option of a group with its whole description."""
    name = values.get(f"{group}.name")
    lines = [f"{group} options" + (f" of {name}" if name is not None else "")]
    for option in options:
        lines += textwrap.wrap(line_of(option, values), width, subsequent_indent=" " * COLUMN, break_on_hyphens=False)
    return [*lines, ""]


def line_of(option: Option, values: Mapping[str, object]) -> str:
    """`  --optim.lr 0.2   Peak learning rate.`: the option with the value it has now, and what it does."""
    value = values.get(option.name, option.default)
    if is_secret(option.kind) and value not in (None, MISSING, ()):
        value = MASK
    if option.is_switch:
        typed = f"{flag(option.name)} ({'on' if value else 'off'})"
    else:
        typed = as_typed(option.name, "VALUE" if value is MISSING else value)
    choices = f" [{describe(option.kind)}]" if "Literal" in str(option.kind) else ""
    return f"  {typed:<{COLUMN - 3}} {option.help}{choices}"


def shorten(line: str, width: int) -> str:
    """The line, cut after a word where it is longer than `width`."""
    return line if len(line) <= width else line[: width - 2].rsplit(" ", 1)[0] + " …"
