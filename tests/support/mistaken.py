"""The tiny recipe with one mistake of its author: a function that returns a wrong kind of value, or raises.

`python mistaken.py` takes the mistake from MISTAKE=PLACE/KIND; `mistaken(place, kind)` gives the recipe.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import tiny
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distkit.config import Constant
from distkit.data.reading.iterable import IterableData
from distkit.entry import main
from distkit.losses import LossOutput
from distkit.recipe import Recipe

BASE = replace(tiny.BASE, schedule=Constant(), num_steps=3, eval_every=2)


def raising(error: Exception) -> object:
    raise error


def counting() -> Iterator[int]:
    yield from range(3)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)


#: What a function may return by mistake. Each is made anew where it is returned.
VALUES: dict[str, Callable[[], object]] = {
    "None": lambda: None,
    "a boolean": lambda: True,
    "an integer": lambda: 3,
    "a negative number": lambda: -1,
    "a float": lambda: 0.5,
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "text": lambda: "resnet18",
    "bytes": lambda: b"\xff",
    "a path": lambda: Path("data"),
    "a tuple": lambda: (torch.zeros(3, 2), torch.zeros(3)),
    "an empty tuple": tuple,
    "a list": lambda: [1, "two"],
    "an empty list": list,
    "a dict": lambda: {"a": torch.zeros(2), 3: None},
    "an empty dict": dict,
    "a set": lambda: {1, 2},
    "a number tensor": lambda: torch.tensor(1.0),
    "a whole number tensor": lambda: torch.tensor(1),
    "a tensor of NaN": lambda: torch.tensor(float("nan")),
    "a complex tensor": lambda: torch.tensor(1j),
    "a vector": lambda: torch.ones(3),
    "a matrix": lambda: torch.ones(4, 6),
    "an array": lambda: np.ones(3),
    "a parameter": lambda: nn.Parameter(torch.ones(())),
    "a class": lambda: nn.Linear,
    "a class of data sets": lambda: TensorDataset,
    "a function": lambda: len,
    "a function of nothing": lambda: lambda: 1.0,
    "a generator": counting,
    "an iterator": lambda: iter([1]),
    "an object": object,
    "an error": lambda: ValueError("returned"),
    "a module": lambda: nn.Sequential(nn.Linear(6, 4)),
    "a frozen module": lambda: nn.Linear(6, 4).requires_grad_(False),
    "a module without parameters": nn.ReLU,
    "a state dict": lambda: nn.Linear(6, 4).state_dict(),
    "a loss output": lambda: LossOutput(torch.ones(())),
    "a data set": lambda: TensorDataset(torch.zeros(96, 6), torch.zeros(96, dtype=torch.int64)),
    "a loader": lambda: DataLoader(TensorDataset(torch.zeros(96, 6))),
    "an iterable set": lambda: Stream(sample),
    "an optimizer": optimizer,
    "a scheduler": lambda: ConstantLR(optimizer()),
    "a configuration": lambda: replace(BASE, seed=3),
    "another configuration": lambda: Constant(),
}
#: What a function may raise by itself: its own traceback is shown.
ERRORS: dict[str, Callable[[], object]] = {
    "KeyError": lambda: raising(KeyError("image")),
    "TypeError": lambda: raising(TypeError("unsupported operand")),
    "StopIteration": lambda: raising(StopIteration()),
    "AssertionError": lambda: raising(AssertionError()),
    "an error of many lines": lambda: raising(RuntimeError("first\nsecond\nthird")),
}
KINDS = {**VALUES, **{f"raises {name}": make for name, make in ERRORS.items()}}


class Odd(tiny.Vectors):
    """Vectors, one method of which gives another value."""

    def __init__(self, method: str, make: Callable[[], Any]) -> None:
        super().__init__("train", 0.0)
        self.method, self.make = method, make

    def __len__(self) -> int:
        return self.make() if self.method == "__len__" else super().__len__()  # type: ignore[no-any-return]

    def fetch(self, indices: Tensor) -> Any:
        return self.make() if self.method == "fetch" else super().fetch(indices)

    def augment(self, batch: Any, draws: Any) -> Any:
        return self.make() if self.method == "augment" else super().augment(batch, draws)


class OddSamples(TensorDataset):
    """Samples one by one, each of them `make()`."""

    def __init__(self, make: Callable[[], Any]) -> None:
        vectors = tiny.Vectors("train", 0.0)
        super().__init__(vectors.inputs, vectors.labels)
        self.make = make

    def __getitem__(self, index: int) -> Any:
        return self.make()


class OddBatches(OddSamples):
    """Samples one by one, whose batch is `make()`."""

    def __getitem__(self, index: int) -> Any:
        return sample()

    def collate(self, _samples: list[Any]) -> Any:
        return self.make()


class Stream(IterableDataset[Any]):
    """Samples in their own order, each of them `make()`."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.make()


