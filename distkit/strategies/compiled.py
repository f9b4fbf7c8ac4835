"""What torch.compile did behind a run's back: graphs it broke, and code it compiled again."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

from torch._dynamo.utils import graph_break_reasons, guard_failures


class CompilerWatch:
    """Reads what dynamo has written down, when it is asked; a step pays nothing.

    Of the whole process, from the moment at which the watch is made.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()
        self.skip()

    def skip(self) -> None:
        """What has happened until now is not worth a line."""
        self._breaks = len(graph_break_reasons)
        self._failures = {code: len(reasons) for code, reasons in guard_failures.items()}

    def lines(self) -> list[str]:
        """A line for each graph break and each reason to compile again, since the last call; none of them twice."""
        found = dict.fromkeys([*self._new_breaks(), *self._new_failures()])
        self.skip()
        fresh = [line for line in found if line not in self._told]
        self._told.update(fresh)
        return fresh

    def _new_breaks(self) -> Iterator[str]:
        for reason in graph_break_reasons[self._breaks :]:
            frame = reason.user_stack[-1] if reason.user_stack else None
            where = f" at {_place(frame.filename, frame.lineno)} in {frame.name}" if frame is not None else ""
            yield (
                f"torch.compile splits the model{where}: {_explanation(reason.reason)}; "
                "--compile-fullgraph makes this an error"
            )

    def _new_failures(self) -> Iterator[str]:
        for code, reasons in guard_failures.items():
            assert isinstance(code, CodeType), code
            for reason in reasons[self._failures.get(code, 0) :]:
                # which of its compilations did not fit is of no use
                why = re.sub(r"^\d+/\d+(_\d+)?: ", "", _first_line(reason))
                fix = "; --compile-dynamic compiles once for all sizes" if "size mismatch" in why else ""
                yield (
                    f"torch.compile compiled {code.co_name} ({_place(code.co_filename, code.co_firstlineno)}) again: "
                    f"{why}{fix}"
                )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip()


def _explanation(text: str) -> str:
    """Of a graph break: the sentence in which dynamo explains it, where it has one."""
    found = re.search(r"^\s*Explanation: (.*)$", text, re.MULTILINE)
    return found[1].rstrip(" .") if found else _first_line(text)


def _place(file: str, line: int | None) -> str:
    path = Path(file)
    path = path.relative_to(os.getcwd()) if path.is_relative_to(os.getcwd()) else path
    return f"{path}:{line}"
