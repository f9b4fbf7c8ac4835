"""zero1, zero2, zero3: what only they have, against one process; what they leave of the process they run in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from strategy_runs import BASES, ZERO, build, differences, needs_deepspeed, on_ranks
from torch import Tensor

from distkit.config import OptimConfig, TrainConfig, ZeroConfig
from distkit.engine.train_step import train_step
from distkit.errors import ConfigError, NonFiniteError
from distkit.runtime.shards import local_part, whole

pytestmark = needs_deepspeed
TOLERANCE = 1e-5


@pytest.mark.distributed
@pytest.mark.slow
def test_weighted_losses_offloading_averages_and_other_optimizers(tmp_path: Path) -> None:
    base = replace(BASES["mlp"], report_every=1, eval_every=7, ema_decay=0.9)
    changes: dict[str, dict[str, object]] = {
        "weighted": {"weighted": True, "max_grad_norm": 0.3, "microbatch_size": 2},
        "value": {"max_grad_value": 0.05},
        "asgd": {"optim": OptimConfig(name="asgd", lr=0.1)},
        "nadam": {"optim": OptimConfig(name="nadam", lr=0.01)},
        "compile": {"compile": True, "compile_backend": "eager"},
        "offload": {"zero": ZeroConfig(offload="optimizer"), "max_grad_norm": 0.3},
    }
    configs = {n: replace(base, **{k: v for k, v in c.items() if k != "zero"}) for n, c in changes.items()}  # type: ignore[arg-type]
    single = on_ranks(1, tmp_path / "1", {n: replace(c, microbatch_size=None) for n, c in configs.items()})
    zero = {
        f"{name}-{stage}": replace(config, strategy=stage, zero=changes[name].get("zero", ZeroConfig()))  # type: ignore[arg-type]
        for name, config in configs.items()
        for stage in ZERO
    }
    zero["offload-zero3"] = replace(zero["offload-zero3"], zero=ZeroConfig(offload="parameters"))
    for name, run in on_ranks(2, tmp_path / "2", zero).items():
        expected = single[name.partition("-")[0]]
        assert max(differences(run, expected)) < TOLERANCE, name
        assert run.last["loss"] == pytest.approx(expected.last["loss"], abs=TOLERANCE), name


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_after_zero3_is_as_one_before(tmp_path: Path) -> None:
    base = replace(BASES["gpt"], num_steps=5, report_every=1)
    order = [("ddp", "ddp"), ("zero2", "zero2"), ("zero3", "zero3"), ("ddp again", "ddp"), ("zero2 again", "zero2")]
    ended = on_ranks(2, tmp_path, {name: replace(base, strategy=strategy) for name, strategy in order})  # type: ignore[arg-type]
    # zero3 computes with a linear of its own
    assert ended["zero3"].digest != ended["zero2"].digest
    for name in ("ddp", "zero2"):
        assert ended[f"{name} again"].digest == ended[name].digest, name


def bad_gradient(folder: str, config: TrainConfig, rank: int, value: float) -> tuple[str, float, bool]:
    """One step in which a gradient of one rank alone is not finite: what was raised, skipped updates, weights kept."""
    run = build(folder, config)
    strategy = run.strategy
    honest = strategy.backward
    before = {name: whole(tensor.detach()).clone() for name, tensor in strategy.model_tensors().items()}

    def backward(loss: Tensor) -> None:
        honest(loss)
        if run.runtime.rank == rank:
            local_part(strategy.gradients()[-1]).view(-1)[0] = value

    strategy.backward = backward  # type: ignore[method-assign]
    raised = ""
    try:
        train_step(run)
    except NonFiniteError as error:
        raised = str(error)
    kept = all(torch.equal(before[name], whole(t.detach())) for name, t in strategy.model_tensors().items())
    skipped = strategy.skipped.item()
    run.runtime.close()
    return raised, skipped, kept


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ZERO)
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_all_ranks_skip_what_overflows_on_one(stage: str, optim: str, tmp_path: Path) -> None:
    config = replace(BASES["gpt"], strategy=stage, precision="fp16", max_grad_norm=1.0,  # type: ignore[arg-type]
                     optim=OptimConfig(name=optim, lr=0.1))  # type: ignore[arg-type]  # fmt: skip
    assert run_ranks(bad_gradient, 2, str(tmp_path), config, 1, float("inf")) == [("", 1.0, True)] * 2


@pytest.mark.distributed
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_zero3_says_that_a_gradient_is_not_finite(value: float, tmp_path: Path) -> None:
    config = replace(BASES["gpt"], strategy="zero3")
    for raised, _, kept in run_ranks(bad_gradient, 2, str(tmp_path), config, 0, value):
        assert "a gradient became NaN or infinite" in raised
        assert kept


def engine_settings(folder: str, config: TrainConfig) -> dict[str, object]:
    """What DeepSpeed itself goes by, after two steps."""
    run = build(folder, config)
    for _ in range(2):
        train_step(run)
    engine = run.strategy.engine  # type: ignore[attr-defined]
    found = {
        "reduce_bucket_size": engine.optimizer.reduce_bucket_size,
        "allgather_bucket_size": engine.zero_allgather_bucket_size(),
        "batch": (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()),
        "accum_steps": engine.gradient_accumulation_steps(),
        "clipping": engine.gradient_clipping(),
        "stage": engine.zero_optimization_stage(),
        "wall_clock_breakdown": engine.wall_clock_breakdown(),
    }
    run.runtime.close()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_users_configuration_takes_effect(stage: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    own = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 777, "allgather_bucket_size": "auto"},
    }
    file.write_text(json.dumps(own))
    config = replace(BASES["gpt"], strategy=stage, microbatch_size=2, max_grad_norm=0.5, zero=ZeroConfig(config=file))  # type: ignore[arg-type]
    for found in run_ranks(engine_settings, 2, str(tmp_path / "run"), config):
        assert found["reduce_bucket_size"] == 777
        assert found["wall_clock_breakdown"] is True
        # "auto" is what the run says
        assert found["batch"] == (8, 2)
        assert (found["accum_steps"], found["stage"]) == (2, int(stage[-1]))
        assert found["allgather_bucket_size"] == 13_420  # all parameters, where there are few
        # the strategy clips
        assert found["clipping"] == 0.0


def refused(folder: str, config: TrainConfig) -> str:
    try:
        build(folder, config)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"zero_optimization": {"reduce_bucket": 5}}, ("zero_optimization.reduce_bucket", "Extra inputs")),
        ({"zero_optimization": {"reduce_bucket_size": "much"}}, ("zero_optimization.reduce_bucket_size", "much")),
        ({"train_batch_size": 9}, ("train_batch_size", "--global-batch-size 9")),
    ],
)
def test_what_a_users_configuration_cannot_say_is_a_configuration_error(
    own: dict[str, object], says: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(own))
    config = replace(BASES["gpt"], strategy="zero2", zero=ZeroConfig(config=file))
    for message in run_ranks(refused, 2, str(tmp_path / "run"), config):
        for part in (*says, "--zero.config"):
            assert part in message
