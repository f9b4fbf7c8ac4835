"""FSDP2 on gloo: units, memory, what is refused, evaluation on all ranks, whole weights at the end, no waiting (C5)."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny, tiny_gpt
from support.harness import run_ranks, run_recipe_cli
from support.strategy_runs import BASES, CountReads, build, differences, needs_deepspeed, on_ranks
from torch import Tensor, nn

from distkit.cli import parse
from distkit.config import (
    LBFGS,
    OPTIMIZERS,
    ActivationCheckpointingConfig,
    Adafactor,
    DDPConfig,
    FSDPConfig,
    TrainConfig,
    to_json,
)
from distkit.data.reading.loader import EvaluationLoader
from distkit.engine.evaluate import evaluate
from distkit.engine.fit import fit
from distkit.engine.train_step import train_step
from distkit.errors import ConfigError
from distkit.runtime import Topology, read_topology
from distkit.runtime.process import Runtime, start
from distkit.strategies import build_strategy
from distkit.strategies.fsdp import units
from distkit.tensors.shards import local_part

SHARDED = replace(BASES["gpt"], strategy="fsdp")


def test_units() -> None:
    model = tiny_gpt.build_model(tiny_gpt.BASE)
    assert units(model, FSDPConfig()) == list(model.blocks)
    assert units(model, FSDPConfig(wrap=())) == []
    by_class = units(model, FSDPConfig(wrap=("MLP", "Attention")))
    assert [type(unit).__name__ for unit in by_class] == ["Attention", "MLP"] * 3
    # an attention has 1,600 parameters and an MLP 1,440, which is also what is left of a block
    assert units(model, FSDPConfig(min_params=1_500)) == [block.attention for block in model.blocks]
    assert units(model, FSDPConfig(min_params=1_440)) == [
        part for block in model.blocks for part in (block.attention, block.mlp)
    ]
    with pytest.raises(ConfigError, match=r"--fsdp\.wrap Block"):
        units(model, FSDPConfig(wrap=("Blok",)))
    # the embedding is also the head: the model's own forward reads its weight
    assert model.embedding not in units(model, FSDPConfig(min_params=1))


def test_a_unit_owns_its_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert units(model, FSDPConfig(min_params=20)) == [model[0], model[2][0]]
    model[2][0].weight = model[0].weight
    assert units(model, FSDPConfig(min_params=20)) == []
    with pytest.raises(ConfigError, match="used outside of it"):
        units(model, FSDPConfig(wrap=("Linear",)))


@pytest.mark.parametrize("wrap", [(), ("Attention", "MLP"), None])
def test_units_come_back_through_config_json(wrap: tuple[str, ...] | None, tmp_path: Path) -> None:
    config = replace(SHARDED, fsdp=FSDPConfig(wrap=wrap))
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    presets = {"default": tiny_gpt.BASE}
    again = parse(tiny_gpt.GPTTrainConfig, presets, ["--config", str(tmp_path / "config.json")], "x", "")
    assert again == config


@pytest.mark.parametrize(
    ("world_size", "changes", "says"),
    [
        (1, {"strategy": "fsdp"}, "several ranks"),
        (2, {"strategy": "single"}, "one rank"),
        (2, {"strategy": "fsdp", "optim": Adafactor()}, "--optim.name adafactor"),
        (2, {"strategy": "fsdp", "optim": LBFGS()}, "--optim.name lbfgs"),
        (2, {"strategy": "fsdp", "compile": True, "compile_scope": "whole"}, "--compile-scope blocks"),
        (4, {"strategy": "fsdp", "fsdp": FSDPConfig(replicas=3)}, "--fsdp.replicas 2"),
        (4, {"strategy": "fsdp", "fsdp": FSDPConfig(replicas=4)}, "--fsdp.replicas 2"),
        (2, {"strategy": "fsdp", "fsdp": FSDPConfig(gather_precision="bf16")}, "--precision bf16"),
        (2, {"strategy": "fsdp", "precision": "fp16", "fsdp": FSDPConfig(cpu_offload=True)}, "--precision bf16"),
        (2, {"ddp": DDPConfig(sync_batchnorm=True)}, "--ddp.no-sync-batchnorm"),
    ],
)
def test_what_cannot_be_is_refused(world_size: int, changes: dict[str, object], says: str) -> None:
    config = replace(tiny.BASE, **changes)  # type: ignore[arg-type]
    runtime = Runtime(topology=Topology(world_size=world_size), device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=says):
        build_strategy(config, runtime)


def refused_models() -> list[str]:
    config = replace(SHARDED, precision="bf16", fsdp=FSDPConfig(gather_precision="bf16"))
    runtime = start(config, read_topology(os.environ))
    messages = []
    torch.manual_seed(0)
    for model in (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Embedding(4, 4, sparse=True)),
        nn.Linear(4, 4),
    ):
        if isinstance(model, nn.Linear):
            nn.init.constant_(model.weight, runtime.rank)
        try:
            build_strategy(config, runtime).prepare(model, lambda m: torch.optim.SGD(m.parameters()))
        except ConfigError as error:
            messages.append(str(error))
    runtime.close()
    return messages


@pytest.mark.distributed
def test_models_that_cannot_be_sharded_are_named() -> None:
    for messages in run_ranks(refused_models, 2):
        assert len(messages) == 3
        for message, word in zip(messages, ("BatchNorm", "sparse", "weight on some rank"), strict=True):
            assert word in message


def reads_and_share(folder: str, config: TrainConfig) -> tuple[int, float, list[str]]:
    """Host reads in three steps; this rank's share of parameters, gradients and optimizer state; names."""
    run = build(folder, config)
    train_step(run)
    with CountReads() as count:
        for _ in range(3):
            train_step(run)
    run.meter.grad_norm = run.strategy.clip_gradients_(True)
    assert run.meter.grad_norm is not None
    assert type(run.meter.grad_norm) is Tensor
    assert run.meter.grad_norm.ndim == 0
    strategy = run.strategy
    learned = {**dict(run.strategy.model_tensors()), **strategy.optimizer_state.tensors()}
    learned |= {f"grad {n}": p.grad for n, p in strategy.module.named_parameters() if p.grad is not None}
    held, total = sum(local_part(t).numel() for t in learned.values()), sum(t.numel() for t in learned.values())
    names = [name for name, _ in strategy.module.named_parameters()]
    run.runtime.close()
    return count.reads, held / total, names


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_rank_holds_its_share_and_never_waits(precision: str, tmp_path: Path) -> None:
    config = replace(SHARDED, precision=precision, microbatch_size=2, max_grad_norm=0.1, ema_decay=0.9,
                     activation_checkpointing=ActivationCheckpointingConfig(mode="full"))  # type: ignore[arg-type]  # fmt: skip
    expected = [name for name, _ in tiny_gpt.build_model(tiny_gpt.BASE).named_parameters()]
    for reads, share, names in run_ranks(reads_and_share, 2, str(tmp_path), config):
        assert reads == 0
        assert share < 0.52
        assert names == expected


