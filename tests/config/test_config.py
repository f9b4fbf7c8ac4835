"""Configurations: valid by default, frozen, documented field by field, and every refusal says what to type."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

import distkit.config as config
import distkit.config.optim as optim_module
import distkit.config.schedule as schedule_module
import distkit.config.train as train_module
from distkit.config import (
    LBFGS,
    OPTIMIZERS,
    SCHEDULES,
    DataConfig,
    DebugConfig,
    ObserveConfig,
    OptimConfig,
    TrainConfig,
    fill_defaults,
    from_values,
    ranks_that_fit,
    reset_for_debugging,
    split_batch,
    to_json,
)
from distkit.config.choice import Choice, carry_over, describe
from distkit.config.strategy import TAKEN_BY
from distkit.errors import ConfigError

MODULES = (optim_module, schedule_module, train_module)
CONFIGS = (DataConfig, DebugConfig, ObserveConfig, *OPTIMIZERS.values(), config.Cosine, TrainConfig)


def make_config(**options: object) -> TrainConfig:
    return TrainConfig(**({"num_steps": 10} | options))  # type: ignore[arg-type]


# --- shape


@pytest.mark.parametrize("kind", CONFIGS)
def test_defaults_are_valid_and_frozen(kind: type) -> None:
    made = make_config() if kind is TrainConfig else kind()
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)
    assert made == (make_config() if kind is TrainConfig else kind())


@pytest.mark.parametrize("kind", CONFIGS)
def test_fields_are_keyword_only(kind: type) -> None:
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in inspect.signature(kind).parameters.values())


def undocumented(module: ModuleType) -> list[str]:
    """The fields of the classes in `module` that no docstring follows."""
    found = []
    for node in ast.parse(inspect.getsource(module)).body:
        if not (isinstance(node, ast.ClassDef) and (node.bases or node.name.endswith("Config"))):
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


def test_every_fact_about_an_optimizer_is_read() -> None:
    """And no other module has a table of optimizers by name."""
    own = Path(optim_module.__file__)
    package = {path: path.read_text() for path in own.parents[1].rglob("*.py") if path != own}
    facts = [name for name, kind in OptimConfig.__annotations__.items() if kind.startswith("ClassVar")]
    assert "takes_shards" in facts
    assert [fact for fact in facts if not any(f".{fact}" in text for text in package.values())] == []
    tables = [
        path for path, text in package.items() if re.search(r'optim\.name (not )?in [({\[A-Z]|optim\.name == "', text)
    ]
    assert tables == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_are_those_of_torch(name: str) -> None:
    row = OPTIMIZERS[name]
    module, _, class_name = row.torch_class.rpartition(".")
    arguments = inspect.signature(getattr(importlib.import_module(module), class_name)).parameters
    for field in dataclasses.fields(row):
        if field.name not in ("lr", "weight_decay", "decay_all") and name != "muon":
            assert arguments[row.renamed.get(field.name, field.name)].default == field.default, field.name
    assert ("weight_decay" in arguments) == row.has_weight_decay


def test_debug_mode_resets_what_only_changes_how_a_step_is_executed() -> None:
    config = make_config(strategy="fsdp", deterministic=False, compile=True, compile_mode="max-autotune", seed=3)
    assert reset_for_debugging(config) == make_config(seed=3)
    # a new option of compilation or of a strategy is not forgotten
    reset = {field.name for field in dataclasses.fields(TrainConfig) if field.metadata.get("reset_by_debug")}
    assert reset >= {name for name in TrainConfig.__dataclass_fields__ if name.startswith("compile")}
    assert reset >= {"strategy", *TAKEN_BY}


# --- refusals

Make = Callable[[], object]
WRONG: list[tuple[str, Make]] = [
    ("--on-nan", lambda: make_config(on_nan="ignore")),
    ("--on-nan skip", lambda: make_config(max_skips=3)),
    ("--max-skips", lambda: make_config(on_nan="skip", max_skips=0)),
    ("--on-nan raise", lambda: make_config(on_nan="skip", optim=config.LBFGS())),
    ("--on-nan skip", lambda: make_config(on_nan="rollback", checkpoint=config.CheckpointConfig(enabled=False))),
    ("--optim.name", lambda: from_values(OPTIMIZERS, {"name": "adamv"})),
    ("--optim.lr", lambda: config.SGD(lr=0)),
    ("--optim.lr", lambda: config.SGD(lr=float("nan"))),
    ("--optim.lr", lambda: config.SGD(lr=float("inf"))),
    ("--optim.weight-decay", lambda: config.SGD(weight_decay=-1e-4)),
    ("--optim.weight-decay", lambda: config.Rprop(weight_decay=0.1)),
    ("--optim.momentum", lambda: config.SGD(momentum=1.0)),
    ("--optim.momentum", lambda: config.SGD(nesterov=True)),
    ("--optim.momentum", lambda: config.SGD(nesterov=True, momentum=0.9, dampening=0.1)),
    ("--optim.dampening", lambda: config.SGD(momentum=0.9, dampening=1.5)),
    ("--optim.betas", lambda: config.Adam(betas=(0.9, 1.0))),
    ("--optim.eps", lambda: config.Adam(eps=0)),
    ("--optim.alpha", lambda: config.RMSprop(alpha=0)),
    ("--optim.momentum-decay", lambda: config.NAdam(momentum_decay=-1)),
    ("--optim.etas", lambda: config.Rprop(etas=(1.5, 0.5))),
    ("--optim.step-sizes", lambda: config.Rprop(step_sizes=(50, 1e-6))),
    ("--optim.rho", lambda: config.Adadelta(rho=1.1)),
    ("--optim.beta2-decay", lambda: config.Adafactor(beta2_decay=0.8)),
    ("--optim.clip-threshold", lambda: config.Adafactor(clip_threshold=0.5)),
    ("--optim.ns-steps", lambda: config.Muon(ns_steps=100)),
    ("--optim.max-iter", lambda: config.LBFGS(max_iter=0)),
    ("--optim.history-size", lambda: config.LBFGS(history_size=0)),
    ("--optim.tolerance-change", lambda: config.LBFGS(tolerance_change=-1)),
    ("--schedule.name", lambda: from_values(SCHEDULES, {"name": "cosin"})),
    ("--schedule.warmup-epochs", lambda: config.Cosine(warmup_steps=5, warmup_epochs=1)),
    ("--schedule.warmup-steps", lambda: config.Cosine(warmup_steps=-1)),
    ("--schedule.min-lr-ratio", lambda: config.Cosine(min_lr_ratio=1.5)),
    ("--schedule.cycle-epochs", lambda: config.CosineRestarts()),
    ("--schedule.cycle-epochs", lambda: config.Cyclic(cycle_steps=4, cycle_epochs=1)),
    ("--schedule.cycle-steps", lambda: config.Cyclic(cycle_steps=7)),
    ("--schedule.cycle-growth", lambda: config.CosineRestarts(cycle_steps=7, cycle_growth=0)),
    ("--schedule.milestone-epochs", lambda: config.MultiStep()),
    ("--schedule.milestones", lambda: config.MultiStep(milestones=(20, 10))),
    ("--schedule.gamma", lambda: config.MultiStep(milestones=(10,), gamma=0)),
    ("--schedule.gamma", lambda: from_values(SCHEDULES, {"name": "exponential"})),
    ("--schedule.gamma", lambda: config.Cyclic(cycle_steps=4, gamma=0.9)),
    ("--schedule.gamma 0.9999", lambda: config.Cyclic(cycle_steps=4, cycle_mode="exp_range")),
    ("--schedule.power", lambda: config.Polynomial(power=0)),
    ("--schedule.warmup-ratio", lambda: config.OneCycle(warmup_ratio=1.0)),
    ("--schedule.initial-lr-ratio", lambda: config.OneCycle(initial_lr_ratio=0)),
    ("--schedule.decay-ratio", lambda: config.WarmupStableDecay(decay_ratio=0)),
    ("--schedule.patience", lambda: config.Plateau(patience=-1)),
    ("--schedule.threshold", lambda: config.Plateau(threshold=-1)),
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
    ("--precision", lambda: make_config(precision="fp16", optim=LBFGS())),
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
        from_values(OPTIMIZERS, {"name": "adam-w"})
    with pytest.raises(ConfigError, match=r"type: +--schedule\.name multi_step$"):
        from_values(SCHEDULES, {"name": "multistep"})


EACH = [(table, name) for table in (OPTIMIZERS, SCHEDULES) for name in table]


@pytest.mark.parametrize(("table", "name"), EACH, ids=[name for _, name in EACH])
def test_a_class_refuses_what_it_does_not_take_and_names_those_that_do(
    table: Mapping[str, type[Choice]], name: str
) -> None:
    section = table[name].section
    taken = {other: {field.name for field in dataclasses.fields(kind)} for other, kind in table.items()}
    for field in set().union(*taken.values()) - taken[name]:
        option = f"--{section}." + field.replace("_", "-")
        with pytest.raises(ConfigError, match=rf"--{section}\.name {name} does not take {option}\n") as caught:
            from_values(table, {"name": name, field: 1})
        fix = str(caught.value).splitlines()[-1]
        assert fix.endswith(f"leave out {option}")
        assert all((re.search(rf"\b{other}\b", fix) is not None) == (field in taken[other]) for other in table)


NEEDED = {
    "cosine_restarts": {"cycle_epochs": 2.0},
    "cyclic": {"cycle_epochs": 2.0},
    "multi_step": {"milestone_epochs": [3.0, 6.0]},
    "exponential": {"gamma": 0.99},
}


def become(table: Mapping[str, type[Choice]], made: Choice, name: str) -> Choice:
    """The class called `name`, with what `made` was told and the class takes."""
    return from_values(table, {"name": name, **carry_over(type(made), dataclasses.asdict(made), table[name])})


@pytest.mark.parametrize(("table", "name"), EACH, ids=[name for _, name in EACH])
def test_config_json_gives_the_same_back_also_with_null_for_defaults(
    table: Mapping[str, type[Choice]], name: str
) -> None:
    made = from_values(table, {"name": name, **NEEDED.get(name, {})})
    assert from_values(table, json.loads(json.dumps(describe(made)))) == made
    # a config.json of old held the fields of all classes
    every = {field.name for kind in table.values() for field in dataclasses.fields(kind)}
    assert from_values(table, {**dict.fromkeys(every), "name": name, **NEEDED.get(name, {})}) == made
    for other in table:
        if other not in NEEDED:
            replaced = become(table, made, other)
            assert replaced.name == other
            for field in dataclasses.fields(replaced):
                # a default of one class is nothing to say to the next
                said = field.name in NEEDED.get(name, {})
                assert getattr(replaced, field.name) == (getattr(made, field.name) if said else field.default)


def test_another_class_keeps_what_both_have() -> None:
    before = config.SGD(lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.1)
    assert become(OPTIMIZERS, before, "rmsprop") == config.RMSprop(lr=0.3, momentum=0.8, weight_decay=0.1)
    assert become(OPTIMIZERS, before, "sgd") == before


def test_null_in_a_saved_configuration_is_no_change() -> None:
    now = to_json(make_config())
    flat = {field.name for kind in OPTIMIZERS.values() for field in dataclasses.fields(kind)}
    saved = {**now, "optim": {**dict.fromkeys(flat), "name": "sgd", "lr": 0.1, "weight_decay": 0.0, "decay_all": False}}
    assert fill_defaults(saved) == now


def test_a_base_class_says_that_it_is_one() -> None:
    with pytest.raises(TypeError, match="base class"):
        OptimConfig()


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
        (100, None, 8, "--global-batch-size 96"),
        (128, 48, 1, "--global-batch-size 96 or --microbatch-size 32"),
        (4, None, 8, "--global-batch-size 8, or start at most 4 ranks"),
    ],
)
def test_the_nearest_batch_sizes(total: int, microbatch: int | None, world_size: int, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_batch(make_config(global_batch_size=total, microbatch_size=microbatch), world_size)
    assert str(caught.value).splitlines()[-1] == f"  type:     {fix}"


@given(total=st.integers(1, 500), microbatch=st.one_of(st.none(), st.integers(1, 60)), near=st.integers(1, 64))
def test_numbers_of_ranks_that_fit(total: int, microbatch: int | None, near: int) -> None:
    config = make_config(global_batch_size=total, microbatch_size=microbatch)
    for ranks in ranks_that_fit(config, near):
        assert_exact(config, ranks)
    assert microbatch is not None or ranks_that_fit(config, total + 1) == [total]


def test_the_nearest_numbers_of_ranks() -> None:
    assert ranks_that_fit(make_config(global_batch_size=8), 3) == [2, 4]
    assert ranks_that_fit(make_config(global_batch_size=24, microbatch_size=4), 4) == [3, 6]
    assert ranks_that_fit(make_config(global_batch_size=8, microbatch_size=3), 2) == []


def test_accumulation_is_derived() -> None:
    split = split_batch(make_config(global_batch_size=96, microbatch_size=8), 4)
    assert (split.accum_steps, split.microbatch_size) == (3, 8)
