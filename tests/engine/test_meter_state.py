"""A meter's open sums survive a save, on the same ranks and on others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distkit.engine.meter import FOLD_EVERY, Meter
from distkit.losses import LossOutput
from distkit.runtime import Topology
from distkit.runtime.process import Runtime

RUNTIME = Runtime(topology=Topology(), device=torch.device("cpu"))


def feed(meter: Meter, steps: range, weighted: bool = False) -> None:
    """Values whose sums depend on the order of addition, also in float64."""
    generator = torch.Generator()
    for step in steps:
        generator.manual_seed(step)
        loss, metric = torch.randn(2, generator=generator, dtype=torch.float64).exp().unbind()
        weight = torch.rand((), generator=generator, dtype=torch.float64) if weighted and step % 2 else None
        meter.add(LossOutput(loss, {"a/b": metric} if step % 3 else {}, weight), 3 + step % 2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("moment", [0, 1, 7, FOLD_EVERY, FOLD_EVERY + 9])
def test_a_restored_meter_reports_the_same_bits(moment: int, weighted: bool) -> None:
    straight = Meter(RUNTIME)
    feed(straight, range(moment), weighted)
    taken = {name: tensor.clone() for name, tensor in straight.state_tensors().items()}
    resumed = Meter(RUNTIME)
    feed(resumed, range(1000, 1003))  # replaced, pending ones too
    resumed.load_state_tensors(taken)
    kept = {name: tensor.clone() for name, tensor in taken.items()}
    for meter in (straight, resumed):
        feed(meter, range(moment, moment + 300), weighted)
    left, right = straight.reduce(), resumed.reduce()
    assert (left.samples, left.loss, left.metrics) == (right.samples, right.loss, right.metrics)
    assert all(torch.equal(taken[name], tensor) for name, tensor in kept.items())  # what was given is not added to


def test_state_has_names_and_dtypes() -> None:
    meter = Meter(RUNTIME)
    assert {n: (t.dtype, t.tolist()) for n, t in meter.state_tensors().items()} == {
        "loss": (torch.float64, 0.0),
        "weight": (torch.float64, 0.0),
        "samples": (torch.int64, 0),
    }
    meter.add(LossOutput(torch.tensor(2.0), {"correct": torch.tensor(3)}), 4)
    assert {n: (t.dtype, t.ndim, t.item()) for n, t in meter.state_tensors().items()} == {
        "loss": (torch.float64, 0, 8.0),
        "weight": (torch.float64, 0, 4.0),
        "samples": (torch.int64, 0, 4),
        "sums/correct": (torch.float64, 0, 3.0),
    }
    again = meter.state_tensors()  # what was folded is not counted twice
    assert again["samples"].item() == 4
    assert again["loss"] is meter._loss


class Reads(TorchDispatchMode):
    """Counts scalars that are read out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_taking_the_state_never_waits() -> None:
    meter = Meter(RUNTIME)
    feed(meter, range(20), weighted=True)
    with Reads() as reads:
        meter.state_tensors()
    assert reads.count == 0
    with Reads() as reads:
        meter.reduce()
        torch.ones(()).item()
    assert reads.count > 0


def state_of(steps: range) -> dict[str, Tensor]:
    meter = Meter(RUNTIME)
    feed(meter, steps)
    return meter.state_tensors()


def test_merge_adds_ranks_up() -> None:
    whole = Meter(RUNTIME)
    feed(whole, range(30))
    states = [state_of(range(10)), state_of(range(10, 11)), state_of(range(11, 30)), Meter(RUNTIME).state_tensors()]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    merged = Meter(RUNTIME)
    merged.load_state_tensors(Meter.merge(states))
    left, right = whole.reduce(), merged.reduce()
    assert left.samples == right.samples
    assert left.loss == pytest.approx(right.loss, rel=1e-14)
    assert left.metrics == pytest.approx(right.metrics, rel=1e-14)
    assert all(torch.equal(s[n], t) for s, kept in zip(states, before, strict=True) for n, t in kept.items())
    assert Meter.merge([states[0]]).keys() == states[0].keys()
    assert Meter.merge([state_of(range(3, 5)), state_of(range(1))])["sums/a/b"].dtype == torch.float64