def trained(folder: str, config: TrainConfig) -> None:
    run = build(folder, config)
    fit(run)
    run.runtime.close()


@pytest.mark.distributed
def test_the_final_weights_are_whole(tmp_path: Path) -> None:
    config = replace(tiny.BASE, batch_norm=True, ema_decay=0.9, eval_every=7, eval_batch_size=4)
    for strategy in ("fsdp", "ddp"):
        run_ranks(trained, 2, str(tmp_path / strategy / "run"), replace(config, strategy=strategy))
    for file in ("weights.safetensors", "ema.safetensors"):
        mine, theirs = (load_file(tmp_path / strategy / "run" / file) for strategy in ("fsdp", "ddp"))
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-6)
    tiny.build_model(config).load_state_dict(load_file(tmp_path / "fsdp" / "run" / "weights.safetensors"))


def evaluations(folder: str, config: TrainConfig, size: int) -> list[tuple[float, int]]:
    """Evaluate, train, evaluate and so on: what is gathered for one must not be what the next sees."""
    run = build(folder, config)
    assert run.test_loader is not None
    loader = EvaluationLoader(run.test_loader.fetcher, size)
    found = [evaluate(run, loader)]
    for _ in range(2):  # from the second evaluation on the averages are not the weights
        train_step(run)
        run.meter.reduce()
        found.append(evaluate(run, loader))
    found.append(evaluate(run, loader))
    run.runtime.close()
    assert found[2] == found[3]
    return [(means.loss, means.samples) for means in found]


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "batch"), [(1, 4), (5, 4), (15, 3)])
@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("zero3", marks=needs_deepspeed)])
def test_every_rank_evaluates_as_often(strategy: str, size: int, batch: int, tmp_path: Path) -> None:
    config = replace(BASES["gpt"], eval_batch_size=batch, ema_decay=0.9, global_batch_size=12)
    (single,) = run_ranks(evaluations, 1, str(tmp_path / "1"), config, size)
    ranks = run_ranks(evaluations, 3, str(tmp_path / "3"), replace(config, strategy=strategy), size)  # type: ignore[arg-type]
    for rank in ranks:
        for (loss, samples), (expected, _) in zip(rank, single, strict=True):
            assert samples == size
            assert loss == pytest.approx(expected, abs=1e-6)


