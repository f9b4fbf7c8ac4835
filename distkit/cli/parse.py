"""Preset, launcher, `--config FILE` and flags are dictionaries, option -> value; one configuration is built of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import TypeVar, cast, get_type_hints

from distkit.cli.help import show_help
from distkit.cli.options import (
    Option,
    as_typed,
    convert,
    describe,
    negated,
    num_words,
    options_of,
    read,
    words_for,
)
from distkit.config import CHOICES, TrainConfig
from distkit.config.check import flag
from distkit.config.choice import carry_over, from_values
from distkit.config.schedule import PAIRS
from distkit.config.secret import PREFIX, Secret, is_secret, lacks, leaves, variable
from distkit.config.strategy import TAKEN_BY
from distkit.errors import MASK, ConfigError, nearest, say
from distkit.json_files import JsonError, read_object

C = TypeVar("C", bound=TrainConfig)

#: Option, such as `optim.lr` -> its value.
Values = dict[str, object]
#: Options of which at most one is set: setting one clears the other.
ALTERNATIVES = (
    ("num_epochs", "num_steps"),
    ("max_grad_norm", "max_grad_value"),
    *((f"schedule.{steps}", f"schedule.{epochs}") for steps, epochs in PAIRS),
)
SHORT = {
    "--debug": "--debug.enabled",
    "--resume": "--resume.source",
    "--checkpoint.async": "--checkpoint.asynchronous",
    "-h": "--help",
}


def parse(
    config_type: type[C],
    presets: Mapping[str, C],
    argv: Sequence[str],
    prog: str,
    summary: str,
    launched: Mapping[str, tuple[object, str]] | None = None,
    world_size: int = 1,
) -> C:
    """The configuration that a preset, the launcher, `--config FILE` and flags make together; later ones win.

    Secrets also come from the environment, before flags. One that a file leaves out may be lacking afterwards: see
    `check_secrets`.

    Args:
        config_type: the recipe's configuration class.
        presets: by name; the first one is the default.
        argv: the command line, without the program's name.
        prog: the program's name, and `summary` what it does, for the help.
        launched: what the launcher decides, option -> value and the words that set it. File and flags may repeat it
            but not change it. `accum_steps` there is no option; the microbatch size follows from it.
        world_size: the number of ranks.

    Raises:
        ConfigError: an unknown option, preset or file, or a value that does not fit.
        SystemExit: 0, after `--help`.
    """
    options = options_of(config_type, {})
    launched = launched or {}
    args = [spell(arg) for arg in argv]
    topic, args = take_help(args)
    preset, args = take_option("--preset", args)
    file, args = take_option("--config", args)
    preset = next(iter(presets)) if preset is None else preset
    if preset not in presets:
        close = nearest(preset, presets) or next(iter(presets))
        raise ConfigError(
            f"--preset {preset} is unknown", expected=", ".join(presets), got=preset, fix=f"--preset {close}"
        )
    values = flatten(presets[preset])
    check_preset(preset, values, options)
    typed_in_file = read_file(Path(file), options) if file is not None else {}
    typed_in_file = {name: value for name, value in typed_in_file.items() if not lacks(value) or not values.get(name)}
    typed_flags = read_flags(args, options)
    for layer in ({name: value for name, (value, _) in launched.items() if name != "accum_steps"}, typed_in_file,
                  read_secrets(options, os.environ), typed_flags):  # fmt: skip
        merge(values, layer, keep_strategy="strategy" in launched and layer.get("strategy") == "auto")
    if topic is not None:
        show_help(config_type, values, topic, presets=presets, preset=preset, prog=prog, summary=summary)
    check_launched(values, launched)
    if "accum_steps" in launched:
        split_as_launched(values, typed_in_file | typed_flags, *launched["accum_steps"], world_size=world_size)
    ignored = sorted(name for name in typed_flags if name.startswith("checkpoint.") and name != "checkpoint.enabled")
    if ignored and not values["checkpoint.enabled"]:
        raise ConfigError(
            f"{flag(ignored[0])} has no effect when no checkpoints are saved",
            expected="--checkpoint.enabled",
            got="--checkpoint.no-enabled",
            fix="--checkpoint.enabled",
        )
    return build(config_type, values)


# --- words to values


def spell(arg: str) -> str:
    """The long form of a short option; underscores in an option's name are hyphens."""
    if not arg.startswith("-"):
        return arg
    name, equals, value = arg.partition("=")
    name = name.replace("_", "-") if arg.startswith("--") else name
    return SHORT.get(name, name) + equals + value


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


