"""A recipe's command line: preset, config file and flags to one configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from distkit.config import CHOICES, TrainConfig
from distkit.config import schedule as schedule_config
from distkit.config import strategy as strategy_config
from distkit.config.check import flag
from distkit.config.choice import Choice, carry_over, refuse_foreign
from distkit.errors import ConfigError, nearest

C = TypeVar("C", bound=TrainConfig)

#: Fields of which one is set: typing one clears the other.
ALTERNATIVES = (
    ("num_epochs", "num_steps"),
    ("max_grad_norm", "max_grad_value"),
    *((f"schedule.{steps}", f"schedule.{epochs}") for steps, epochs in schedule_config.PAIRS),
)


SHORT = {
    "--debug": "--debug.enabled",
    "--resume": "--resume.source",
    "--checkpoint.async": "--checkpoint.asynchronous",
}


@dataclass(frozen=True)
class Parsed(Generic[C]):
    """A parsed command line: the configuration, its preset's name, and the names of the fields that were typed."""

    config: C
    preset: str
    typed: frozenset[str]


def parse(
    config_type: type[C],
    presets: Mapping[str, C],
    argv: Sequence[str],
    prog: str,
    summary: str,
    strategy: str | None = None,
) -> Parsed[C]:
    """Turn `argv` into a configuration: preset, then `--config FILE`, then flags; later ones win.

    The first preset is the default one. `strategy` is the launcher's, which stands over the preset's: what is typed are
    options of that one.

    Raises:
        ConfigError: an unknown flag, preset or file, or a value that does not fit.
        SystemExit: 0, after `--help`.
    """
    names = field_names(config_type)
    args = [spell(arg) for arg in argv]
    preset, args = take_option("--preset", args)
    file, args = take_option("--config", args)
    preset = next(iter(presets)) if preset is None else preset
    if preset not in presets:
        close = nearest(preset, presets) or next(iter(presets))
        raise ConfigError(f"--preset {preset} is unknown", expected=", ".join(presets), got=preset,
                          fix=f"--preset {close}")  # fmt: skip
    config, typed = presets[preset], set[str]()
    help_text = f"{summary}\n\n--preset {{{','.join(presets)}}}  where to start from (now: {preset})\n" + (
        "--config FILE  take back a run's config.json; other flags win over both"
    )
    if strategy is not None:
        config, _ = apply_flags(config_type, config, ["--strategy", strategy], names, prog, help_text)
    names_typed: set[str] = set()
    for source in ([] if file is None else config_flags(Path(file), names)), args:
        if source or source is args:
            config, names_typed = apply_flags(config_type, config, source, names, prog, help_text)
            typed |= names_typed
    ignored = sorted(name for name in names_typed if name.startswith("checkpoint.") and name != "checkpoint.enabled")
    if ignored and not config.checkpoint.enabled:
        raise ConfigError(f"{flag(ignored[0])} means nothing where no checkpoint is saved",
                          expected="--checkpoint.enabled", got="--checkpoint.no-enabled",
                          fix="--checkpoint.enabled")  # fmt: skip
    return Parsed(config, preset, frozenset(typed))


