"""The options of a configuration class: their names, types and help texts, and how a value is typed."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, cast, get_args, get_origin, get_type_hints

from distkit.config import CHOICES
from distkit.config.check import flag
from distkit.config.every import Epochs
from distkit.config.secret import Secret, is_secret
from distkit.errors import LEAST_LENGTH, MASK, ConfigError, nearest


@dataclass(frozen=True)
class Option:
    """One leaf field of a configuration."""

    name: str
    """Sections and field, such as `optim.lr`."""
    kind: object
    """The annotation."""
    default: object
    """What the class has, MISSING where it has none."""
    help: str
    """The field's docstring."""

    @property
    def is_switch(self) -> bool:
        """Typed without a value: `--compile` or `--no-compile`."""
        return self.kind is bool


def negated(name: str) -> str:
    """`debug.pdb` -> `--debug.no-pdb`."""
    section, dot, field = name.rpartition(".")
    return flag(f"{section}{dot}no_{field}")


def as_typed(name: str, value: object) -> str:
    """`compile`, False -> `--no-compile`."""
    if isinstance(value, bool):
        return flag(name) if value else negated(name)
    return " ".join([flag(name), *words_for(value)])


def options_of(config_type: type, chosen: Mapping[str, object]) -> dict[str, Option]:
    """Every option by name. Of a section that is one of several classes, those of the class named in `chosen`.

    Args:
        config_type: a TrainConfig class.
        chosen: section, such as `optim`, -> the class's name; of a section that it lacks, all classes' options.
    """
    options: dict[str, Option] = {}
    for option in _walk(config_type, "", chosen):
        options.setdefault(option.name, option)
    return options


def _walk(config_type: type, prefix: str, chosen: Mapping[str, object]) -> Iterator[Option]:
    hints, docs = get_type_hints(config_type), field_docs(config_type)
    for f in fields(config_type):
        name, kind = prefix + f.name, hints[f.name]
        if name in CHOICES:
            table = CHOICES[name]
            yield Option(f"{name}.name", Literal[tuple(table)], MISSING, docs.get(f.name, ""))
            for class_name in [str(chosen[name])] if name in chosen else table:
                yield from _walk(table[class_name], f"{name}.", chosen)
        elif is_dataclass(kind):
            yield from _walk(cast(type, kind), f"{name}.", chosen)
        elif f.init:
            yield Option(name, kind, f.default, docs.get(f.name, ""))


@functools.cache
def field_docs(config_type: type) -> Mapping[str, str]:
    """The strings below the fields of a class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        try:
            body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        except (OSError, TypeError, SyntaxError):
            continue  # made by a program, or built in
        for node, after in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(node.target, ast.Name):
                docs[node.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return docs


def num_words(kind: object) -> int | None:
    """How many words a value takes; None: any number."""
    (member, *_) = members_of(kind)
    if get_origin(member) is not tuple:
        return 1
    return None if get_args(member)[-1] is Ellipsis else len(get_args(member))


def members_of(kind: object) -> list[object]:
    """`float | None` -> [float]."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [member for member in members if member is not NoneType]


def words_for(value: object) -> list[str]:
    """What is typed for a value."""
    return [str(item) for item in value] if isinstance(value, tuple | list) else [str(value)]


def read(option: Option, words: Sequence[str]) -> object:
    """The value that `words` stand for.

    Raises:
        ConfigError: they are not a value of this type; the message says what is and, for a choice, names the nearest.
    """
    # in a section of several classes, None is the default of the chosen class
    section, _, field = option.name.partition(".")
    if words == ["None"] and section in CHOICES and field != "name":
        return None
    typed, expected = flag(option.name), describe(option.kind)
    text = MASK if is_secret(option.kind) else " ".join(words)
    try:
        return convert(words, option.kind)
    except TypeError as error:
        raise ConfigError(f"{typed} cannot be set on the command line", got=expected,
                          expected="number, text, path, choice or tuple",
                          fix="set it in a preset of the recipe") from error  # fmt: skip
    except ValueError as error:
        if not words:
            raise ConfigError(f"{typed} needs a value", expected=expected, fix=f"{typed} VALUE") from error
        (member, *_) = members_of(option.kind)
        if get_origin(member) is Literal:
            choices = list(map(str, get_args(member)))
            what, example = f"{typed} has no choice {text}", nearest(text, choices) or choices[0]
        else:
            what, example = (
                f"{typed} {text} is not {expected}",
                {int: "1", float: "1.0"}.get(cast(type, member), "VALUE"),
            )
        raise ConfigError(what, expected=expected, got=text, fix=f"{typed} {example}") from error


def convert(words: Sequence[str], kind: object) -> object:
    """The value of type `kind` that `words` stand for.

    Raises:
        ValueError: there is none.
        TypeError: a value of this type cannot be given on the command line.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if NoneType in args and list(words) == ["None"]:
            return None
        *others, last = members_of(kind)
        for member in others:
            with suppress(ValueError):
                return convert(words, member)
        return convert(words, last)
    if origin is tuple:
        kinds = args[:1] * len(words) if num_words(kind) is None else args
        return tuple(convert([word], member) for word, member in zip(words, kinds, strict=True))
    (word,) = words
    if origin is Literal or kind is bool:
        choices = {str(choice): choice for choice in args or (True, False)}
        if word not in choices:
            raise ValueError(word)
        return choices[word]
    if kind is Path and (b"\0" in os.fsencode(word)):  # encoding it raises ValueError for half a surrogate pair
        raise ValueError(word)
    if kind is int and abs(int(word)) >= 2**63:
        raise ValueError(word)
    if kind is Secret and len(word) < LEAST_LENGTH:
        raise ValueError
    if kind is Epochs:
        return Epochs.parse(word)
    if kind in (int, float, str, Path, Secret):
        return cast(type, kind)(word)
    raise TypeError(kind)


def describe(kind: object) -> str:
    """`float | None` -> "a number or None"."""
    args = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe(member) for member in args)
    if get_origin(kind) is Literal:
        return ", ".join(map(str, args))
    if get_origin(kind) is tuple:
        count = num_words(kind)
        return f"{'any number' if count is None else count} of: {describe(args[0])}"
    names = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "True or False",
             Epochs: "epochs, such as 1e",
             Secret: f"a secret text of {LEAST_LENGTH} characters or more"}  # fmt: skip
    return names.get(cast(type, kind), "None" if kind is NoneType else str(kind))
