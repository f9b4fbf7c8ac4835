"""A checkpoint of any strategy and world size goes on under any other (C3)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from strategy_runs import BASES, Ended, curve, on_ranks

from distkit.checkpoint.format import step_name
from distkit.config import CheckpointConfig, FSDPConfig, OptimConfig, ResumeConfig, TrainConfig

MIDDLE, END = 10, 20
LAYOUTS = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]


def config_of(recipe: str, layout: str, **changes: object) -> TrainConfig:
    base = replace(
        BASES[recipe], num_steps=END, report_every=1, eval_every=MIDDLE, ema_decay=0.9, max_grad_norm=0.5,
        checkpoint=CheckpointConfig(save_every=MIDDLE, keep_last=None, keep_best=None),
        strategy="ddp" if layout == "ddp" else "fsdp", fsdp=FSDPConfig(replicas=2 if layout == "hsdp" else None),
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def going_on(config: TrainConfig, folder: Path, name: str) -> TrainConfig:
    """`config` from the middle of the run in FOLDER/NAME."""
    source = folder / name / "checkpoints" / step_name(MIDDLE)
    return replace(config, resume=ResumeConfig(source=str(source)))


def assert_goes_on(resumed: Ended, straight: Ended, what: str) -> None:
    mine, theirs = curve(resumed), curve(straight)
    assert sorted(mine) == list(range(MIDDLE + 1, END + 1)), what
    for step, loss in mine.items():
        assert loss == pytest.approx(theirs[step], abs=1e-5), (what, step)
    assert resumed.last["loss"] == pytest.approx(straight.last["loss"], abs=1e-5), what
    for name, tensor in resumed.weights.items():
        assert float((tensor - straight.weights[name]).abs().max()) < 1e-5, (what, name)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mlp", "gpt"])
def test_strategy_and_world_size_may_change(recipe: str, tmp_path: Path) -> None:
    straight: dict[str, Ended] = {}
    for world_size in (2, 4):
        names = {f"{layout}{n}": config_of(recipe, layout) for layout, n in LAYOUTS if n == world_size}
        straight |= on_ranks(world_size, recipe, tmp_path, names)
    assert {run.strategy for run in straight.values()} == {"ddp", "fsdp"}
    restored: dict[str, set[str]] = {}
    for world_size in (2, 4):
        configs = {
            f"{source}-to-{layout}{n}": going_on(config_of(recipe, layout), tmp_path, source)
            for source in straight
            for layout, n in LAYOUTS
            if n == world_size
        }
        for name, run in on_ranks(world_size, recipe, tmp_path, configs).items():
            source, _, target = name.partition("-to-")
            assert_goes_on(run, straight[source], name)
            restored.setdefault(source, set()).add(run.restored)
            if source == target:
                assert run.digest == straight[source].digest, name
    # the same values have the same digest wherever they lie
    assert all(len(digests) == 1 for digests in restored.values())


OPTIMIZERS = ("sgd", "adam", "adagrad", "muon", "nadam", "asgd")


@pytest.mark.distributed
@pytest.mark.slow
def test_sharded_runs_resume_to_the_bit(tmp_path: Path) -> None:
    base = config_of("gpt", "fsdp", dropout=0.2, microbatch_size=1)
    configs = {name: replace(base, optim=OptimConfig(name=name, lr=0.01)) for name in OPTIMIZERS}  # type: ignore[arg-type]
    configs["bf16"] = replace(base, precision="bf16", fsdp=FSDPConfig(gather_precision="bf16"))
    configs["fp16"] = replace(base, precision="fp16")
    configs["offload"] = replace(base, fsdp=FSDPConfig(cpu_offload=True))
    straight = on_ranks(3, "gpt", tmp_path, {n: replace(c, global_batch_size=6) for n, c in configs.items()})
    resumed = on_ranks(
        3, "gpt", tmp_path / "again",
        {n: going_on(replace(c, global_batch_size=6), tmp_path, n) for n, c in configs.items()},
    )  # fmt: skip
    for name, run in resumed.items():
        assert run.digest == straight[name].digest, name
        assert run.last == straight[name].last, name
