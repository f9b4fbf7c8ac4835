"""Passwords and tokens in a configuration: a run uses them, and writes them nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

from distkit.config.check import flag
from distkit.errors import LEAST_LENGTH, MASK, ConfigError, hide

#: In the environment, `DISTKIT_SECRET_HUB_TOKEN` is the value of `--hub-token`.
PREFIX = "DISTKIT_SECRET_"


class Secret:
    """Text that is shown and written as `<secret>`; only `reveal()` gives it.

    A field `hub_token: Secret | None = None` is set by the environment (DISTKIT_SECRET_HUB_TOKEN) or on the command
    line, which other users of the machine can see. config.json says `<secret>`: taking it back needs the value again.

    Raises:
        ConfigError: `value` is no text, or too short to be told from other text where it is masked.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        if not isinstance(value, str):
            raise ConfigError("a Secret holds text", expected="a str", got=type(value).__name__)
        if len(value) < LEAST_LENGTH:
            raise ConfigError("a Secret is too short to be masked", expected=f"at least {LEAST_LENGTH} characters",
                              got=f"{len(value)}")  # fmt: skip
        self._value = value
        if self.is_known:
            hide(value)

    @property
    def is_known(self) -> bool:
        """False for one that was read from where only `<secret>` is written."""
        return self._value != MASK

    def reveal(self) -> str:
        """The text itself.

        Raises:
            ConfigError: it was left out of the file that the configuration was read from.
        """
        if not self.is_known:
            raise ConfigError("a secret of this configuration is not known here: no file holds it",
                              expected="its value in the environment", fix=f"export {PREFIX}NAME=VALUE")  # fmt: skip
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return MASK


def is_secret(kind: object) -> bool:
    """Whether a field of this type holds a secret: `Secret`, `Secret | None`, `tuple[Secret, ...]`."""
    return kind is Secret or any(map(is_secret, get_args(kind)))


def variable(name: str) -> str:
    """`data.token` -> the environment variable that gives it."""
    return PREFIX + name.upper().replace(".", "_")


def leaves(value: object) -> Iterable[object]:
    """The members of a tuple or a list, or the value alone."""
    return value if isinstance(value, tuple | list) else (value,)


def lacks(value: object) -> bool:
    """Whether a secret of `value` was left out of the file that it was read from."""
    return any(isinstance(leaf, Secret) and not leaf.is_known for leaf in leaves(value))


def secrets_of(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Option and value of every field of a configuration, sections too, that is a secret by its type."""
    kinds = _kinds(type(config))
    for f in fields(config):  # type: ignore[arg-type]  # a dataclass
        name, value = prefix + f.name, getattr(config, f.name)
        if is_dataclass(value):
            yield from secrets_of(value, f"{name}.")
        elif is_secret(kinds[f.name]):
            yield name, value


def _kinds(config_type: type) -> Mapping[str, object]:
    try:
        return get_type_hints(config_type)
    except NameError:  # a class inside of a function, whose annotations name what is defined there
        words = {f.name: str(f.type) for f in fields(config_type)}
        return {name: Secret if "Secret" in word else object for name, word in words.items()}


def check_secrets(config: object) -> None:
    """Refuse a secret that is plain text, which would be written, and one whose value is not known.

    Raises:
        ConfigError: naming the field, and how to set it.
    """
    for name, value in secrets_of(config):
        if not all(leaf is None or isinstance(leaf, Secret) for leaf in leaves(value)):
            raise ConfigError(f"the secret {name} is a plain {type(value).__name__}, which would be written",
                              expected="a distkit.Secret", fix=f"{name.rpartition('.')[2]}=Secret(…)")  # fmt: skip
        if lacks(value):
            raise ConfigError(f"{flag(name)} is a secret, which config.json does not hold",
                              expected="its value again, in the environment or on the command line",
                              fix=f"export {variable(name)}=VALUE, or {flag(name)} VALUE")  # fmt: skip
