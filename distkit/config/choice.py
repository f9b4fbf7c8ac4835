"""A section of the configuration that is one of several classes, chosen by name: the optimizer, the schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import ClassVar, TypeVar

from distkit.config.check import flag, require, require_number
from distkit.errors import ConfigError, nearest

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Base of `OptimConfig` and `ScheduleConfig`; each class derived from these is one row of their table."""

    section: ClassVar[str]
    """Name of the section in TrainConfig, and so of its flags: `--SECTION.FIELD`."""
    name: ClassVar[str] = ""
    """What `--SECTION.name` and config.json call this class."""

    def __post_init__(self) -> None:
        if not self.name:
            raise TypeError(f"{type(self).__name__} is a base class: use one of its subclasses")
        for f in fields(self):
            if "example" in f.metadata:
                require_number(f"{self.section}.{f.name}", getattr(self, f.name), **f.metadata)


K = TypeVar("K", bound=Choice)


def number(
    default: T,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    example: str = "",
) -> T:
    """A dataclass field whose value must be in the range (None is let through); MISSING makes it required.

    `example` is a value that works, for the message; by default the default.
    """
    bounds = {"above": above, "least": least, "most": most, "below": below}
    metadata = {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
    return field(default=default, metadata={**metadata, "example": example or f"{default}"})


def from_values(table: Mapping[str, type[K]], values: Mapping[str, object]) -> K:
    """The object that `values` describe: its "name" in `table`, and its fields. Lists become tuples.

    None means the field's default, even for fields that the named class does not take: a config.json may hold
    every field of every class.

    Raises:
        ConfigError: the name is unknown, a field is missing or is not one of this class, or a value is out of range.
    """
    section, name = next(iter(table.values())).section, str(values.get("name"))
    example = nearest(name, table) or next(iter(table))
    require(name in table, f"{section}.name", "one of " + ", ".join(table), name, example)
    given = {key: value for key, value in values.items() if value is not None and key != "name"}
    refuse_foreign(table, name, given)
    for f in fields(table[name]):
        missing = f.default is MISSING and f.name not in given
        require(
            not missing,
            f"{section}.{f.name}",
            f"a value: {name} has no default",
            "nothing",
            f.metadata.get("example", ""),
        )
    return table[name](**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def refuse_foreign(table: Mapping[str, type[Choice]], name: str, given: Mapping[str, object]) -> None:
    """Raise ConfigError when `given` holds fields that the class called `name` does not take."""
    section = table[name].section
    taken = {other: {f.name for f in fields(kind)} for other, kind in table.items()}
    foreign = [key for key in given if key not in taken[name]]
    if not foreign:
        return
    takers = [other for other in table if taken[other] >= {*foreign}]
    flags = ", ".join(flag(f"{section}.{key}") for key in foreign)
    raise ConfigError(
        f"--{section}.name {name} does not take {flags}",
        expected=", ".join(flag(f"{section}.{key}") for key in sorted(taken[name])) or "no options",
        got=", ".join(f"{flag(f'{section}.{key}')} {given[key]}" for key in foreign),
        fix=(f"--{section}.name {' or '.join(takers)}, or " if takers else "") + f"leave out {flags}",
    )


def describe(config: Choice) -> dict[str, object]:
    """What `from_values` takes: the name and every field."""
    return {"name": config.name, **asdict(config)}


def carry_over(old: type[Choice], values: Mapping[str, object], new: type[Choice]) -> dict[str, object]:
    """Of `values` for the fields of `old`, those that differ from its defaults and that `new` takes."""
    defaults = {f.name: f.default for f in fields(old)}
    taken = {f.name for f in fields(new)}
    return {key: value for key, value in values.items() if key in taken and value != defaults.get(key, MISSING)}
