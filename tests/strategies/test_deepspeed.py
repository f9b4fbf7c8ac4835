"""zero1, zero2, zero3: what only they have, against one process; what they leave of the process they run in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support import tiny, tiny_gpt
from support.harness import run_ranks, run_recipe_cli
from support.strategy_runs import BASES, ZERO, CountReads, build, differences, needs_deepspeed, on_ranks
from torch import Tensor, nn

from distkit.assemble import assemble
from distkit.config import ASGD, OPTIMIZERS, NAdam, RMSprop, TrainConfig, ZeroConfig
from distkit.engine.fit import fit
from distkit.engine.train_step import train_step
from distkit.errors import ConfigError, NonFiniteError
from distkit.runtime import Topology, read_topology
from distkit.runtime.process import Runtime, start
from distkit.strategies import Strategy
from distkit.tensors.shards import local_part, whole

pytestmark = needs_deepspeed
TOLERANCE = 1e-5


@pytest.mark.distributed
@pytest.mark.slow
def test_weighted_losses_offloading_averages_and_other_optimizers(tmp_path: Path) -> None:
    base = replace(BASES["mlp"], report_every=1, eval_every=7, ema_decay=0.9)
    changes: dict[str, dict[str, object]] = {
        "weighted": {"weighted": True, "max_grad_norm": 0.3, "microbatch_size": 2},
        "value": {"max_grad_value": 0.05},
        "asgd": {"optim": ASGD(lr=0.1)},
        "nadam": {"optim": NAdam(lr=0.01)},
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


class Pair(nn.Module):
    """A block with a part, called with what needs no gradient."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(tiny.FEATURES, tiny.FEATURES)
        self.linear.bias.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def train_pairs(folder: str, frozen: bool) -> list[dict[str, Tensor]]:
    """Weights after three steps as ddp, and compiled as zero3."""

    def build_model(config: TrainConfig) -> nn.Module:
        return nn.Sequential(Pair(False), Pair(frozen), nn.Linear(tiny.FEATURES, tiny.CLASSES))

    recipe = replace(tiny.RECIPE, build_model=build_model)
    compiled = replace(BASES["mlp"], strategy="zero3", compile=True, compile_backend="aot_eager")
    runtime = start(compiled, read_topology(os.environ))
    found = []
    for config in (BASES["mlp"], compiled):
        run = assemble(recipe, replace(config, run_dir=Path(folder) / config.strategy), runtime)  # type: ignore[type-var]
        for _ in range(3):
            train_step(run)
        found.append({name: whole(t.detach()).clone() for name, t in run.strategy.model_tensors().items()})
    runtime.close()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_blocks_whose_input_needs_no_gradient(frozen: bool, tmp_path: Path) -> None:
    for ddp, zero3 in run_ranks(train_pairs, 2, str(tmp_path), frozen):
        for name, tensor in ddp.items():
            torch.testing.assert_close(zero3[name], tensor, atol=1e-6, rtol=0)


def bad_gradients(folder: str, configs: dict[str, TrainConfig], value: float) -> dict[str, tuple[str, float, bool]]:
    """One step in which a gradient of rank 1 alone is `value`: what was raised, skipped updates, weights kept."""
    runtime = start(next(iter(configs.values())), read_topology(os.environ))
    found = {}
    for name, config in configs.items():
        strategy = (run := build(f"{folder}/{name}", config, runtime)).strategy
        before = {name: whole(tensor.detach()).clone() for name, tensor in strategy.model_tensors().items()}
        strategy.backward = partial(spoiling, strategy, strategy.backward, value)  # type: ignore[method-assign]
        raised = ""
        try:
            train_step(run)
        except NonFiniteError as error:
            raised = str(error)
        kept = all(torch.equal(before[name], whole(t.detach())) for name, t in strategy.model_tensors().items())
        found[name] = (raised, strategy.skipped.item(), kept)
    runtime.close()
    return found


