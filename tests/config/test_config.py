"""Configurations: valid by default, frozen, documented field by field, and every refusal says what to type."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

import distkit.config.optim as optim_module
import distkit.config.schedule as schedule_module
import distkit.config.train as train_module
from distkit.config import (
    OPTIMIZERS,
    SCHEDULES,
    DataConfig,
    DebugConfig,
    ObserveConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    split_batch,
)
from distkit.errors import ConfigError

MODULES = (optim_module, schedule_module, train_module)
CONFIGS = (DataConfig, DebugConfig, ObserveConfig, OptimConfig, ScheduleConfig, TrainConfig)


def make_config(**options: object) -> TrainConfig:
    return TrainConfig(**({"num_steps": 10} | options))  # type: ignore[arg-type]


# --- shape


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_are_valid_and_frozen(config: type) -> None:
    made = make_config() if config is TrainConfig else config()
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)
    assert made == (make_config() if config is TrainConfig else config())


@pytest.mark.parametrize("config", CONFIGS)
def test_fields_are_keyword_only(config: type) -> None:
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in inspect.signature(config).parameters.values())


def undocumented(module: ModuleType) -> list[str]:
    """The fields of the configuration classes in `module` that no docstring follows."""
    found = []
    for node in ast.parse(inspect.getsource(module)).body:
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                )
                if not (isinstance(text, str) and text.strip()):
                    found.append(f"{node.name}.{ast.unparse(field.target)}")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_field_is_documented(module: ModuleType) -> None:
    assert undocumented(module) == []


def test_the_documentation_test_finds_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'class AConfig:\n    a: int = 1\n    """Yes."""\n    b: int = 2\n    c: int = 3\n'
    monkeypatch.setattr(inspect, "getsource", lambda module: source)
    assert undocumented(optim_module) == ["AConfig.b", "AConfig.c"]


def test_every_name_has_a_row_of_options() -> None:
    assert set(optim_module.TAKES) == set(OPTIMIZERS)
    assert set(schedule_module.TAKES) == set(SCHEDULES)
    optim_fields = {field.name for field in dataclasses.fields(OptimConfig)}
    schedule_fields = {field.name for field in dataclasses.fields(ScheduleConfig)}
    assert frozenset().union(*optim_module.TAKES.values()) <= optim_fields
    # every optional field belongs to some name
    always = {"name", "lr", "weight_decay", "decay_all"}
    assert frozenset().union(*optim_module.TAKES.values()) == optim_fields - always
    taken = frozenset().union(*schedule_module.TAKES.values(), schedule_module.WARMUP)
    assert taken == schedule_fields - {"name"}


# --- refusals

Make = Callable[[], object]
OPTIM = OptimConfig
SCHEDULE = ScheduleConfig
WRONG: list[tuple[str, Make]] = [
    ("--optim.name", lambda: OPTIM(name="adamv")),  # type: ignore[arg-type]
    ("--optim.lr", lambda: OPTIM(lr=0)),
    ("--optim.lr", lambda: OPTIM(lr=float("nan"))),
    ("--optim.lr", lambda: OPTIM(lr=float("inf"))),
    ("--optim.weight-decay", lambda: OPTIM(weight_decay=-1e-4)),
    ("--optim.weight-decay", lambda: OPTIM(name="rprop", weight_decay=0.1)),
    ("--optim.momentum", lambda: OPTIM(momentum=1.0)),
    ("--optim.momentum", lambda: OPTIM(nesterov=True)),
    ("--optim.momentum", lambda: OPTIM(nesterov=True, momentum=0.9, dampening=0.1)),
    ("--optim.dampening", lambda: OPTIM(momentum=0.9, dampening=1.5)),
    ("--optim.betas", lambda: OPTIM(name="adam", betas=(0.9, 1.0))),
    ("--optim.eps", lambda: OPTIM(name="adam", eps=0)),
    ("--optim.alpha", lambda: OPTIM(name="rmsprop", alpha=0)),
    ("--optim.momentum-decay", lambda: OPTIM(name="nadam", momentum_decay=-1)),
    ("--optim.etas", lambda: OPTIM(name="rprop", etas=(1.5, 0.5))),
    ("--optim.step-sizes", lambda: OPTIM(name="rprop", step_sizes=(50, 1e-6))),
    ("--optim.rho", lambda: OPTIM(name="adadelta", rho=1.1)),
    ("--optim.beta2-decay", lambda: OPTIM(name="adafactor", beta2_decay=0.8)),
    ("--optim.clip-threshold", lambda: OPTIM(name="adafactor", clip_threshold=0.5)),
    ("--optim.ns-steps", lambda: OPTIM(name="muon", ns_steps=100)),
    ("--optim.max-iter", lambda: OPTIM(name="lbfgs", max_iter=0)),
    ("--optim.history-size", lambda: OPTIM(name="lbfgs", history_size=0)),
    ("--optim.tolerance-change", lambda: OPTIM(name="lbfgs", tolerance_change=-1)),
    ("--schedule.name", lambda: SCHEDULE(name="cosin")),  # type: ignore[arg-type]
    ("--schedule.warmup-epochs", lambda: SCHEDULE(warmup_steps=5, warmup_epochs=1)),
    ("--schedule.warmup-steps", lambda: SCHEDULE(warmup_steps=-1)),
    ("--schedule.min-lr-ratio", lambda: SCHEDULE(min_lr_ratio=1.5)),
    ("--schedule.cycle-epochs", lambda: SCHEDULE(name="cosine_restarts")),
    ("--schedule.cycle-epochs", lambda: SCHEDULE(name="cyclic", cycle_steps=4, cycle_epochs=1)),
    ("--schedule.cycle-steps", lambda: SCHEDULE(name="cyclic", cycle_steps=7)),
    ("--schedule.cycle-growth", lambda: SCHEDULE(name="cosine_restarts", cycle_steps=7, cycle_growth=0)),
    ("--schedule.milestone-epochs", lambda: SCHEDULE(name="multi_step")),
    ("--schedule.milestones", lambda: SCHEDULE(name="multi_step", milestones=(20, 10))),
    ("--schedule.gamma", lambda: SCHEDULE(name="multi_step", milestones=(10,), gamma=0)),
    ("--schedule.gamma", lambda: SCHEDULE(name="exponential")),
    ("--schedule.gamma", lambda: SCHEDULE(name="cyclic", cycle_steps=4, gamma=0.9)),
    ("--schedule.gamma 0.9999", lambda: SCHEDULE(name="cyclic", cycle_steps=4, cycle_mode="exp_range")),
    ("--schedule.power", lambda: SCHEDULE(name="polynomial", power=0)),
    ("--schedule.warmup-ratio", lambda: SCHEDULE(name="one_cycle", warmup_ratio=1.0)),
    ("--schedule.initial-lr-ratio", lambda: SCHEDULE(name="one_cycle", initial_lr_ratio=0)),
    ("--schedule.decay-ratio", lambda: SCHEDULE(name="warmup_stable_decay", decay_ratio=0)),
    ("--schedule.patience", lambda: SCHEDULE(name="plateau", patience=-1)),
    ("--schedule.threshold", lambda: SCHEDULE(name="plateau", threshold=-1)),
    ("--seed", lambda: make_config(seed=-1)),
    ("--num-epochs", lambda: make_config(num_steps=None)),
    ("--num-epochs", lambda: make_config(num_epochs=1.0)),
    ("--num-steps", lambda: make_config(num_steps=0)),
    ("--precision", lambda: make_config(precision="fp64")),
    ("--global-batch-size", lambda: make_config(global_batch_size=0)),
    ("--microbatch-size", lambda: make_config(microbatch_size=0)),
    ("--eval-batch-size", lambda: make_config(eval_batch_size=0)),
    ("--report-every", lambda: make_config(report_every=0)),
    ("--num-threads", lambda: make_config(num_threads=0)),
    ("--max-grad-norm", lambda: make_config(max_grad_norm=0.0)),
    ("--max-grad-value", lambda: make_config(max_grad_norm=1.0, max_grad_value=1.0)),
    ("--ema-decay", lambda: make_config(ema_decay=1.0)),
    ("--timeout-seconds", lambda: make_config(timeout_seconds=0.0)),
    ("--precision", lambda: make_config(precision="fp16", optim=OptimConfig(name="lbfgs"))),
    ("--debug.num-steps", lambda: DebugConfig(num_steps=0)),
    ("--debug.overfit-batches", lambda: DebugConfig(overfit_batches=0)),
]


@pytest.mark.parametrize(("flag", "make"), WRONG, ids=[f"{i}{flag}" for i, (flag, _) in enumerate(WRONG)])
def test_wrong_values_say_what_to_type(flag: str, make: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    lines = str(caught.value).splitlines()
    assert len(lines) < 10
    assert all(len(line) < 240 for line in lines)
    assert lines[-1].startswith("  type:")
    assert flag in lines[-1]
    assert caught.value.exit_code == 2


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"type: +--optim\.name adamw$"):
        OptimConfig(name="adam-w")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"type: +--schedule\.name multi_step$"):
        ScheduleConfig(name="multistep")  # type: ignore[arg-type]


def a_value(name: str) -> object:
    """Some value that is set; which one does not matter, for it is refused before its range is looked at."""
    return (0.5, 1.5) if name in ("betas", "etas", "step_sizes") else 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_refuses_what_it_does_not_take(name: str) -> None:
    for field in dataclasses.fields(OptimConfig):
        if field.default is not None or field.name in optim_module.TAKES[name]:
            continue
        option = "--optim." + field.name.replace("_", "-")
        with pytest.raises(ConfigError, match=rf"--optim\.name {name} does not take {option}\n") as caught:
            OptimConfig(name=name, **{field.name: a_value(field.name)})  # type: ignore[arg-type]
        assert str(caught.value).endswith(f"{option} None")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_refuses_what_it_does_not_take(name: str) -> None:
    warmup = frozenset() if name in schedule_module.OWN_WARMUP else schedule_module.WARMUP
    for field in dataclasses.fields(ScheduleConfig):
        if field.default is not None or field.name in schedule_module.TAKES[name] | warmup:
            continue
        option = "--schedule." + field.name.replace("_", "-")
        with pytest.raises(ConfigError, match=rf"--schedule\.name {name} does not take {option}\n") as caught:
            ScheduleConfig(name=name, **{field.name: 1})  # type: ignore[arg-type]
        assert str(caught.value).endswith(f"{option} None")


# --- the cut of a global batch


@given(
    total=st.integers(1, 5000),
    microbatch=st.one_of(st.none(), st.integers(1, 600)),
    world_size=st.integers(1, 64),
)
def test_a_global_batch_divides_exactly_or_the_error_names_sizes_that_do(
    total: int, microbatch: int | None, world_size: int
) -> None:
    config = make_config(global_batch_size=total, microbatch_size=microbatch)
    refusal = ""
    try:
        split = split_batch(config, world_size)
    except ConfigError as error:
        refusal = str(error)
    if not refusal:
        assert_exact(config, world_size)
        assert microbatch in (None, split.microbatch_size)
        assert microbatch is not None or split.accum_steps == 1
        return
    *others, fix = refusal.splitlines()
    assert len(others) < 9
    sizes = [int(size) for size in re.findall(r"--global-batch-size (\d+)", fix)]
    assert sizes
    for size in sizes:
        assert_exact(dataclasses.replace(config, global_batch_size=size, microbatch_size=microbatch), world_size)
    for size in re.findall(r"--microbatch-size (\d+)", fix):
        assert_exact(dataclasses.replace(config, microbatch_size=int(size)), world_size)


def assert_exact(config: TrainConfig, world_size: int) -> None:
    split = split_batch(config, world_size)
    assert split.accum_steps >= 1
    assert split.accum_steps * split.microbatch_size * world_size == config.global_batch_size == split.global_batch_size


@pytest.mark.parametrize(
    ("total", "microbatch", "world_size", "fix"),
    [
        (100, None, 8, "--global-batch-size 96 or --global-batch-size 104"),
        (128, 48, 1, "--global-batch-size 96 or --global-batch-size 144 or --microbatch-size 32"),
        (4, None, 8, "--global-batch-size 8, or start at most 4 ranks"),
    ],
)
def test_the_nearest_batch_sizes(total: int, microbatch: int | None, world_size: int, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_batch(make_config(global_batch_size=total, microbatch_size=microbatch), world_size)
    assert str(caught.value).splitlines()[-1] == f"  type:     {fix}"


def test_accumulation_is_derived() -> None:
    split = split_batch(make_config(global_batch_size=96, microbatch_size=8), 4)
    assert (split.accum_steps, split.microbatch_size) == (3, 8)