def test_merge_of_none_is_an_empty_meter() -> None:
    empty = Meter(RUNTIME)
    empty.load_state_tensors(Meter.merge([]))
    feed(empty, range(5))
    straight = Meter(RUNTIME)
    feed(straight, range(5))
    assert empty.reduce() == straight.reduce()


def test_another_devices_float32_is_taken() -> None:
    meter = Meter(RUNTIME)
    meter.load_state_tensors({name: value.float() for name, value in state_of(range(4)).items()})
    assert meter.reduce().samples == sum(3 + step % 2 for step in range(4))


@pytest.mark.parametrize("wrong", ["missing", "unknown"])
def test_other_names_are_refused(wrong: str) -> None:
    state = state_of(range(4))
    bad = {n: t for n, t in state.items() if n != "weight"} if wrong == "missing" else state | {"sum/x": state["loss"]}
    meter = Meter(RUNTIME)
    feed(meter, range(2))
    with pytest.raises(KeyError, match="not the state of a meter"):
        meter.load_state_tensors(bad)
    with pytest.raises(KeyError, match="weight" if wrong == "missing" else "sum/x"):
        Meter.merge([state, bad])
    assert meter.reduce().samples == 7


def test_a_report_says_where_a_value_comes_from_that_is_not_finite() -> None:
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    meter = Meter(RUNTIME)
    for index in range(6):
        meter.add(LossOutput(nan if index == 3 else one, {"x": nan if index == 5 else one}), 4)
    means = meter.reduce()
    sources = {source.name: source for source in means.not_finite}
    assert (sources["loss"].begin, sources["loss"].end, sources["loss"].seen) == (12, 16, 24)
    assert (sources["x"].begin, sources["x"].end) == (0, 24)
    meter.add(LossOutput(one), 4)
    assert meter.reduce().not_finite == ()


def test_a_loss_that_was_added_up_long_ago_is_found_nearby() -> None:
    nan, one = torch.tensor(float("-inf")), torch.tensor(1.0)
    meter = Meter(RUNTIME)
    for index in range(2 * FOLD_EVERY + 5):
        meter.add(LossOutput(nan if index == FOLD_EVERY + 7 else one), 1)
    (source,) = meter.reduce().not_finite
    assert (source.begin, source.end, source.seen) == (FOLD_EVERY, 2 * FOLD_EVERY, 2 * FOLD_EVERY + 5)
    assert str(source.value) == "-inf"
    # a restored one was not finite before
    for index in range(3):
        meter.add(LossOutput(nan if index == 1 else one), 2)
    restored = Meter(RUNTIME)
    restored.load_state_tensors(meter.state_tensors())
    restored.add(LossOutput(one), 2)
    (source,) = restored.reduce().not_finite
    assert (source.begin, source.end, source.seen) == (0, 6, 8)


@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_not_finite_can_be_left_out_of_the_means(weighted: bool) -> None:
    nan, weight = torch.tensor(float("nan")), torch.tensor(2.0) if weighted else None
    meter = Meter(RUNTIME, drops_bad=True)
    for loss, metric in ((1.0, 1.0), (float("nan"), 2.0), (3.0, float("inf"))):
        meter.add(LossOutput(torch.tensor(loss), {"x": torch.tensor(metric)}, weight), 2)
    if weighted:
        meter.add(LossOutput(torch.tensor(7.0), {"x": nan}, nan), 2)
    means = meter.reduce()
    assert means.loss == 2.0
    assert means.metrics["x"] * means.samples == 3.0
    assert means.not_finite == ()