def take_help(args: list[str]) -> tuple[str | None, list[str]]:
    """What help is asked about, "" for the common options, None where it is not; and the other arguments."""
    for position, word in enumerate(args):
        name, _, topic = word.partition("=")
        if name == "--help":
            following = list(takewhile(lambda word: not word.startswith("-"), args[position + 1 : position + 2]))
            return topic or "".join(following), args[:position] + args[position + 1 + len(following) :]
    return None, args


def read_flags(args: Sequence[str], options: Mapping[str, Option]) -> Values:
    """The values that were typed, by option.

    Raises:
        ConfigError: an unknown flag, with the nearest one; a word that belongs to none; a value that does not fit.
    """
    flags = {flag(name): option for name, option in options.items()}
    flags |= {negated(name): option for name, option in options.items() if option.is_switch}
    values: Values = {}
    words = list(args)
    option: Option | None = None
    while words:
        typed, equals, text = words.pop(0).partition("=")
        if not typed.startswith("--"):
            if option is not None and is_secret(option.kind):
                raise ConfigError(f"{flag(option.name)} is followed by more than its value", expected="one word",
                                  fix=f"{flag(option.name)} 'VALUE', in quotes")  # fmt: skip
            raise ConfigError(f"{typed} does not belong to any option", got=typed, fix="--help shows every option")
        if typed not in flags:
            close = nearest(typed, flags)
            shown = "--help all shows every option"
            raise ConfigError(f"{typed} is not an option", got=typed, fix=f"{close}; {shown}" if close else shown)
        option = flags[typed]
        following = list(takewhile(lambda word: not word.startswith("--"), words))
        if option.is_switch:
            check_switch(typed, option.name, text if equals else "".join(following[:1]), given=bool(equals))
            values[option.name] = typed == flag(option.name)
            continue
        count = num_words(option.kind)
        taken = following[: None if count is None else count - bool(equals)]
        if "None" in taken:
            taken = taken[: taken.index("None") + 1]
        del words[: len(taken)]
        values[option.name] = read(option, [text, *taken] if equals else taken)
    return values


def check_switch(typed: str, name: str, value: str, *, given: bool) -> None:
    """Refuse a switch with a value: `--compile False`, `--compile=False`."""
    if given or (value and not value.startswith("-")):
        off = value.lower() in ("false", "0", "no", "off")
        raise ConfigError(
            f"{typed} is a switch",
            expected=f"{flag(name)} or {negated(name)}, without a value",
            got=value,
            fix=negated(name) if off else flag(name),
        )


def read_secrets(options: Mapping[str, Option], env: Mapping[str, str]) -> Values:
    """The secrets that the environment holds, by option; an empty variable holds none."""
    known = {variable(name): name for name, option in options.items() if is_secret(option.kind)}
    for name in sorted(env.keys() - known.keys()):
        if name.startswith(PREFIX):
            meant = nearest(name, known)
            say(f"distkit: {name} in the environment is no secret of this recipe" + (f": {meant}?" if meant else ""))
    secrets = {name: options[name] for value, name in known.items() if env.get(value)}
    return {
        name: read(option, [env[variable(name)]] if num_words(option.kind) == 1 else env[variable(name)].split())
        for name, option in secrets.items()
    }


def read_file(file: Path, options: Mapping[str, Option]) -> Values:
    """The values in a run's config.json, by option; where the run was and what it resumed from are left out."""
    try:
        saved = read_object(file)
    except (OSError, JsonError) as error:
        raise ConfigError(
            f"--config {file} cannot be read",
            expected="the config.json of a run",
            got=error,
            fix="--config runs/RECIPE/RUN/config.json",
        ) from error
    values: Values = {}

    def walk(section: Mapping[str, object], prefix: str) -> None:
        for key, value in section.items():
            name = prefix + key
            if name in ("run_dir", "resume"):
                continue
            if isinstance(value, dict):
                walk(value, f"{name}.")
            elif name not in options:
                close = nearest(name, options)
                raise ConfigError(f"{name} in {file} is not an option", got=name, fix=close and f"{close} instead")
            else:
                values[name] = read(options[name], words_for(value))

    walk(saved, "")
    return values


# --- one dictionary over another


def flatten(config: object, prefix: str = "") -> Values:
    """The fields of nested dataclasses by option name, with the names of the optimizer and schedule classes."""
    values: Values = {}
    for f in fields(config):  # type: ignore[arg-type]
        name, value = prefix + f.name, getattr(config, f.name)
        if name in CHOICES:
            values[f"{name}.name"] = value.name
        values |= flatten(value, f"{name}.") if is_dataclass(value) else {name: value}
    return values


