"""Every schedule equals torch's scheduler of the same name, step by step."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch.optim import SGD, Optimizer, lr_scheduler

from distkit.config import (
    SCHEDULES,
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    Plateau,
    Polynomial,
    ScheduleConfig,
    WarmupStableDecay,
)
from distkit.errors import ConfigError
from distkit.schedules import Anneal, Schedule, with_warmup

NUM_STEPS = 300
TorchFactory = Callable[[Optimizer], lr_scheduler.LRScheduler]


def make_optimizer(lr: float = 1.0) -> Optimizer:
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def torch_lrs(factory: TorchFactory, num_steps: int = NUM_STEPS) -> list[float]:
    """The lr that torch uses for each update; base lr 1."""
    optimizer = make_optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = factory(optimizer)
        lrs = []
        for _ in range(num_steps):
            lrs.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
    return lrs


def assert_same(schedule: Schedule, factory: TorchFactory, num_steps: int = NUM_STEPS) -> None:
    ours = [schedule(step) for step in range(num_steps)]
    assert ours == pytest.approx(torch_lrs(factory, num_steps), rel=0, abs=1e-12)


def build(config: ScheduleConfig, num_steps: int = NUM_STEPS, steps_per_epoch: float = 10.0) -> Schedule:
    return config.build(num_steps=num_steps, steps_per_epoch=steps_per_epoch)


CASES: dict[str, tuple[Schedule, TorchFactory]] = {
    "constant": (build(Constant()), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "cosine": (build(Cosine()), lambda o: lr_scheduler.CosineAnnealingLR(o, NUM_STEPS)),
    "cosine_min": (build(Cosine(min_lr_ratio=0.1)), lambda o: lr_scheduler.CosineAnnealingLR(o, NUM_STEPS, 0.1)),
    "restarts": (
        build(CosineRestarts(cycle_steps=37)),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 37),
    ),
    "restarts_growth": (
        build(CosineRestarts(cycle_steps=20, cycle_growth=2, min_lr_ratio=0.05)),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 20, 2, 0.05),
    ),
    "linear": (
        build(Linear(min_lr_ratio=0.25), 200),
        lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=200),
    ),
    "multi_step": (
        build(MultiStep(milestones=(10, 100, 250), gamma=0.3)),
        lambda o: lr_scheduler.MultiStepLR(o, [10, 100, 250], 0.3),
    ),
    "exponential": (build(Exponential(gamma=0.99)), lambda o: lr_scheduler.ExponentialLR(o, 0.99)),
    "polynomial": (build(Polynomial(), 250), lambda o: lr_scheduler.PolynomialLR(o, 250)),
    "polynomial_2": (build(Polynomial(power=2.0)), lambda o: lr_scheduler.PolynomialLR(o, NUM_STEPS, 2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name: str) -> None:
    assert_same(*CASES[name])


@pytest.mark.parametrize("anneal", ["cosine", "linear"])
@pytest.mark.parametrize(
    ("num_steps", "warmup_ratio", "minimum"), [(300, 0.3, 4e-6), (300, 0.25, 0.0), (299, 0.1, 0.01), (2, 0.3, 0.0)]
)
def test_one_cycle_equals_torch(anneal: Anneal, num_steps: int, warmup_ratio: float, minimum: float) -> None:
    ours = build(OneCycle(warmup_ratio=warmup_ratio, min_lr_ratio=minimum, anneal=anneal), num_steps)
    assert_same(
        ours,
        lambda o: lr_scheduler.OneCycleLR(
            o,
            1.0,
            num_steps,
            pct_start=warmup_ratio,
            anneal_strategy="cos" if anneal == "cosine" else "linear",
            cycle_momentum=False,
            div_factor=25,
            final_div_factor=0.04 / minimum if minimum else math.inf,
        ),
        num_steps,
    )


def test_one_cycle_whose_rise_is_one_step_starts_at_the_peak() -> None:
    # torch divides by zero here: pct_start * total_steps == 1
    assert build(OneCycle(warmup_ratio=0.25), 4)(0) == 1.0
    assert build(OneCycle(warmup_ratio=0.25), 4)(3) == 0.0


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_cyclic_equals_torch(mode: Literal["triangular", "triangular2", "exp_range"], minimum: float) -> None:
    gamma = 0.995 if mode == "exp_range" else None
    assert_same(
        build(Cyclic(cycle_steps=58, cycle_mode=mode, gamma=gamma, min_lr_ratio=minimum)),
        lambda o: lr_scheduler.CyclicLR(o, minimum, 1.0, 29, mode=mode, gamma=gamma or 1.0, cycle_momentum=False),
    )


def test_warmup_equals_torch_sequential() -> None:
    warmup = 20

    def factory(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        fall = lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS - warmup)
        return lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])

    ours = build(Cosine(warmup_steps=warmup))
    assert_same(ours, factory)
    assert ours(0) == 1 / warmup
    assert ours(warmup - 1) == ours(warmup) == 1.0


def test_warmup_of_zero_and_one_step() -> None:
    cosine = build(Cosine(), 10)
    assert with_warmup(cosine, 0) is cosine
    assert [with_warmup(cosine, 1)(step) for step in range(3)] == [1.0, cosine(0), cosine(1)]


def test_warmup_stable_decay_equals_torch_sequential() -> None:
    def factory(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
        stable = lr_scheduler.ConstantLR(optimizer, factor=1.0)
        decay = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=60)
        return lr_scheduler.SequentialLR(optimizer, [stable, decay], [NUM_STEPS - 60])

    ours = build(WarmupStableDecay(min_lr_ratio=0.1))
    assert_same(ours, factory)
    cosine = build(WarmupStableDecay(min_lr_ratio=0.1, anneal="cosine"))
    assert cosine(NUM_STEPS - 30) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        (build(Cosine(min_lr_ratio=0.1), 10), 0.1),
        (build(Linear(min_lr_ratio=0.1), 10), 0.1),
        (build(Polynomial(power=2.0, min_lr_ratio=0.1), 10), 0.1),
        (build(OneCycle(), 10), 0.0),
        (build(WarmupStableDecay(decay_ratio=0.4), 10), 0.0),
        (build(Exponential(gamma=0.5, min_lr_ratio=0.1), 10), 0.1),
    ],
)
def test_beyond_the_last_step_the_last_value_stays(schedule: Schedule, end: float) -> None:
    assert schedule(10) == pytest.approx(end)
    assert schedule(1000) == pytest.approx(end)


NEEDED: dict[str, dict[str, object]] = {
    "cosine_restarts": {"cycle_epochs": 2.0},
    "cyclic": {"cycle_epochs": 2.0},
    "multi_step": {"milestone_epochs": (3.0, 6.0)},
    "exponential": {"gamma": 0.99},
}


def config_of(name: str, **options: object) -> ScheduleConfig:
    return SCHEDULES[name](**(NEEDED.get(name, {}) | options))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_name_builds_a_schedule_in_range(name: str) -> None:
    schedule = build(config_of(name), 100, 10.5)
    values = [schedule(step) for step in range(100)]
    assert all(0 <= value <= 1 for value in values)
    assert max(values) == pytest.approx(1.0, abs=0.05)


def test_epochs_become_steps_after_the_warmup() -> None:
    config = config_of("multi_step", warmup_epochs=0.5, milestone_epochs=(2.0, 4.0), gamma=0.5)
    schedule = build(config, 50, 10.0)
    # milestones count from step 0 of the run
    assert [schedule(step) for step in (0, 4, 5, 19, 20, 39, 40, 49)] == [0.2, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_shapes_after_the_warmup_use_the_remaining_steps() -> None:
    schedule = build(Cosine(warmup_steps=20), 120)
    assert schedule(20) == 1.0
    assert schedule(70) == pytest.approx(0.5)
    assert schedule(120) == pytest.approx(0.0)


def test_decay_ratio_is_a_share_of_the_whole_run() -> None:
    config = config_of("warmup_stable_decay", warmup_steps=10)
    schedule = build(config, 100, 10.0)
    assert schedule(80) == 1.0
    assert schedule(90) == pytest.approx(0.5)


def test_cycle_epochs_are_rounded_to_an_even_number_of_steps() -> None:
    schedule = build(config_of("cyclic", cycle_epochs=0.5), 100, 10.5)
    assert [schedule(step) for step in (0, 3, 6)] == [0.0, 1.0, 0.0]


def test_options_reach_the_shape() -> None:
    config = config_of("one_cycle", warmup_ratio=0.5, initial_lr_ratio=0.5, min_lr_ratio=0.25, anneal="linear")
    schedule = build(config, 12, 1.0)
    assert [schedule(step) for step in (0, 5, 11)] == [0.5, 1.0, 0.25]
    config = config_of("cyclic", cycle_steps=4, cycle_epochs=None, cycle_mode="exp_range", gamma=0.5, min_lr_ratio=0.2)
    schedule = build(config, 12, 1.0)
    assert [schedule(step) for step in (0, 2, 6)] == pytest.approx([0.2, 0.2 + 0.8 / 4, 0.2 + 0.8 / 64])


def fixed(message: str) -> str:
    return next(line for line in message.splitlines() if line.startswith("  type:"))


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        (config_of("cosine", warmup_steps=50), "--schedule.warmup-steps 5"),
        (config_of("cosine", warmup_epochs=7.0), "--schedule.warmup-epochs 0.5"),
        (config_of("multi_step", milestone_epochs=(2.0, 5.0)), "--schedule.milestone-epochs 2.5"),
        (config_of("multi_step", milestone_epochs=None, milestones=(50, 60)), "--schedule.milestones 25"),
        (config_of("multi_step", warmup_steps=30, milestone_epochs=(2.0, 4.0)), "--schedule.milestone-epochs 4"),
        (config_of("warmup_stable_decay", warmup_steps=20, decay_ratio=0.8), "--schedule.decay-ratio 0.6"),
    ],
)
def test_what_does_not_fit_the_run_names_what_does(config: ScheduleConfig, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(config, 50, 10.0)
    assert fix in fixed(str(caught.value))
    flag, value = fix.removeprefix("--schedule.").replace("-", "_").split()
    number = float(value) if "epochs" in flag or "ratio" in flag else int(value)
    build(replace(config, **{flag: (number,) if "milestone" in flag else number}), 50)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("seed", range(5))
def test_plateau_equals_torch(mode: str, seed: int) -> None:
    draw = random.Random(seed)
    options = {"patience": draw.randrange(5), "threshold": draw.choice([0.0, 1e-4, 0.05])}
    gamma, minimum = draw.choice([0.1, 0.5]), draw.choice([0.0, 0.02])
    optimizer = make_optimizer()
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, mode, gamma, min_lr=minimum, eps=0, **options)  # type: ignore[arg-type]
    ours = Plateau(gamma=gamma, min_lr_ratio=minimum, metric_mode=mode, **options).tracker()  # type: ignore[arg-type]
    value = 1.0
    for step in range(300):
        value = math.nan if step % 97 == 50 else draw.uniform(-0.2, 1.0) + math.exp(-step / 50)
        ours.update(value)
        theirs.step(value)
        assert ours.factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=0)
    assert ours.factor < 1


def test_plateau_continues_from_its_state() -> None:
    values = [random.Random(3).uniform(0, 1) for _ in range(60)]
    whole, first, second = (Plateau(gamma=0.5, patience=2).tracker() for _ in range(3))
    first.load_state_dict(Plateau().tracker().state_dict())
    for value in values:
        whole.update(value)
    for value in values[:23]:
        first.update(value)
    second.load_state_dict(first.state_dict())
    for value in values[23:]:
        second.update(value)
    assert second.state_dict() == whole.state_dict()
    assert set(Plateau().tracker().state_dict()) == {"factor", "num_bad", "rule"}


def test_the_plateau_tracker_takes_the_options() -> None:
    assert Cosine().tracker() is None
    plateau = Plateau(gamma=0.5, patience=0, min_lr_ratio=0.3, metric_mode="max").tracker()
    for value in (1.0, 1.0, 0.0):
        plateau.update(value)
    assert plateau.factor == 0.3
    schedule = build(config_of("plateau", warmup_steps=4), 10, 1.0)
    assert [schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_needs_no_torch() -> None:
    code = "import sys, distkit.config, distkit.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
