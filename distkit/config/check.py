"""The two checks that nearly every configuration field needs, with messages that say what to type."""

from __future__ import annotations

import math
from collections.abc import Iterable

from distkit.errors import ConfigError


def flag(name: str) -> str:
    """`optim.weight_decay` -> `--optim.weight-decay`, the way it is typed."""
    return "--" + name.replace("_", "-")


def require(ok: bool, name: str, expected: str, got: object, example: str) -> None:
    """Raise ConfigError unless `ok`; `example` is a value that works."""
    if not ok:
        raise ConfigError(
            f"{flag(name)} has an invalid value",
            expected=expected,
            got=got,
            fix=f"{flag(name)} {example}".rstrip(),
        )


def require_number(
    name: str,
    value: float | None,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    example: str,
) -> None:
    """Raise ConfigError unless `value` is None or a finite number in the range; bounds are in the field's unit."""
    if value is None:
        return
    words = [
        f"{sign} {bound:g}"
        for sign, bound in ((">", above), (">=", least), ("<=", most), ("<", below))
        if math.isfinite(bound)
    ]
    ok = isinstance(value, int | float) and math.isfinite(value) and above < value < below and least <= value <= most
    require(ok, name, "a finite number " + " and ".join(words), value, example)


def require_unused(owner: str, values: dict[str, object], taken: Iterable[str]) -> None:
    """Raise ConfigError when a field that `owner` (`--optim.name adam`, for example) does not take was set.

    `values` maps full option names to their values; None means not set.
    """
    taken = set(taken)
    extra = [name for name, value in values.items() if value is not None and name not in taken]
    if extra:
        takes = ", ".join(flag(name) for name in sorted(taken)) or "none of these options"
        raise ConfigError(
            f"{owner} does not take {', '.join(flag(name) for name in extra)}",
            expected=takes,
            got=", ".join(f"{flag(name)} {values[name]}" for name in extra),
            fix=" ".join(f"{flag(name)} None" for name in extra),
        )