def spell(arg: str) -> str:
    """`--debug`, `--resume DIR` and `--checkpoint.async` are short forms; underscores and hyphens are the same."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    name = SHORT.get(name, name.replace("_", "-"))
    return name + equals + value


def take_option(option: str, args: list[str]) -> tuple[str | None, list[str]]:
    """The last value of `option` in `args`, and the other arguments."""
    value, rest, words = None, [], iter(args)
    for word in words:
        name, equals, text = word.partition("=")
        if name != option:
            rest.append(word)
        elif (value := text if equals else next(words, None)) is None or value.startswith("--"):
            raise ConfigError(f"{option} needs a value", fix=f"{option} VALUE")
    return value, rest


def field_names(config_type: type, prefix: str = "") -> dict[str, type]:
    """Every leaf field of a nested dataclass, as `optim.lr`, with its type."""
    hints = typing.get_type_hints(config_type)
    names: dict[str, type] = {}
    for f in fields(config_type):
        kind = hints[f.name]
        if prefix + f.name in CHOICES:
            table = CHOICES[f.name]
            names[f"{f.name}.name"] = typing.cast(type, Literal[tuple(table)])
            for choice in table.values():
                names = field_names(choice, f"{f.name}.") | names
        elif is_dataclass(kind):
            names |= field_names(typing.cast(type, kind), f"{prefix}{f.name}.")
        else:
            names[prefix + f.name] = kind
    return names


def negated(name: str) -> str:
    """`debug.pdb` -> `--debug.no-pdb`, as tyro spells it."""
    head, dot, last = name.rpartition(".")
    return flag(f"{head}{dot}no_{last}")


def config_flags(file: Path, names: Mapping[str, type]) -> list[str]:
    """A config.json as the flags that would have made it."""
    try:
        saved = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {file} cannot be read", expected="the config.json of a run", got=error,
                          fix="--config runs/RECIPE/RUN/config.json") from error  # fmt: skip
    if not isinstance(saved, dict):
        raise ConfigError(f"--config {file} is not a configuration", expected="a JSON object", got=type(saved).__name__)
    flags: list[str] = []

    def walk(values: Mapping[str, object], prefix: str) -> None:
        for name, value in values.items():
            if prefix + name in ("run_dir", "resume"):
                continue  # the saved run's own
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            elif isinstance(value, bool) and names.get(prefix + name) is bool:
                flags.append(flag(prefix + name) if value else negated(prefix + name))
            else:
                option = spell(f"--{prefix}{name}")
                # one word, so that a value may start with a hyphen
                flags.extend([option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"])

    walk(saved, "")
    return flags


def apply_flags(
    config_type: type[C], base: C, args: Sequence[str], names: Mapping[str, type], prog: str, help_text: str
) -> tuple[C, set[str]]:
    """`base` with `args` applied, and the names of the fields that `args` set."""
    typed = typed_names(args, names)
    check_values(args, names)
    if any(name.startswith("debug.") for name in typed) and "debug.enabled" not in typed:
        args = [*args, "--debug.enabled"]
    for pair in ALTERNATIVES:
        for mine, other in (pair, pair[::-1]):
            if mine in typed and other not in typed:
                args = [*args, flag(other), "None"]
    base, args = choose(drop_foreign_options(base, args, typed), args)
    config = run_tyro(config_type, base, args, prog, help_text)
    return config, typed


def typed_names(args: Sequence[str], names: Mapping[str, type]) -> set[str]:
    """The fields that `args` name; an unknown flag is a ConfigError with the nearest one."""
    options = {flag(name): name for name in names}
    for name, kind in names.items():
        if kind is bool:
            options[negated(name)] = name
    typed = set()
    for arg in args:
        option = arg.partition("=")[0]
        if not option.startswith("--") or option == "--help":
            continue
        if option not in options:
            close = nearest(option, options)
            raise ConfigError(f"{option} is not an option", got=option,
                              fix=f"{close}, or --help for all" if close else "--help for all options")  # fmt: skip
        typed.add(options[option])
    return typed


def check_values(args: Sequence[str], names: Mapping[str, type]) -> None:
    """Check the values of switches, numbers and choices here, where the message can say what to type instead.

    Raises:
        ConfigError: naming the flag, what it takes and the nearest choice.
    """
    switches = {text: name for name, kind in names.items() if kind is bool for text in (flag(name), negated(name))}
    for position, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        following = value if equals else args[position + 1] if position + 1 < len(args) else ""
        if option in switches:
            if equals or (following and not following.startswith("-")):
                no = following.lower() in ("false", "0", "no", "off")
                name = switches[option]
                raise ConfigError(f"{option} is a switch", expected=f"{flag(name)} or {negated(name)}, without a value",
                                  got=following, fix=negated(name) if no else flag(name))  # fmt: skip
            continue
        kinds = {flag(name): kind for name, kind in names.items()}.get(option)
        if kinds is not None and following and (equals or not following.startswith("--")):
            check_value(option, following, set(typing.get_args(kinds)) or {kinds}, kinds)


def check_value(option: str, value: str, kinds: set[object], annotation: object) -> None:
    """One value against int, float or Literal, each perhaps with None; tuples and paths are left to tyro."""
    optional = type(None) in kinds
    if optional and value == "None":
        return
    members = [kind for kind in kinds if kind is not type(None)] if optional else [annotation]
    for number, words in ((int, "a whole number"), (float, "a number")):
        if members == [number]:
            try:
                number(value)
            except ValueError as error:
                raise ConfigError(f"{option} {value} is not {words}", expected=words + (" or None" if optional else ""),
                                  got=value, fix=f"{option} {number(1)}") from error  # fmt: skip
    choices = [str(c) for member in members if typing.get_origin(member) is Literal for c in typing.get_args(member)]
    if choices and value not in choices:
        known = ", ".join([*choices, *(["None"] if optional else [])])
        raise ConfigError(f"{option} has no choice {value}", expected=known, got=value,
                          fix=f"{option} {nearest(value, choices) or choices[0]}")  # fmt: skip


def drop_foreign_options(base: C, args: Sequence[str], typed: set[str]) -> C:
    """Options of the preset's strategy mean nothing to the one typed instead."""

    def value_of(option: str) -> str | None:
        return take_option(option, list(args))[0]

    # object.__setattr__ on a copy, because a half-changed section need not be valid until tyro adds the flags
    copy = dataclasses.replace(base)
    if "strategy" in typed and (name := value_of("--strategy")) in strategy_config.STRATEGIES:
        for section, takers in strategy_config.TAKEN_BY.items():
            if name not in takers:
                object.__setattr__(copy, section, type(getattr(base, section))())
    return copy


