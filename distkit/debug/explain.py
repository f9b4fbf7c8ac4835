"""From an exception inside a step to a message that says where, with what, and what to look at."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distkit.debug.watch import ModuleWatch, range_line, shape_line, tensors_of
from distkit.errors import DistkitError, NonFiniteError, TrainingError


def explain(
    error: Exception, watch: ModuleWatch, batch: Mapping[str, tuple[str, Bounds | None]], phase: str
) -> DistkitError:
    """The same failure with the phase, the line, the module with its input, and the batch.

    Args:
        error: what was raised inside a step.
        watch: which modules were being called.
        batch: what `summarize` said of the batch before the forward; empty when there was none yet.
        phase: what the step was doing, for people: "reading the batch".
    """
    if isinstance(error, DistkitError):
        return error
    text = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    if "returned nan values" in text:
        return NonFiniteError(
            f"step {watch.step}: the gradient became NaN in backward: {text}\n"
            "  the warning above shows the forward line that this gradient belongs to"
        )
    lines = []
    if watch.active:
        call = watch.active[-1]
        lines.append(f"step {watch.step}: {type(error).__name__} in module {call.title()}: {text}")
        lines.append(f"  input:    {shape_line(call.inputs)}")
    else:
        lines.append(f"step {watch.step}: {type(error).__name__} while {phase}: {text}")
        if watch.last_output is not None:
            lines.append(f"  model gave: {shape_line(watch.last_output)}")
    if place := users_line(error):
        lines.append(f"  at:       {place}")
    lines += [f"  batch {name}: {line}" for name, (line, _) in batch.items()]
    lines += [f"  hint:     {hint}" for hint in label_hints(watch, batch, text)]
    return TrainingError("\n".join(lines))


Bounds = tuple[int, int]


def users_line(error: BaseException) -> str | None:
    """`recipe.py:77 in compute_loss: loss = ...`: the innermost line that is neither torch's nor distkit's."""
    libraries = [str(Path(torch.__file__).parent), str(Path(__file__).parents[1])]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(frame.filename.startswith(folder) for folder in libraries) and "<" not in frame.filename
    ]
    if not frames:
        return None
    last = frames[-1]
    return f"{Path(last.filename).name}:{last.lineno} in {last.name}: {last.line}"


def summarize(batch: object) -> dict[str, tuple[str, Bounds | None]]:
    """One line for each tensor of a batch, and the least and largest value of integer ones.

    Taken before the forward: after a device-side assertion no tensor can be read any more.
    """
    lines: dict[str, tuple[str, Bounds | None]] = {}
    for path, leaf in torch.utils._pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, Tensor):
            whole = not leaf.is_floating_point() and leaf.dtype != torch.bool and leaf.numel() > 0
            bounds = (int(leaf.min().item()), int(leaf.max().item())) if whole else None
            lines[torch.utils._pytree.keystr(path) or "tensor"] = (range_line(leaf), bounds)
    return lines


def label_hints(watch: ModuleWatch, batch: Mapping[str, tuple[str, Bounds | None]], error: str) -> list[str]:
    """Integer tensors of the batch whose values are not classes of the model's output [B, C, ...]."""
    outputs = [t for t in tensors_of(watch.last_output) if t.ndim >= 2]
    if watch.active or not outputs:
        return []
    classes = outputs[0].shape[1]
    hints = [
        f"batch {name} runs from {bounds[0]} to {bounds[1]}; the model has {classes} classes, so labels must be in "
        f"0 to {classes - 1}"
        for name, (_, bounds) in batch.items()
        if bounds is not None and (bounds[0] < 0 or bounds[1] >= classes)
    ]
    if not hints and ("out of bounds" in error or "device-side assert" in error):
        hints = [f"the model has {classes} classes, so labels must be in 0 to {classes - 1}; compute_loss changed them"]
    return hints