def overflow(folder: str, config: TrainConfig) -> tuple[float, bool]:
    """One step in which the last shard of one gradient is infinite, in every copy of the model."""
    run = build(folder, config)
    strategy = run.strategy
    honest, before = strategy.backward, {n: local_part(t).clone() for n, t in strategy.model_tensors().items()}

    def backward(loss: Tensor) -> None:
        honest(loss)
        last = strategy.gradients()[-1]
        shards = run.runtime.world_size // (config.fsdp.replicas or 1)
        if run.runtime.rank % shards == shards - 1:
            last.view(-1)[0] = float("inf")

    strategy.backward = backward  # type: ignore[method-assign]
    train_step(run)
    kept = all(torch.equal(before[n], local_part(t)) for n, t in strategy.model_tensors().items())
    run.runtime.close()
    return strategy.skipped.item(), kept


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "replicas", "optim"), [(2, None, "adamw"), (4, 2, "adamw"), (2, None, "sgd")])
def test_all_ranks_skip_what_overflows_on_one(
    world_size: int, replicas: int | None, optim: str, tmp_path: Path
) -> None:
    config = replace(SHARDED, precision="fp16", max_grad_norm=1.0, optim=OPTIMIZERS[optim](lr=0.1),  # type: ignore[arg-type]
                     fsdp=FSDPConfig(replicas=replicas))  # fmt: skip
    assert run_ranks(overflow, world_size, str(tmp_path), config) == [(1.0, True)] * world_size


@pytest.mark.distributed
@pytest.mark.slow
def test_options_of_the_strategies_train_alike(tmp_path: Path) -> None:
    base = replace(BASES["gpt"], num_steps=12, report_every=1, microbatch_size=2)
    again = ActivationCheckpointingConfig(mode="every", every=2)
    eager = {"compile": True, "compile_backend": "aot_eager"}
    configs = {
        "static": replace(base, ddp=DDPConfig(static_graph=True, bucket_mb=1)),
        "static again": replace(base, ddp=DDPConfig(static_graph=True), activation_checkpointing=again),
        "bf16 gradients": replace(base, ddp=DDPConfig(bf16_gradients=True)),
        "ddp blocks": replace(base, compile_scope="blocks", activation_checkpointing=again, **eager),
        "root": replace(SHARDED, num_steps=12, report_every=1, microbatch_size=2, fsdp=FSDPConfig(wrap=())),
        "kept": replace(base, strategy="fsdp", fsdp=FSDPConfig(reshard_after_forward=False, min_params=1500)),
        "fsdp blocks": replace(base, strategy="fsdp", compile_fullgraph=True, **eager),
        "fsdp blocks again": replace(base, strategy="fsdp", activation_checkpointing=again, **eager),
        "fsdp whole again": replace(
            base, strategy="fsdp",
            activation_checkpointing=ActivationCheckpointingConfig(mode="blocks", blocks=("GPT",))),
    }  # fmt: skip
    single = on_ranks(1, tmp_path / "1", {"single": base})["single"]
    for name, run in on_ranks(2, tmp_path / "2", configs).items():
        losses, weights = differences(run, single)
        assert losses < (1e-3 if "bf16" in name else 1e-5), name
        assert weights < (5e-3 if "bf16" in name else 1e-5), name
        assert (losses > 1e-6) == ("bf16" in name), name


ARGS = ["--num-steps", "4", "--num-threads", "1", "--timeout-seconds", "60", "--run-dir", "run"]
GPT_RECIPE = Path(tiny_gpt.__file__)


@pytest.mark.distributed
def test_the_command_line_and_the_launcher_choose_it(tmp_path: Path) -> None:
    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}
    ended = run_recipe_cli(ARGS, tmp_path, recipe=GPT_RECIPE, world_size=2, env=env)
    assert [rank.returncode for rank in ended] == [0, 0], ended[0].stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["strategy"], config["fsdp"]["wrap"]) == ("fsdp", ["Block"])
    assert "(fsdp" in json.loads((tmp_path / "run" / "summary.json").read_text())["device"]
    # config.json gives it back
    again = ["--config", "run/config.json", *ARGS[:-1], "other"]
    ended = run_recipe_cli(again, tmp_path, recipe=GPT_RECIPE, world_size=2)
    assert [rank.returncode for rank in ended] == [0, 0], ended[0].stderr
    digests = [json.loads((tmp_path / d / "summary.json").read_text())["state_digest"] for d in ("run", "other")]
    assert digests[0] == digests[1]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("args", "env", "says"),
    [
        (["--strategy", "ddp"], {"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true"),
        (["--fsdp.replicas", "2"], {}, "--strategy fsdp"),
        (["--strategy", "fsdp", "--fsdp.wrap", "Blok"], {}, "--fsdp.wrap Block"),
        (["--strategy", "fspd"], {}, "--strategy fsdp"),
    ],
)
def test_what_contradicts_is_exit_2(args: list[str], env: dict[str, str], says: str, tmp_path: Path) -> None:
    ended = run_recipe_cli([*ARGS, *args], tmp_path, recipe=GPT_RECIPE, world_size=2, env=env)
    assert [rank.returncode for rank in ended] == [2, 2]
    assert says in ended[0].stderr
    assert not (tmp_path / "run").exists()
