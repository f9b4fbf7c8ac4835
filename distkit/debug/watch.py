"""Sees every module's inputs and outputs, so that a failure names the module that caused it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from distkit.errors import NonFiniteError


def tensors_of(value: object) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def shape_line(value: object) -> str:
    """`float32 [128, 3, 32, 32], int64 [128]`."""
    tensors = tensors_of(value)
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors) or "no tensor"


def range_line(tensor: Tensor) -> str:
    """dtype, shape and values: `int64 [128], 0 to 9` or `float32 [4], 2 of 4 values not finite`."""
    line = shape_line(tensor)
    tensor = values_of(tensor)
    if tensor.numel() == 0 or tensor.is_complex():
        return line
    if bad := count_nonfinite(tensor):
        return f"{line}, {bad} of {tensor.numel()} values not finite"
    low, high = (bound.item() for bound in tensor.aminmax())
    return f"{line}, {low:.4g} to {high:.4g}"


def count_nonfinite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    return int((~torch.isfinite(values_of(tensor))).sum().item()) if tensor.is_floating_point() else 0


def values_of(tensor: Tensor) -> Tensor:
    """The tensor without its graph; of a sparse one the values that are there."""
    tensor = tensor.detach()
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def any_nonfinite(tensors: Iterable[Tensor]) -> bool:
    """True when one of the values is NaN or infinite."""
    return any(count_nonfinite(tensor) for tensor in tensors)


@dataclass
class Call:
    """One call of a module."""

    name: str
    module: nn.Module
    inputs: object
    outputs: object = None

    def title(self) -> str:
        """`stages.0.conv1, Conv2d(3, 16, …)`."""
        kind = str(self.module) if not list(self.module.children()) else type(self.module).__name__
        return f"{self.name or 'the model'}, {kind}"


@dataclass
class ModuleWatch:
    """A context in which every call of a submodule is followed.

    Attributes:
        active: calls entered and not left; after an exception the last one is where it happened.
        first_calls: the first call of every module, in the order in which they returned.
        step: named in messages; the caller keeps it up to date.
    """

    root: nn.Module
    step: int = 0
    active: list[Call] = field(default_factory=list)
    first_calls: dict[str, Call] = field(default_factory=dict)
    last_output: object = None
    _last_left: str | None = None
    _handles: list[RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> ModuleWatch:
        for name, module in self.root.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self) -> None:
        """Forget the calls of the last forward."""
        self.active.clear()
        self.last_output = self._last_left = None

    def _enter(self, name: str):  # type: ignore[no-untyped-def]  # a hook; torch types it loosely
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            call = Call(name, module, (args, kwargs))
            self.active.append(call)
            if any_nonfinite(tensors_of(call.inputs)):
                parent = self.active[-2].title() if len(self.active) > 1 else "the recipe's compute_loss"
                after = f" after {self._last_left}" if self._last_left else ""
                raise NonFiniteError(
                    f"step {self.step}: a value became NaN or infinite between modules, in {parent}{after}\n"
                    f"  first seen as the input of {call.title()}\n  input:    {_ranges(call.inputs)}"
                )

        return hook

    def _leave(self, module: nn.Module, _args: tuple[object, ...], _kwargs: dict[str, object], output: object) -> None:
        call = self.active[-1]
        call.outputs = output
        if any_nonfinite(tensors_of(output)):
            bad = [f"{name}: {range_line(p)}" for name, p in module.named_parameters() if count_nonfinite(p)]
            raise NonFiniteError(
                f"step {self.step}: module {call.title()} made NaN or infinite values\n"
                f"  input:    {_ranges(call.inputs)}\n  output:   {_ranges(output)}\n"
                f"  weights:  {'; '.join(bad[:3]) or 'all finite'}"
            )
        self.active.pop()
        self.last_output = output
        self._last_left = call.name
        self.first_calls.setdefault(call.name, Call(call.name, module, shape_line(call.inputs), shape_line(output)))


def _ranges(value: object) -> str:
    return "; ".join(range_line(tensor) for tensor in tensors_of(value)) or "no tensor"
