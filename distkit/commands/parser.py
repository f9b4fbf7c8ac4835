"""What the commands share: a parser with this package's errors, and what an answer is."""

from __future__ import annotations

import argparse
from typing import NamedTuple, NoReturn

from distkit.errors import ConfigError


class Answer(NamedTuple):
    """Text for stdout, and the exit code of a command that did its work and found what it looked for, or did not."""

    text: str
    exit_code: int


class Parser(argparse.ArgumentParser):
    """argparse with this package's errors."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{self.prog}: {message}", expected=" ".join(self.format_usage().split()[1:]),
                          fix=f"{self.prog} --help")  # fmt: skip


def positive(text: str) -> int:
    """A count of 1 or more, as argparse's `type`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