def sample() -> dict[str, Tensor]:
    return {"inputs": torch.zeros(tiny.FEATURES), "labels": torch.tensor(0)}


@dataclass(frozen=True)
class Iterables:
    """The places of an iterable data set."""

    place: str
    make: Callable[[], Any]

    def build(self, _rank: int, _world_size: int) -> Any:
        if self.place == "build":
            return self.make()
        return Stream(self.make if self.place == "__iter__" else sample)

    def collate(self, _samples: list[Any]) -> Any:
        return self.make()

    def augment(self, batch: Any, _draws: Any) -> Any:
        return self.make() if self.place == "augment" else batch

    def data(self) -> IterableData:
        length = self.make() if self.place == "samples_per_epoch" else 96
        collate = self.collate if self.place == "collate" else None
        return IterableData(build=self.build, samples_per_epoch=length, collate=collate, augment=self.augment)


def mistaken(place: str, kind: str) -> Recipe[tiny.TinyConfig]:
    """The recipe with the mistake `kind` at `place`."""
    make: Callable[[], Any] = KINDS[kind]
    function, _, part = place.partition(" ")
    recipe = Recipe("mistaken", tiny.TinyConfig, tiny.build_model, tiny.build_dataset, compute_loss,
                    presets={"default": BASE}, best=("loss", "min"))  # fmt: skip
    made: dict[str, Any] = {
        "build_model": lambda config: make(),
        "build_param_groups": lambda config, model: odd_groups(part, model, make),
        "build_schedule": lambda config, num_steps: odd_schedule(part, make),
        "resolve_config": lambda config: make(),
        "init_model_": lambda config, model, data: make(),
        "build_dataset": lambda config, split: odd_data(part, split, make),
        "build_loss": lambda config: make(),
        "compute_metrics": lambda sums, num_samples: {"f1": make()} if part else make(),
        "compute_loss": lambda config, model, batch: odd_loss(part, config, model, batch, make),
    }
    return replace(recipe, **{function: made[function]})


def compute_loss(config: tiny.TinyConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
    return LossOutput(nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"]))


def odd_loss(part: str, config: tiny.TinyConfig, model: nn.Module, batch: Any, make: Callable[[], Any]) -> Any:
    """`part`: "" the value that is returned, "test" in evaluations only, or a field of LossOutput."""
    output = compute_loss(config, model, batch)
    if part == "test":
        return output if model.training else make()
    if part == "sum":
        return replace(output, sums={"correct": make()})
    return replace(output, **{part: make()}) if part else make()


def odd_groups(part: str, model: nn.Module, make: Callable[[], Any]) -> Any:
    """`part`: "" the list, "group" one of its dicts, or a key of a group."""
    if part == "group":
        return [make()]
    return [{"params": list(model.parameters()), part: make()}] if part else make()


def odd_schedule(part: str, make: Callable[[], Any]) -> Any:
    """`part`: "" the schedule, "value" what it gives, "later" what it gives in the last step."""
    if part == "later":
        return lambda step: make() if step == 2 else 1.0
    return (lambda step: make()) if part else make()


def odd_data(part: str, split: str, make: Callable[[], Any]) -> Any:
    """`part`: "" the data set, "test" that of the test split, or a method of one."""
    if part in ("", "test"):
        return make() if split == (part or "train") else tiny.Vectors(split, 0.0)  # type: ignore[arg-type]
    kind, _, method = part.rpartition(".")
    if split == "test":
        return tiny.Vectors("test", 0.0) if kind != "Iterable" and hasattr(tiny.Vectors, method) else None
    if kind == "Iterable":
        return Iterables(method, make).data()
    samples = {"__getitem__": OddSamples, "collate": OddBatches}.get(method)
    return Odd(method, make) if samples is None else samples(make)


if __name__ == "__main__":
    main(mistaken(*os.environ["MISTAKE"].split("/")))
