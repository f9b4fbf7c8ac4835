"""One seed for everything random, and the states of the generators as tensors, so that a run goes on drawing (C3)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor

#: random.getstate()'s layout: its first entry in every Python since 3.2.
_PYTHON_VERSION = 3
#: Words of a Mersenne Twister, in python's and numpy's generator.
_WORDS = 624


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit key from the run's seed and a purpose, such as ("rank", 3); the same on every machine (BLAKE2b)."""
    text = "\x00".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's global generators, on the CPU and on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators start from `seed`; outside they are as they were."""
    python, numpy_state = random.getstate(), np.random.get_state()
    # of the GPUs this process's own: left to itself torch asks all of them, and warns of that
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def capture_rng(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's, python's and numpy's global generators; CPU tensors, copies. Never waits for the device.

    Args:
        device: of this process; its own generator is captured too where it has one.

    Returns:
        `torch` uint8 [n]: the CPU's generator. `cuda` or `mps` uint8 [n]: the device's (seed and offset, which torch
        keeps on the host). `python/words` int64 [625]: 624 words and the place among them; `python/gauss` float64 [2]:
        1 and the normal draw that waits, or 0 and 0. `numpy/words` int64 [625] and `numpy/gauss` float64 [2]: the same.

    Raises:
        ValueError: python's or numpy's global generator is not the Mersenne Twister that both have by default.
    """
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        tensors["mps"] = torch.mps.get_rng_state()
    version, words, gauss = random.getstate()
    if version != _PYTHON_VERSION:
        raise ValueError(f"random.getstate() has version {version}, known here is {_PYTHON_VERSION}")
    tensors["python/words"] = torch.tensor(words, dtype=torch.int64)
    tensors["python/gauss"] = _pair(gauss is not None, gauss)
    state = cast(Mapping[str, object], np.random.get_state(legacy=False))
    if state["bit_generator"] != "MT19937":
        raise ValueError(f"numpy's global generator is a {state['bit_generator']}, known here is MT19937")
    inner = cast(Mapping[str, object], state["state"])
    key = cast("np.ndarray[tuple[int], np.dtype[np.uint32]]", inner["key"])
    tensors["numpy/words"] = torch.tensor([*key.tolist(), cast(int, inner["pos"])], dtype=torch.int64)
    tensors["numpy/gauss"] = _pair(bool(state["has_gauss"]), cast(float, state["gauss"]))
    return tensors


def restore_rng(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators back to what `capture_rng` found, for the same kind of device.

    Raises:
        KeyError: a name is missing or not known; nothing is changed then.
        ValueError: a dtype, a shape or a word does not fit; nothing is changed then.
    """
    _check(tensors, capture_rng(device))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(tensors["mps"])
    has, gauss = tensors["python/gauss"].tolist()
    random.setstate((_PYTHON_VERSION, tuple(tensors["python/words"].tolist()), gauss if has else None))
    *words, place = tensors["numpy/words"].tolist()
    has, gauss = tensors["numpy/gauss"].tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), place, int(has), gauss))


def _pair(has: bool, value: float | None) -> Tensor:
    return torch.tensor([float(has), 0.0 if value is None else value], dtype=torch.float64)


def _check(tensors: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    """Refuse what the setters would, or would take without a word."""
    if tensors.keys() != here.keys():
        raise KeyError(f"generators saved: {', '.join(sorted(tensors))}; here: {', '.join(sorted(here))}")
    for name, own in here.items():
        saved = tensors[name]
        if (saved.dtype, saved.shape) != (own.dtype, own.shape):
            raise ValueError(f"generator {name} is {saved.dtype} {list(saved.shape)}, here {own.dtype} "
                             f"{list(own.shape)}")  # fmt: skip
    for name in ("python/words", "numpy/words"):
        *words, place = tensors[name].tolist()
        if not (all(0 <= word < 2**32 for word in words) and 0 <= place <= _WORDS):
            raise ValueError(f"generator {name} holds a word that no Mersenne Twister has")