def choose(base: C, args: Sequence[str]) -> tuple[C, list[str]]:
    """`base` with the optimizer and schedule that `args` name; `args` without these names and fields set to None."""
    import tyro

    copy, rest = dataclasses.replace(base), list(args)
    for section, table in CHOICES.items():
        config: Choice = getattr(base, section)
        name, rest = take_option(f"--{section}.name", rest)
        name = config.name if name is None else name
        values = carry_over(table, config, name)
        given: dict[str, object] = {}
        position = 0
        while position < len(rest):
            option, equals, value = rest[position].partition("=")
            field = option.removeprefix(f"--{section}.").removeprefix("no-").replace("-", "_")
            width = 1 if equals else 2
            value = value if equals else "".join(rest[position + 1 : position + 2])
            if not option.startswith(f"--{section}."):
                position += 1
            elif value == "None":
                del rest[position : position + width]
                values.pop(field, None)
            else:
                given[field] = value
                position += 1
        refuse_foreign(table, name, given)
        chosen = object.__new__(table[name])
        for f in fields(chosen):
            default = tyro.MISSING if f.default is dataclasses.MISSING else f.default
            object.__setattr__(chosen, f.name, values.get(f.name, default))
        object.__setattr__(copy, section, chosen)
    return copy, rest


def run_tyro(config_type: type[C], base: C, args: Sequence[str], prog: str, help_text: str) -> C:
    """Let tyro parse; its boxed message becomes a ConfigError of a few lines."""
    import tyro

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(config_type, args=list(args), default=base, prog=prog, description=help_text)
    except SystemExit as end:
        if end.code in (0, None):
            raise
    raise ConfigError(plain_message(stderr.getvalue()), fix=f"{prog} --help shows every option")


def plain_message(box: str) -> str:
    """The sentences of tyro's error box, up to its rule, without the frame."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ \n") for line in text.splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    return " ".join(line for line in lines[:rule] if line)[:600]
