"""Random generators go on to the bit where they were captured."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from distkit.runtime.seeding import capture_rng, restore_rng, seed_everything

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_generators() -> Iterator[None]:
    before = capture_rng(CPU)
    seed_everything(3)
    yield
    restore_rng(before, CPU)


def draw(count: int) -> list[object]:
    """`count` draws of each kind; the Gaussian ones come in pairs, so that an odd count leaves one waiting."""
    found: list[object] = []
    for _ in range(count):
        found += [random.gauss(0, 1), np.random.standard_normal(), torch.randn(()).item()]
    for _ in range(count):
        found += [random.random(), random.getrandbits(7), np.random.random(), np.random.randint(9)]
        found += [torch.rand(()).item(), torch.randn(19).tolist(), torch.empty(()).normal_().double().item()]
        found.append(torch.randn((), dtype=torch.float64).item())
    return found


@pytest.mark.parametrize("before", range(5))
@pytest.mark.parametrize("after", [1, 2])
def test_draws_after_a_restore_are_those_after_the_capture(before: int, after: int) -> None:
    for _ in range(before):
        random.gauss(0, 1), np.random.standard_normal(), torch.randn(())
    taken = {name: tensor.clone() for name, tensor in capture_rng(CPU).items()}
    expected = draw(after)
    seed_everything(99)
    draw(before + 1)
    restore_rng(taken, CPU)
    assert draw(after) == expected


def test_capture_changes_nothing_and_is_a_copy() -> None:
    first = capture_rng(CPU)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    again = capture_rng(CPU)
    draw(3)
    assert all(torch.equal(first[name], kept[name]) and torch.equal(again[name], kept[name]) for name in kept)
    assert not any(torch.equal(capture_rng(CPU)[name], kept[name]) for name in ("torch", "python/words", "numpy/words"))


def test_names_dtypes_and_shapes_do_not_depend_on_what_was_drawn() -> None:
    forms = {name: (t.dtype, t.shape, t.device) for name, t in capture_rng(CPU).items()}
    assert set(forms) == {"torch", "python/words", "python/gauss", "numpy/words", "numpy/gauss"}
    random.gauss(0, 1), np.random.standard_normal(), torch.randn(())
    waiting = capture_rng(CPU)
    assert {name: (t.dtype, t.shape, t.device) for name, t in waiting.items()} == forms
    assert waiting["python/gauss"][0] == waiting["numpy/gauss"][0] == 1


def broken(taken: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    words = taken["numpy/words"].clone()
    words[3] = 2**32
    place = taken["python/words"].clone()
    place[-1] = 10_000
    return {
        "missing": {n: t for n, t in taken.items() if n != "torch"},
        "another device": taken | {"cuda": torch.zeros(16, dtype=torch.uint8)},
        "short": taken | {"torch": taken["torch"][:-1]},
        "dtype": taken | {"python/gauss": taken["python/gauss"].float()},
        "word": taken | {"numpy/words": words},
        "place": taken | {"python/words": place},
    }[name]


@pytest.mark.parametrize("name", ["missing", "another device", "short", "dtype", "word", "place"])
def test_what_does_not_fit_is_refused_before_anything_changes(name: str) -> None:
    taken = capture_rng(CPU)
    draw(1)
    here = capture_rng(CPU)
    with pytest.raises((KeyError, ValueError), match="generator"):
        restore_rng(broken(taken, name), CPU)
    assert all(torch.equal(here[n], tensor) for n, tensor in capture_rng(CPU).items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_generator_too() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    taken = capture_rng(device)
    expected = torch.randn(1000, device=device)
    restore_rng(taken, device)
    assert torch.equal(torch.randn(1000, device=device), expected)
