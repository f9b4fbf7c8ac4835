"""The forward's own time: in some steps before a report, without the gates in which a rank waits for others."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from distkit.engine import forward_timer
from distkit.engine.forward_timer import TIMED_STEPS, ForwardTimer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Clock:
    """A clock that only the parts below move."""

    now = 100.0


class Gated(nn.Module):
    """Waits 10 s in a hook of its strategy, and computes for `seconds`."""

    def __init__(self, clock: Clock, seconds: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.clock, self.seconds, self.inner = clock, seconds, inner
        self.register_forward_pre_hook(lambda *_: self.pass_time(10.0))

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    def forward(self, x: Tensor) -> Tensor:
        self.pass_time(self.seconds)
        return x if self.inner is None else self.inner(x)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(forward_timer, "perf_counter", lambda: clock.now)

    class Event:
        """As torch.cuda.Event."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return clock


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in module.modules())


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_gates_do_not_count_and_hooks_are_there_in_timed_steps_only(clock: Clock, device: torch.device) -> None:
    model = Gated(clock, 1.0, Gated(clock, 2.0))
    timer = ForwardTimer(TIMED_STEPS + 2, device, [(part, part) for part in model.modules()])
    for step in range(2 * (TIMED_STEPS + 2)):
        timer.begin_step(step)
        timed = step % (TIMED_STEPS + 2) >= 2
        assert hooks_of(model) == (6 if timed else 2)
        for _ in range(2):  # microbatches
            with timer:
                model(torch.zeros(1))
        model(torch.zeros(1))  # an evaluation, or a forward that the backward repeats
        if (step + 1) % (TIMED_STEPS + 2) == 0:
            timer.read()
            assert timer.seconds == pytest.approx(6.0)
            assert hooks_of(model) == 2


def test_a_gate_may_begin_at_one_module_and_end_at_another(clock: Clock) -> None:
    model = Gated(clock, 3.0, Gated(clock, 2.0))
    timer = ForwardTimer(1, CPU, [(model, model.inner)])  # type: ignore[list-item]  # there is one
    timer.begin_step(0)
    with timer:
        model(torch.zeros(1))
    timer.read()
    assert timer.seconds == pytest.approx(2.0)


def test_one_step_that_was_interrupted_does_not_matter(clock: Clock) -> None:
    timer = ForwardTimer(TIMED_STEPS, CPU)
    for step, seconds in enumerate(itertools.islice(itertools.cycle([1.0, 1.1, 50.0]), TIMED_STEPS)):
        timer.begin_step(step)
        with timer:
            clock.now += seconds
    timer.read()
    assert timer.seconds == pytest.approx(1.1)
    timer.read()
    assert timer.seconds == 0.0


def test_without_a_report_nothing_is_timed(clock: Clock) -> None:
    timer = ForwardTimer()
    timer.begin_step(0)
    with timer:
        clock.now += 1.0
    timer.read()
    assert timer.seconds == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_on_a_gpu_nothing_waits_before_the_report() -> None:
    timer = ForwardTimer(1, CUDA)
    x = torch.zeros(1, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        timer.begin_step(0)
        torch.cuda._sleep(10**9)  # of the step before
        with timer:
            x += 1
            torch.cuda._sleep(10**8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    timer.read()
    assert 0.02 < timer.seconds < 0.3
