"""Every error distkit raises on purpose, and the exit code each one ends the process with.

Exit codes (C7): 0 done, 1 failed, 2 configuration, 75 stopped and resumable.
"""

from __future__ import annotations

import difflib
import sys
import unicodedata
from collections.abc import Iterable
from typing import ClassVar
from urllib.parse import quote

#: Longer words are like no other.
LONGEST_WORD = 200
#: What is printed in the place of a secret.
MASK = "<secret>"
#: Shorter secrets stand in ordinary text too, so texts are not searched for them.
LEAST_LENGTH = 4
_secrets: set[str] = set()


class DistkitError(Exception):
    """Root of the hierarchy: a failure of the run itself. Its text is printable, whatever names and values are in it.

    Attributes:
        on_all_ranks: every rank raises it alike, so that rank 0 alone prints it.
    """

    exit_code: ClassVar[int] = 1
    on_all_ranks: bool = False

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n")


class ConfigError(DistkitError):
    """Bad input: found before anything is launched or written.

    Args:
        what: one sentence that names the option and the problem.
        expected: what would have been accepted.
        got: what came instead.
        fix: what to type, word for word where possible.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, *, expected: str | None = None, got: object = None, fix: str | None = None) -> None:
        lines = [what]
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if got is not None:
            lines.append(f"  got:      {got}")
        if fix is not None:
            lines.append(f"  type:     {fix}")
        super().__init__("\n".join(lines))


class LaunchError(ConfigError):
    """The processes that were started are not the ones that were requested."""


class DataError(ConfigError):
    """A data set is missing, unreadable, damaged or does not fit the model."""


class TrainingError(DistkitError):
    """The run started and cannot continue."""


class NonFiniteError(TrainingError):
    """A loss, activation, gradient or parameter became NaN or infinite."""


class CheckpointError(TrainingError):
    """A checkpoint could not be written, or what is on disk is not what was written."""


class RankFailedError(TrainingError):
    """Another rank failed first; its rank and cause are in the message."""


class RankSilentError(RankFailedError):
    """Another rank does not answer."""


class RendezvousError(DistkitError):
    """The ranks of a launch did not find each other in time."""


class Stopped(DistkitError):
    """The run was asked to stop; the same command continues it.

    Attributes:
        retryable: a scheduler should continue it by itself; not where its owner asked for the stop.
    """

    exit_code: ClassVar[int] = 75
    retryable: bool = True


def raised_inside(error: BaseException) -> bool:
    """Whether a call in the function that catches `error` ran Python code: else the call itself was refused."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None


def shorten(names: Iterable[str], limit: int = 3) -> str:
    """`a, b, c and 5 more`: the first `limit` of `names`, and how many there are beyond them."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def printable(text: str, keep: str = "") -> str:
    """`text` with an escape for each character that no screen shows: control characters, bytes that are not UTF-8.

    So a name or a value from a file does nothing to a terminal: no colour, no title, no text that runs backwards.

    Args:
        text: anything.
        keep: control characters that stay, such as line breaks.
    """
    if text.isprintable():
        return text
    if "\n" in keep:  # most lines are printable as a whole
        return "\n".join(printable(line, keep.replace("\n", "")) for line in text.split("\n"))
    return "".join(each if each.isprintable() or each in keep or unicodedata.category(each) == "Zs"
                   else each.encode("unicode_escape").decode() for each in text)  # fmt: skip


def hide(secret: str) -> None:
    """From now on `masked` takes `secret` out of texts, also as tracebacks and URLs quote it."""
    _secrets.update((secret, repr(secret)[1:-1], quote(secret, safe="")))


def masked(text: str) -> str:
    """`text` without the secrets of this process: errors of other libraries may quote them."""
    for value in sorted(_secrets, key=len, reverse=True):
        text = text.replace(value, MASK)
    return text


def say(text: str) -> None:
    """Print `text`, made printable and without secrets, on stderr at once."""
    print(printable(masked(text), keep="\n\t"), file=sys.stderr, flush=True)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice spelled most like `word`, or None when none is close."""
    # the search takes the product of both lengths, and nobody types such a word
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5) if len(word) <= LONGEST_WORD else []
    return found[0] if found else None
