"""Every schedule equals torch's scheduler of the same name, step by step."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch.optim import SGD, Optimizer, lr_scheduler

from distkit import schedules
from distkit.config import SCHEDULES, ScheduleConfig
from distkit.errors import ConfigError
from distkit.schedules import Plateau, Schedule, build_plateau, build_schedule

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


CASES: dict[str, tuple[Schedule, TorchFactory]] = {
    "constant": (schedules.constant(), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "cosine": (schedules.cosine(NUM_STEPS), lambda o: lr_scheduler.CosineAnnealingLR(o, NUM_STEPS)),
    "cosine_min": (schedules.cosine(NUM_STEPS, 0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, NUM_STEPS, 0.1)),
    "restarts": (schedules.cosine_restarts(37), lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 37)),
    "restarts_growth": (
        schedules.cosine_restarts(20, 2, 0.05),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 20, 2, 0.05),
    ),
    "linear": (
        schedules.linear(200, 0.25),
        lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=200),
    ),
    "multi_step": (
        schedules.multi_step([10, 100, 250], 0.3),
        lambda o: lr_scheduler.MultiStepLR(o, [10, 100, 250], 0.3),
    ),
    "exponential": (schedules.exponential(0.99), lambda o: lr_scheduler.ExponentialLR(o, 0.99)),
    "polynomial": (schedules.polynomial(250), lambda o: lr_scheduler.PolynomialLR(o, 250)),
    "polynomial_2": (schedules.polynomial(NUM_STEPS, 2.0), lambda o: lr_scheduler.PolynomialLR(o, NUM_STEPS, 2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name: str) -> None:
    assert_same(*CASES[name])


@pytest.mark.parametrize("anneal", ["cosine", "linear"])
@pytest.mark.parametrize(
    ("num_steps", "warmup_ratio", "minimum"), [(300, 0.3, 4e-6), (300, 0.25, 0.0), (299, 0.1, 0.01), (2, 0.3, 0.0)]
)
def test_one_cycle_equals_torch(anneal: str, num_steps: int, warmup_ratio: float, minimum: float) -> None:
    ours = schedules.one_cycle(num_steps, warmup_ratio, 0.04, minimum, anneal)  # type: ignore[arg-type]
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
    assert schedules.one_cycle(4, 0.25)(0) == 1.0
    assert schedules.one_cycle(4, 0.25)(3) == 0.0


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_cyclic_equals_torch(mode: str, minimum: float) -> None:
    gamma = 0.995 if mode == "exp_range" else 1.0
    assert_same(
        schedules.cyclic(58, mode, gamma, minimum),  # type: ignore[arg-type]
        lambda o: lr_scheduler.CyclicLR(o, minimum, 1.0, 29, mode=mode, gamma=gamma, cycle_momentum=False),  # type: ignore[arg-type]
    )


def test_warmup_equals_torch_sequential() -> None:
    warmup = 20

    def factory(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        fall = lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS - warmup)
        return lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])

    ours = schedules.with_warmup(schedules.cosine(NUM_STEPS - warmup), warmup)
    assert_same(ours, factory)
    assert ours(0) == 1 / warmup
    assert ours(warmup - 1) == ours(warmup) == 1.0


def test_warmup_of_zero_and_one_step() -> None:
    cosine = schedules.cosine(10)
    assert schedules.with_warmup(cosine, 0) is cosine
    assert [schedules.with_warmup(cosine, 1)(step) for step in range(3)] == [1.0, cosine(0), cosine(1)]


def test_warmup_stable_decay_equals_torch_sequential() -> None:
    def factory(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
        stable = lr_scheduler.ConstantLR(optimizer, factor=1.0)
        decay = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=60)
        return lr_scheduler.SequentialLR(optimizer, [stable, decay], [NUM_STEPS - 60])

    ours = schedules.warmup_stable_decay(NUM_STEPS, 60, 0.1)
    assert_same(ours, factory)
    cosine = schedules.warmup_stable_decay(NUM_STEPS, 60, 0.1, "cosine")
    assert cosine(NUM_STEPS - 30) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        (schedules.cosine(10, 0.1), 0.1),
        (schedules.linear(10, 0.1), 0.1),
        (schedules.polynomial(10, 2.0, 0.1), 0.1),
        (schedules.one_cycle(10), 0.0),
        (schedules.warmup_stable_decay(10, 4), 0.0),
        (schedules.exponential(0.5, 0.1), 0.1),
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
    return ScheduleConfig(name=name, **(NEEDED.get(name, {}) | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_name_builds_a_schedule_in_range(name: str) -> None:
    schedule = build_schedule(config_of(name), num_steps=100, steps_per_epoch=10.5)
    values = [schedule(step) for step in range(100)]
    assert all(0 <= value <= 1 for value in values)
    assert max(values) == pytest.approx(1.0, abs=0.05)


def test_epochs_become_steps_after_the_warmup() -> None:
    config = config_of("multi_step", warmup_epochs=0.5, milestone_epochs=(2.0, 4.0), gamma=0.5)
    schedule = build_schedule(config, num_steps=50, steps_per_epoch=10.0)
    # milestones count from step 0 of the run
    assert [schedule(step) for step in (0, 4, 5, 19, 20, 39, 40, 49)] == [0.2, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_shapes_after_the_warmup_use_the_remaining_steps() -> None:
    schedule = build_schedule(ScheduleConfig(warmup_steps=20), num_steps=120, steps_per_epoch=10.0)
    assert schedule(20) == 1.0
    assert schedule(70) == pytest.approx(0.5)
    assert schedule(120) == pytest.approx(0.0)


def test_decay_ratio_is_a_share_of_the_whole_run() -> None:
    config = config_of("warmup_stable_decay", warmup_steps=10)
    schedule = build_schedule(config, num_steps=100, steps_per_epoch=10.0)
    assert schedule(80) == 1.0
    assert schedule(90) == pytest.approx(0.5)


def test_cycle_epochs_are_rounded_to_an_even_number_of_steps() -> None:
    schedule = build_schedule(config_of("cyclic", cycle_epochs=0.5), num_steps=100, steps_per_epoch=10.5)
    assert [schedule(step) for step in (0, 3, 6)] == [0.0, 1.0, 0.0]


def test_options_reach_the_shape() -> None:
    config = config_of("one_cycle", warmup_ratio=0.5, initial_lr_ratio=0.5, min_lr_ratio=0.25, anneal="linear")
    schedule = build_schedule(config, num_steps=12, steps_per_epoch=1.0)
    assert [schedule(step) for step in (0, 5, 11)] == [0.5, 1.0, 0.25]
    config = config_of("cyclic", cycle_steps=4, cycle_epochs=None, cycle_mode="exp_range", gamma=0.5, min_lr_ratio=0.2)
    schedule = build_schedule(config, num_steps=12, steps_per_epoch=1.0)
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
        build_schedule(config, num_steps=50, steps_per_epoch=10.0)
    assert fix in fixed(str(caught.value))
    flag, value = fix.removeprefix("--schedule.").replace("-", "_").split()
    number = float(value) if "epochs" in flag or "ratio" in flag else int(value)
    repaired = {**{k: v for k, v in vars(config).items() if v is not None}}
    repaired[flag] = (number,) if "milestone" in flag else number
    build_schedule(ScheduleConfig(**repaired), num_steps=50, steps_per_epoch=10.0)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("seed", range(5))
def test_plateau_equals_torch(mode: str, seed: int) -> None:
    draw = random.Random(seed)
    options = {"patience": draw.randrange(5), "threshold": draw.choice([0.0, 1e-4, 0.05])}
    gamma, minimum = draw.choice([0.1, 0.5]), draw.choice([0.0, 0.02])
    optimizer = make_optimizer()
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, mode, gamma, min_lr=minimum, eps=0, **options)  # type: ignore[arg-type]
    ours = Plateau(gamma, min_lr_ratio=minimum, metric_mode=mode, **options)  # type: ignore[arg-type]
    value = 1.0
    for step in range(300):
        value = math.nan if step % 97 == 50 else draw.uniform(-0.2, 1.0) + math.exp(-step / 50)
        ours.update(value)
        theirs.step(value)
        assert ours.factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=0)
    assert ours.factor < 1


def test_plateau_continues_from_its_state() -> None:
    values = [random.Random(3).uniform(0, 1) for _ in range(60)]
    whole, first, second = (Plateau(0.5, patience=2) for _ in range(3))
    first.load_state_dict(Plateau().state_dict())
    for value in values:
        whole.update(value)
    for value in values[:23]:
        first.update(value)
    second.load_state_dict(first.state_dict())
    for value in values[23:]:
        second.update(value)
    assert second.state_dict() == whole.state_dict()
    assert set(Plateau().state_dict()) == {"factor", "num_bad"}


def test_build_plateau_takes_the_options() -> None:
    assert build_plateau(ScheduleConfig()) is None
    plateau = build_plateau(config_of("plateau", gamma=0.5, patience=0, min_lr_ratio=0.3, metric_mode="max"))
    assert plateau is not None
    for value in (1.0, 1.0, 0.0):
        plateau.update(value)
    assert plateau.factor == 0.3
    schedule = build_schedule(config_of("plateau", warmup_steps=4), num_steps=10, steps_per_epoch=1.0)
    assert [schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_needs_no_torch() -> None:
    code = "import sys, distkit.config, distkit.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
