"""A stand-in for a CUDA device where there is none: the code takes its device paths, real numbers come out.

Tensors say that they lie on cuda:0 and are computed on the CPU. What a CUDA device would not do, would wait for, or
would round otherwise is an error: a tensor of the CPU among the device's, a number read out of a tensor, a copy that
waits, and every operation that is not known to give the same bits on both.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from distkit.data.augment import boxes, mixing

CUDA = torch.device("cuda", 0)

#: Bits are moved, or made of numbers of the host: any dtype. Conversions are looked at by `_check_values`.
MOVES = set("""
    _to_copy _unsafe_view alias arange cat clone constant_pad_nd copy detach empty empty_like expand fill flip
    gather index index_select masked_fill permute rot90 select slice split squeeze stack transpose unbind unsqueeze view
    where zeros zeros_like
""".split())  # fmt: skip  # noqa: SIM905
#: One operation on each number, rounded once as IEEE 754 says, or exact. A division by a number is none.
ROUNDED = set("add clamp eq ge gt le lt maximum minimum mul ne neg round rsub sqrt sub".split())  # noqa: SIM905
#: Exact on whole numbers, in any order of evaluation.
WHOLE = ROUNDED | set("""
    __rshift__ amax amin any argmax bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
    bitwise_xor div remainder sum
""".split())  # fmt: skip  # noqa: SIM905


class NotAlike(AssertionError):
    """CUDA would wait, refuse, or give other bits."""


class OnDevice(Tensor):
    """A tensor of the CPU that says that it lies on cuda:0."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotAlike(f"{function} on a tensor of a device that is gone")


class StandIn(TorchDispatchMode):
    """Computes on the CPU what is asked of cuda:0. `copies` counts the copies from the host."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        mine = [value for value in given if isinstance(value, OnDevice)]
        device = kwargs.get("device")
        to_device = device is not None and torch.device(device).type == "cuda"
        with unset_fake_temporarily():
            if not mine and not to_device:
                return function(*args, **kwargs)
            name = function.overloadpacket.__name__
            self._check(name, args, kwargs, given, to_device)
            if to_device:
                kwargs["device"] = torch.device("cpu")
            wrappers = {id(value.inner): value for value in mine}
            args, kwargs = tree_map(lambda value: value.inner if isinstance(value, OnDevice) else value, (args, kwargs))
            result = function(*args, **kwargs)
            _check_values(name, given, result)
            return tree_map(lambda value: _wrapped(value, wrappers), result)

    def _check(self, name, args, kwargs, given, to_device):
        base = name if name.startswith("_") else name.removesuffix("_")
        host = [value for value in given if not isinstance(value, OnDevice)]
        if base in ("_to_copy", "copy"):
            device = kwargs.get("device")
            if device is not None and not to_device:
                raise NotAlike("a copy to the host waits for the device")
            if base == "copy" and host and host[0] is args[0]:
                raise NotAlike("a copy to the host waits for the device")
            if host:
                self.copies += 1
                if not (kwargs.get("non_blocking") or (base == "copy" and len(args) > 2 and args[2])):
                    raise NotAlike("a copy from the host without non_blocking waits for the device")
            return
        if any(value.ndim for value in host):
            raise NotAlike(f"{name} of tensors on the CPU and on the device")
        if base == "index" and any(value.dtype in (torch.bool, torch.uint8) for value in given[1:]):
            raise NotAlike("an index of true and false waits for the device to count")
        floats = any(value.is_floating_point() for value in given)
        if base not in MOVES and base not in (ROUNDED if floats else WHOLE):
            raise NotAlike(f"{name} of {'floats' if floats else 'whole numbers'} is not known to be the same on CUDA")
        if base in ("add", "sub", "rsub") and floats and abs(kwargs.get("alpha", 1)) != 1:
            raise NotAlike(f"{name} with alpha is one rounding on CUDA and may be two on the CPU")
        if base == "div" and kwargs.get("rounding_mode") is None:
            raise NotAlike("a division by a number is a product with its reciprocal on CUDA")


def _wrapped(value, wrappers):
    if not isinstance(value, Tensor):
        return value
    return wrappers[id(value)] if id(value) in wrappers else OnDevice(value)


def _check_values(name, given, result):
    """Conversions of numbers that the other dtype cannot hold differ between devices."""
    if name != "_to_copy" or result.is_floating_point() or result.dtype == torch.bool or not given[0].numel():
        return
    source = given[0].inner if isinstance(given[0], OnDevice) else given[0]
    if source.is_floating_point() or source.element_size() > result.element_size():
        low, high = source.aminmax()
        limits = torch.iinfo(result.dtype)
        if not limits.min <= low.item() <= high.item() <= limits.max:
            raise NotAlike(f"{low.item()} to {high.item()} do not fit {result.dtype}")


def forget_tables():
    """Tables that augmentations keep on each device."""
    for table in (boxes._ratios, mixing._shares, mixing._sides):
        table.cache_clear()


@contextmanager
def stand_in():
    """Inside, tensors may lie on cuda:0, whether there is one or not."""
    forget_tables()
    mode = StandIn()
    # FakeTensorMode below keeps torch from starting CUDA when a tensor is made there; no tensor reaches it.
    with FakeTensorMode(), mode:
        try:
            yield mode
        finally:
            forget_tables()


def to_host(tensor):
    """What a tensor on the stand-in holds."""
    return tensor.inner