def spoiling(strategy: Strategy, honest: Callable[[Tensor], None], value: float, loss: Tensor) -> None:
    honest(loss)
    if strategy.runtime.rank == 1:
        local_part(strategy.gradients()[-1]).view(-1)[0] = value


@pytest.mark.distributed
@pytest.mark.slow
def test_all_ranks_skip_what_overflows_on_one(tmp_path: Path) -> None:
    base = replace(BASES["gpt"], precision="fp16", max_grad_norm=1.0)
    configs = {
        f"{stage}-{optim}": replace(base, strategy=stage, optim=OPTIMIZERS[optim](lr=0.1))  # type: ignore[arg-type]
        for stage in ZERO
        for optim in ("adamw", "sgd")
    }
    for found in run_ranks(bad_gradients, 2, str(tmp_path), configs, float("inf"), timeout=240):
        assert found == dict.fromkeys(configs, ("", 1.0, True))


def spoiled_run(folder: str, configs: dict[str, TrainConfig]) -> dict[str, tuple[int, str]]:
    """NAME -> host reads of a step, and what ended a run in whose sixth step a gradient of rank 1 is NaN."""
    runtime = start(next(iter(configs.values())), read_topology(os.environ))
    found = {}
    for name, config in configs.items():
        run = build(f"{folder}/{name}", config, runtime)
        for _ in range(4):  # stage 3 learns from the first ones in which order it gathers
            train_step(run)
        with CountReads() as count:
            train_step(run)
        if runtime.rank == 1:
            run.strategy.backward = partial(nan_once, run.strategy, run.strategy.backward)  # type: ignore[method-assign]
        try:
            fit(run)
        except NonFiniteError as error:
            found[name] = (count.reads, str(error))
        run.directory.release()
    runtime.close()
    return found


def nan_once(strategy: Strategy, honest: Callable[[Tensor], None], loss: Tensor) -> None:
    honest(loss * float("nan"))
    strategy.backward = honest  # type: ignore[method-assign]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_step_waits_for_nothing_and_a_bad_gradient_ends_the_run(tmp_path: Path) -> None:
    base = replace(BASES["gpt"], report_every=10, max_grad_norm=0.5)
    configs: dict[str, TrainConfig] = {name: replace(base, strategy=name) for name in ZERO}  # type: ignore[arg-type]
    for name, offload in (("zero1", "optimizer"), ("zero2", "optimizer"), ("zero3", "parameters")):
        configs[f"{name}-{offload}"] = replace(configs[name], zero=ZeroConfig(offload=offload))  # type: ignore[arg-type]
    for found in run_ranks(spoiled_run, 2, str(tmp_path), configs, timeout=240):
        assert found.keys() == configs.keys()
        for name, (reads, raised) in found.items():
            # zero3 looks at a constant, which lies on the CPU
            assert reads == name.startswith("zero3"), name
            assert "became nan in step 7" in raised


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
        assert found["allgather_bucket_size"] == 10_180  # all parameters, where there are few
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


@pytest.mark.distributed
def test_a_contradiction_is_exit_2_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 1.0}')
    args = ["--strategy", "zero2", "--zero.config", "ds.json", "--run-dir", "run", "--num-threads", "1"]
    ended = run_recipe_cli(args, tmp_path, recipe=Path(tiny_gpt.__file__), world_size=2)
    assert [rank.returncode for rank in ended] == [2, 2]
    assert "--max-grad-norm 1.0" in ended[0].stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"optim": RMSprop()}, {"zero": ZeroConfig(offload="optimizer")}])
def test_leaving_steps_out_needs_an_optimizer_that_does_so_on_the_device(changes: dict[str, object]) -> None:
    from distkit.strategies.deepspeed.strategy import DeepSpeed

    runtime = Runtime(topology=Topology(world_size=2), device=torch.device("cpu"))
    config = replace(BASES["gpt"], strategy="zero1", on_nan="skip", **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--on-nan skip with --strategy zero1(?s:.*)type: +--on-nan raise$"):
        DeepSpeed(config, runtime).check()
    DeepSpeed(replace(config, on_nan="raise"), runtime).check()
