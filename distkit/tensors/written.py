"""Which tensors are written to, while something runs that is not ours."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, notes the watched tensors that are changed in place, with a copy of their values before that.

    Attributes:
        before: name -> the tensor, and its values before the first change; those that were only written the same values
            again are among them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before: dict[str, tuple[Tensor, Tensor]] = {}
        #: By its address, which stays its own as long as it is held here: some memory, and the tensors in it.
        self._watched: dict[int, tuple[torch.UntypedStorage, dict[str, Tensor]]] = {}

    def watch(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Note changes of these, and of what lies in the same memory."""
        for name, tensor in named:
            if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:  # no DTensor: its parts are elsewhere
                memory = tensor.untyped_storage()
                self._watched.setdefault(memory._cdata, (memory, {}))[1][name] = tensor

    def changed(self) -> list[str]:
        """Names of those that have other values now; waits for the device."""
        return [name for name, (tensor, values) in self.before.items()
                if not tensor.untyped_storage().size() or not torch.equal(tensor, values)]  # fmt: skip

    @torch.no_grad()
    def put_back_(self) -> None:
        """Give all of them the values that they had."""
        for tensor, values in self.before.values():
            if tensor.untyped_storage().size():
                tensor.copy_(values)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for place, name in writes(func):
            self._keep(args[place] if place < len(args) else (kwargs or {}).get(name))
        return func(*args, **(kwargs or {}))

    def _keep(self, value: object) -> None:
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, Tensor) and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
                _, named = self._watched.get(tensor.untyped_storage()._cdata, (None, {}))
                for name, watched in named.items():
                    if name not in self.before:
                        self.before[name] = watched, watched.detach().clone()


@lru_cache(maxsize=4096)
def writes(func: OpOverload) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operation writes to; fsdp's own write what was gathered."""
    if func.namespace == "fsdp":
        return ()
    arguments = enumerate(func._schema.arguments)
    return tuple((place, each.name) for place, each in arguments if each.alias_info and each.alias_info.is_write)
