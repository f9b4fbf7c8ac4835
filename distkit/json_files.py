"""JSON that is read back: with bounds, and checked for the types that it must have. It may be anybody's by now.

Whatever is wrong with it is a JsonError of one line. A kind (`count`, `record`, …) is a function that takes a value and
raises JsonError unless the value is of that kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, cast

from distkit.files import read_regular

#: Larger files are refused unread, unless a caller says otherwise.
MAX_BYTES = 2**24
#: Objects and lists in each other.
MAX_DEPTH = 64
#: Characters of a name in an object, and of a number: every such number is a float, too.
MAX_NAME, MAX_DIGITS = 4096, 300
CONTAINERS = (dict, list)

Kind = Callable[[object], None]


class JsonError(ValueError):
    """What is wrong, in a line that continues a sentence about the file; `where` leads to the value, inside out."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.where: list[str] = []

    def __str__(self) -> str:
        return f"{'.'.join(reversed(self.where))}: {self.args[0]}" if self.where else str(self.args[0])

    def of(self, name: str) -> str:
        """The sentence about the file `name`."""
        return f"{name}: {self}" if self.where else f"{name} {self}"


def parse(data: bytes, *, finite: bool = True) -> object:
    """The value of a JSON text.

    Args:
        data: UTF-8.
        finite: refuse NaN and Infinity, which Python writes and JSON does not have.

    Raises:
        JsonError: it is not JSON, names something twice, or exceeds a bound of this module.
    """
    try:
        value: object = (_STRICT if finite else _LAX).decode(data.decode("utf-8-sig"))
    except JsonError:
        raise
    except UnicodeDecodeError as error:
        raise JsonError(f"is not UTF-8: byte {error.start}") from error
    except ValueError as error:
        raise JsonError(f"is not JSON: {error}") from error
    except RecursionError as error:
        raise _too_deep() from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for item in level if isinstance(item, CONTAINERS) for part in _parts(item)]
    if any(isinstance(item, CONTAINERS) for item in level):
        raise _too_deep()
    return value


def parse_object(data: bytes, *, finite: bool = True) -> dict[str, object]:
    """The object of a JSON text; arguments and errors as `parse`."""
    value = parse(data, finite=finite)
    if not isinstance(value, dict):
        raise JsonError(f"is not a JSON object, but a {type(value).__name__}")
    return value


def read_object(path: Path, most: int = MAX_BYTES) -> dict[str, object]:
    """The JSON object in the file `path`.

    Raises:
        JsonError: as `parse`; or it is another value.
        OSError: it cannot be read, is not a regular file, or has more than `most` bytes.
    """
    return parse_object(read_regular(path, most))


def parse_lines(data: bytes) -> Iterator[dict[str, object]]:
    """The objects in a text with a JSON value a line; other lines are left out."""
    for line in data.splitlines():
        with suppress(JsonError):
            yield parse_object(line)


def _parts(value: object) -> Iterator[object]:
    return iter(value.values() if isinstance(value, dict) else cast(list[object], value))


def _too_deep() -> JsonError:
    return JsonError(f"is nested more than {MAX_DEPTH} deep")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise JsonError(f"names {name!a:.80} twice")
            seen.add(name)
    if value and max(map(len, value)) > MAX_NAME:
        raise JsonError(f"has a name of more than {MAX_NAME} characters")
    return value


def _integer(text: str) -> int:
    _check_digits(text)
    return int(text)


def _float(text: str) -> float:
    _check_digits(text)
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"has a number that is too large: {text:.40}")
    return value


def _check_digits(text: str) -> None:
    if len(text) > MAX_DIGITS:
        raise JsonError(f"has a number of {len(text):,} digits")


def _constant(text: str) -> NoReturn:
    raise JsonError(f"is not JSON: {text}")


_LAX = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float)
_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)


# --- kinds


def refuse(value: object, expected: str) -> NoReturn:
    """Raise the JsonError that shows `value`."""
    raise JsonError(f"{json.dumps(value)[:80]} is not {expected}")


def anything(_value: object) -> None:
    """Any value."""


def a_text(value: object) -> None:
    """A string."""
    if not isinstance(value, str):
        refuse(value, "text")


def a_flag(value: object) -> None:
    """True or false."""
    if not isinstance(value, bool):
        refuse(value, "true or false")


def is_count(value: object) -> bool:
    """True for a whole number of 0 or more that 63 bits hold."""
    return type(value) is int and 0 <= value < 2**63


def a_count(value: object) -> None:
    """A whole number of 0 or more that 63 bits hold."""
    if not is_count(value):
        refuse(value, "a count")


def is_number(value: object) -> bool:
    """True for a finite number."""
    return type(value) in (int, float) and math.isfinite(cast(float, value))


def a_number(value: object) -> None:
    """A finite number."""
    if not is_number(value):
        refuse(value, "a number")


def an_amount(value: object) -> None:
    """A finite number of 0 or more."""
    if not is_number(value) or cast(float, value) < 0:
        refuse(value, "a number of 0 or more")


def an_object(value: object) -> None:
    """An object."""
    if not isinstance(value, dict):
        refuse(value, "an object")


def optional(kind: Kind) -> Kind:
    """Null, or a value of `kind`."""
    return lambda value: None if value is None else kind(value)


def list_of(kind: Kind) -> Kind:
    """A list of values of `kind`."""

    def check(value: object) -> None:
        if not isinstance(value, list):
            refuse(value, "a list")
        for position, item in enumerate(value):
            _check_part(kind, item, str(position))

    return check


def mapping_of(kind: Kind) -> Kind:
    """An object whose values are of `kind`."""

    def check(value: object) -> None:
        an_object(value)
        for name, item in cast(dict[str, object], value).items():
            _check_part(kind, item, name)

    return check


def record(fields: Mapping[str, Kind], may_have: Mapping[str, Kind] | None = None) -> Kind:
    """An object that has all of `fields` and perhaps those of `may_have`; others are left to later versions."""

    def check(value: object) -> None:
        an_object(value)
        found = cast(dict[str, object], value)
        for name, kind in fields.items():
            if name not in found:
                raise JsonError(f"has no {name}")
            _check_part(kind, found[name], name)
        for name, kind in (may_have or {}).items():
            if name in found:
                _check_part(kind, found[name], name)

    return check


def _check_part(kind: Kind, value: object, name: str) -> None:
    try:
        kind(value)
    except JsonError as error:
        error.where.append(name)
        raise


def known(values: Mapping[str, object], kinds: Mapping[str, Kind]) -> dict[str, object]:
    """Of `values` those that `kinds` names and that are of these kinds: a reader that goes on with what is left."""
    kept = {}
    for name, kind in kinds.items():
        if name in values:
            with suppress(JsonError):
                kind(values[name])
                kept[name] = values[name]
    return kept
