"""What the commands share: a parser with this package's errors, the form of a result, and how text is printed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, NoReturn

from distkit.errors import ConfigError, printable


class Answer(NamedTuple):
    """Text for stdout, and the exit code: not 0 where the command ran and what it looked at is damaged or differs.

    `as_it_is`: the text is not made printable, because it is already, or is a `product`.
    """

    text: str
    exit_code: int
    as_it_is: bool = False


def product(text: str) -> Answer:
    """Text for a file or another program, such as a script: as it is, but on a terminal printable."""
    return Answer(text, 0, as_it_is=not sys.stdout.isatty())


class Parser(argparse.ArgumentParser):
    """argparse with this package's errors."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        takes_flags = "recipe" in {action.dest for action in self._actions}
        if message.startswith("unrecognized arguments: ") and takes_flags:
            words = message.partition(": ")[2]
            raise ConfigError(f"{self.prog}: {message}", expected="flags of the recipe last, after --",
                              fix=f"{self.prog} … -- {words}")  # fmt: skip
        raise ConfigError(f"{self.prog}: {message}", expected=" ".join(self.format_usage().split()[1:]),
                          fix=f"{self.prog} --help")  # fmt: skip

    def _print_message(self, message: str, _file: object = None) -> None:
        """Where argparse prints its help: it ignores a closed pipe, but Python complains when it flushes at the end."""
        write_out(message)


def write_out(text: str, *, as_it_is: bool = False) -> None:
    """Write `text` to stdout, made printable; a reader that stops early (`| head`) is not an error, now or at exit."""
    if not as_it_is:
        encoding = sys.stdout.encoding or "utf-8"
        text = printable(text, keep="\n\t").encode(encoding, "backslashreplace").decode(encoding)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def split_flags(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """What comes before `--`, for the command, and what comes after it, for the recipe."""
    if "--" not in args:
        return list(args), []
    index = args.index("--")
    return list(args[:index]), list(args[index + 1 :])


def count(text: str) -> int:
    """A count of 0 or more, as argparse's `type`."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def run_dir_of(flags: Sequence[str]) -> str | None:
    """The last --run-dir among a recipe's `flags`."""
    given = None
    for flag, value in pairwise([*flags, ""]):
        if flag == "--run-dir" or flag.startswith("--run-dir="):
            given = value if flag == "--run-dir" else flag.partition("=")[2]
    return given


def positive(text: str) -> int:
    """A count of 1 or more, as argparse's `type`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