def check_preset(preset: str, values: Values, options: Mapping[str, Option]) -> None:
    """Refuse a preset's value that does not have the type of its field."""
    for name, value in values.items():
        try:
            kind = options[name].kind if name in options else None
            if is_secret(kind):
                ok = all(leaf is None or isinstance(leaf, Secret) for leaf in leaves(value))
            else:
                ok = kind is None or convert(words_for(value), kind) == value
        except ValueError:
            ok = False
        except TypeError:
            continue  # of a type that cannot be typed
        if not ok:
            raise ConfigError(
                f"the recipe's preset {preset} has an invalid value for {name}",
                expected=describe(options[name].kind),
                got=MASK if is_secret(options[name].kind) else repr(value),
                fix=f"a different value in the recipe's presets, or a preset other than {preset}",
            )


def merge(values: Values, layer: Values, *, keep_strategy: bool = False) -> None:
    """Put `layer` over `values`, and clear what it makes meaningless there.

    Args:
        values: changed in place.
        layer: what one source says.
        keep_strategy: `layer` leaves the strategy to the one that `values` have.
    """
    layer = {name: value for name, value in layer.items() if not (keep_strategy and name == "strategy")}
    if any(name.startswith("debug.") for name in layer):
        layer.setdefault("debug.enabled", True)
    for pair in ALTERNATIVES:
        for name, other in (pair, pair[::-1]):
            if layer.get(name) is not None and other not in layer and other in values:
                values[other] = None
    for section, table in CHOICES.items():
        old, new = str(values[f"{section}.name"]), str(layer.get(f"{section}.name", values[f"{section}.name"]))
        if old != new:
            shared = carry_over(table[old], section_of(values, section), table[new])
            clear(values, section)
            values |= {f"{section}.{field}": value for field, value in shared.items()}
    for section, takers in TAKEN_BY.items():
        if layer.get("strategy", next(iter(takers))) not in takers:
            clear(values, section)
    for name, value in layer.items():
        if value is None and name.partition(".")[0] in CHOICES:
            values.pop(name, None)  # the chosen class's default
        else:
            values[name] = value


def section_of(values: Mapping[str, object], section: str) -> Values:
    """`optim` -> the values of its fields, and "name"."""
    return {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}


def clear(values: Values, section: str) -> None:
    """Forget the section's values: its defaults hold."""
    for name in [name for name in values if name.startswith(f"{section}.")]:
        del values[name]


def check_launched(values: Values, launched: Mapping[str, tuple[object, str]]) -> None:
    """Raise ConfigError where file or flags changed what the launcher decides."""
    for name, (value, said) in launched.items():
        if name != "accum_steps" and values.get(name) != value:
            raise ConfigError(
                f"{flag(name)} contradicts what accelerate launch says",
                expected=f"{as_typed(name, value)} ({said})",
                got=as_typed(name, values.get(name)),
                fix="change one of the two: the flag, or accelerate launch's option or config file",
            )


def split_as_launched(values: Values, typed: Values, accum_steps: object, said: str, *, world_size: int) -> None:
    """Set the microbatch size that the launcher's gradient accumulation gives.

    Raises:
        ConfigError: there is none, or another one was typed.
    """
    # Accelerate writes 1 unasked: a preset's microbatch stays, and a typed one must agree
    if accum_steps == 1 and typed.get("microbatch_size") is None:
        return
    total = cast(int, values["global_batch_size"])
    microbatch, rest = divmod(total, world_size * cast(int, accum_steps))
    if rest or typed.get("microbatch_size") not in (None, microbatch):
        raise ConfigError(
            f"{said} does not fit the batch sizes over {world_size} ranks",
            expected="global batch = microbatch x ranks x accumulation steps",
            got=f"--global-batch-size {total} --microbatch-size {values.get('microbatch_size')}",
            fix="leave gradient_accumulation_steps out: distkit derives it from the two sizes",
        )
    values["microbatch_size"] = microbatch


def build(config_type: type[C], values: Mapping[str, object], prefix: str = "") -> C:
    """The configuration with `values`; what they lack keeps its default."""
    hints = get_type_hints(config_type)
    given: Values = {}
    for f in fields(config_type):
        name, kind = prefix + f.name, hints[f.name]
        if name in CHOICES:
            given[f.name] = from_values(CHOICES[name], section_of(values, name))
        elif is_dataclass(kind):
            given[f.name] = build(cast(type[C], kind), values, f"{name}.")
        elif name in values and f.init:
            given[f.name] = values[name]
    return cast(Callable[..., C], config_type)(**given)
