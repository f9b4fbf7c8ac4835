"""torch.compile: what it is applied to, and reports of graph breaks and recompilations."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import torch
from torch import nn

from distkit.config import TrainConfig
from distkit.errors import ConfigError
from distkit.strategies.blocks import repeated_blocks


def captures_graphs(config: TrainConfig) -> bool:
    """Whether compiled code runs in CUDA graphs on a GPU (torch._inductor.list_mode_options)."""
    if not config.compile:
        return False
    return config.compile_backend == "cudagraphs" or (
        config.compile_backend == "inductor" and config.compile_mode != "default"
    )


def refuse_accumulation(config: TrainConfig, accum_steps: int) -> None:
    """CUDA graphs return gradients in memory of their own, which the next microbatch overwrites.

    Reported as an error or as silently wrong sums (https://github.com/pytorch/pytorch/issues/169545 and 96693).

    Raises:
        ConfigError: there is a next microbatch.
    """
    if accum_steps > 1:
        option = "backend cudagraphs" if config.compile_backend == "cudagraphs" else f"mode {config.compile_mode}"
        raise ConfigError(f"--compile-{option} captures CUDA graphs, which cannot accumulate gradients "
                          f"over {accum_steps} microbatches", got=accum_steps,
                          expected="one microbatch per step on each rank",
                          fix="--compile-mode default --compile-backend inductor, or no --microbatch-size")  # fmt: skip


def compile_(model: nn.Module, config: TrainConfig, scope: str, *, fix: str = "--no-compile") -> None:
    """Compile in place: `model`'s call (scope "whole"), or the forward of each repeated block ("blocks").

    A block's hooks stay outside, where a strategy gathers its parameters. `fix` is what to type where none repeats.

    Raises:
        ConfigError: the model has no repeated block.
    """
    # only inductor has modes
    mode = config.compile_mode if config.compile_backend == "inductor" else None
    backend, fullgraph, dynamic = config.compile_backend, config.compile_fullgraph, config.compile_dynamic or None
    if scope == "whole":
        model.compile(backend=backend, mode=mode, fullgraph=fullgraph, dynamic=dynamic)
        return
    blocks = repeated_blocks(model)
    if not blocks:
        raise ConfigError("--compile-scope blocks: the model has no repeated blocks", fix=fix)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, mode=mode, fullgraph=fullgraph, dynamic=dynamic)


class CompilerWatch:
    """Reads dynamo's records on request; a step pays nothing.

    They are those of the whole process, from the moment at which the watch is made.
    """

    def __init__(self) -> None:
        # here, because it takes a second
        from torch._dynamo.utils import graph_break_reasons, guard_failures

        self._all_breaks, self._all_failures = graph_break_reasons, guard_failures
        self._reported: set[str] = set()
        self.skip()

    def skip(self) -> None:
        """Report nothing of what has happened until now."""
        self._breaks = len(self._all_breaks)
        self._failures = {code: len(reasons) for code, reasons in self._all_failures.items()}

    def lines(self) -> list[str]:
        """A line for each graph break and each reason to compile again, since the last call; none of them twice."""
        lines = dict.fromkeys([*self._new_breaks(), *self._new_failures()])
        self.skip()
        new = [line for line in lines if line not in self._reported]
        self._reported.update(new)
        return new

    def _new_breaks(self) -> Iterator[str]:
        for reason in self._all_breaks[self._breaks :]:
            frame = reason.user_stack[-1] if reason.user_stack else None
            where = f" at {_location(frame.filename, frame.lineno)} in {frame.name}" if frame is not None else ""
            yield (
                f"torch.compile splits the model{where}: {_explanation(reason.reason)}; "
                "--compile-fullgraph makes this an error"
            )

    def _new_failures(self) -> Iterator[str]:
        for code, reasons in self._all_failures.items():
            assert isinstance(code, CodeType), code
            for reason in reasons[self._failures.get(code, 0) :]:
                # the number of the compilation is of no use
                why = re.sub(r"^\d+/\d+(_\d+)?: ", "", _first_line(reason))
                if "GLOBAL_STATE changed: grad_mode" in why:
                    continue  # what evaluations compiled; beside it stands why the training did not fit
                fix = "; --compile-dynamic compiles once for all sizes" if "size mismatch" in why else ""
                yield (
                    f"torch.compile compiled {code.co_name} ({_location(code.co_filename, code.co_firstlineno)}) "
                    f"again: {why}{fix}"
                )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip()


def _explanation(text: str) -> str:
    """Dynamo's sentence about a graph break, where it has one."""
    explanation = re.search(r"^\s*Explanation: (.*)$", text, re.MULTILINE)
    return explanation[1].rstrip(" .") if explanation else _first_line(text)


def _location(file: str, line: int | None) -> str:
    path = Path(file)
    path = path.relative_to(os.getcwd()) if path.is_relative_to(os.getcwd()) else path
    return f"{path}:{line}"
