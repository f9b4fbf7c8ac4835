"""A checkpoint of any strategy and world size goes on under any other (C3)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.strategy_runs import BASES, MISSING, Ended, curve, differences, needs_deepspeed, on_ranks

from distkit.checkpoint.format import step_name
from distkit.checkpoint.verify import read_manifest
from distkit.commands.checkpoint import command
from distkit.config import OPTIMIZERS, SGD, CheckpointConfig, FSDPConfig, ResumeConfig, TrainConfig, ZeroConfig

MIDDLE, END = 10, 20
TOLERANCE = 1e-5
SHARDED = () if MISSING else ("zero1", "zero2", "zero3")
#: On 2 and on 4 ranks; hsdp on 4 alone. zero3 comes last, as it changes most of the process.
LAYOUTS = {2: ("ddp", "fsdp", *SHARDED), 4: ("ddp", "fsdp", "hsdp", *SHARDED)}
#: What each strategy goes on as where the world size changes: of these every one as every other, of the rest some.
EACH = {"ddp", "fsdp", "zero2", "zero3"}
SOME = {("zero1", "zero1"), ("zero1", "ddp"), ("ddp", "zero1"), ("hsdp", "zero3"), ("hsdp", "fsdp"), ("ddp", "hsdp")}
#: The same, for the smaller recipe.
CORNERS = {(name, name) for name in EACH} | set(itertools.permutations(("ddp", "fsdp", "zero3"), 2))


def config_of(recipe: str, layout: str, **changes: object) -> TrainConfig:
    base = replace(
        BASES[recipe], num_steps=END, report_every=1, eval_every=MIDDLE, ema_decay=0.9, max_grad_norm=0.5,
        checkpoint=CheckpointConfig(save_every=MIDDLE, keep_last=None, keep_best=None),
        strategy="fsdp" if layout == "hsdp" else layout,  # type: ignore[arg-type]
        fsdp=FSDPConfig(replicas=2 if layout == "hsdp" else None),
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def middle(folder: Path, name: str) -> Path:
    """The checkpoint in the middle of the run in FOLDER/NAME."""
    return folder / name / "checkpoints" / step_name(MIDDLE)


def going_on(config: TrainConfig, folder: Path, name: str) -> TrainConfig:
    """`config` from the middle of the run in FOLDER/NAME."""
    return replace(config, resume=ResumeConfig(source=str(middle(folder, name))))


@dataclass
class Straight:
    """Runs that nothing interrupted, as RECIPE-LAYOUT-RANKS, and where they lie."""

    folder: Path
    runs: dict[str, Ended]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Every layout, with both recipes; single-1 too."""
    found = Straight(tmp_path_factory.mktemp("straight"), {})
    for world_size, layouts in {1: ("single",), **LAYOUTS}.items():
        names = {f"{r}-{layout}-{world_size}": config_of(r, layout) for layout in layouts for r in ("mlp", "gpt")}
        found.runs |= on_ranks(world_size, found.folder, names)
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_averages_evaluations_and_exports_are_those_of_one_process(straight: Straight, tmp_path: Path) -> None:
    for name, run in straight.runs.items():
        recipe = name.partition("-")[0]
        single = straight.runs[f"{recipe}-single-1"]
        assert max(differences(run, single)) < TOLERANCE, name
        assert run.last["loss"] == pytest.approx(single.last["loss"], abs=TOLERANCE), name
        for kind in ("", "--ema"):
            files = [tmp_path / f"{n}{kind}.safetensors" for n in (f"{recipe}-single-1", name)]
            command(["export", str(straight.folder / name), str(files[1]), *([kind] if kind else []), "--overwrite"])
            expected, exported = (load_file(file) for file in files)
            assert exported.keys() == expected.keys(), name
            for key, tensor in exported.items():
                assert float((tensor - expected[key]).abs().max()) < TOLERANCE, (name, kind, key)


@pytest.mark.distributed
@pytest.mark.slow
def test_checkpoints_of_every_strategy_are_looked_at_alike(straight: Straight) -> None:
    for name, run in straight.runs.items():
        path = straight.folder / name
        assert command(["verify", str(path), "--all"]).exit_code == 0, name
        assert command(["digest", str(path)]).text == run.digest, name
        assert command(["diff", str(path), str(path)]).exit_code == 0, name
        # the same tensors, of the same dtypes and shapes, but for what each rank has of its own
        single = forms(middle(straight.folder, name.partition("-")[0] + "-single-1"))
        assert forms(middle(straight.folder, name)) == single, name


def forms(checkpoint: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor that the ranks have in common."""
    tensors = read_manifest(checkpoint).tensors
    own = ("rng/", "meter/")
    return {name: (entry.dtype, tuple(entry.shape)) for name, entry in tensors.items() if not name.startswith(own)}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [4, 2])
@pytest.mark.parametrize("recipe", ["mlp", "gpt"])
def test_strategy_and_world_size_may_change(straight: Straight, recipe: str, world_size: int, tmp_path: Path) -> None:
    before = 6 - world_size
    pairs = [
        (source, target)
        for target in LAYOUTS[world_size]
        for source in LAYOUTS[before]
        if (source, target) in CORNERS or (recipe == "gpt" and ({source, target} <= EACH or (source, target) in SOME))
    ]
    names = {f"{source}-{target}": (f"{recipe}-{source}-{before}", target) for source, target in pairs}
    configs = {n: going_on(config_of(recipe, target), straight.folder, source) for n, (source, target) in names.items()}
    for name, run in on_ranks(world_size, tmp_path, configs).items():
        source = names[name][0]
        expected = straight.runs[source]
        mine, theirs = curve(run), curve(expected)
        assert sorted(mine) == list(range(MIDDLE + 1, END + 1)), name
        assert mine == pytest.approx({step: theirs[step] for step in mine}, abs=TOLERANCE), name
        assert run.last["loss"] == pytest.approx(expected.last["loss"], abs=TOLERANCE), name
        for key, tensor in run.weights.items():
            assert float((tensor - expected.weights[key]).abs().max()) < TOLERANCE, (name, key)
        # the same values have the same digest wherever they lie
        assert run.restored == command(["digest", str(middle(straight.folder, source))]).text, name


RESUMED = ("sgd", "adam", "adagrad", "muon", "nadam", "asgd")


@pytest.mark.distributed
@pytest.mark.slow
def test_sharded_runs_resume_to_the_bit(tmp_path: Path) -> None:
    base = config_of("gpt", "fsdp", dropout=0.2, microbatch_size=1, global_batch_size=6)
    configs = {name: replace(base, optim=OPTIMIZERS[name](lr=0.01)) for name in RESUMED}  # type: ignore[arg-type]
    configs["bf16"] = replace(base, precision="bf16", fsdp=FSDPConfig(gather_precision="bf16"))
    configs["fp16"] = replace(base, precision="fp16")
    configs["offload"] = replace(base, fsdp=FSDPConfig(cpu_offload=True))
    assert_to_the_bit(tmp_path, configs)


@needs_deepspeed
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_zero_resumes_to_the_bit(stage: str, tmp_path: Path) -> None:
    base = config_of("gpt", stage, dropout=0.2, microbatch_size=1, global_batch_size=6)
    offload = "parameters" if stage == "zero3" else "optimizer"
    configs = {
        "adamw": base,
        "sgd": replace(base, optim=SGD(lr=0.05, momentum=0.9)),
        "bf16": replace(base, precision="bf16"),
        "fp16": replace(base, precision="fp16"),
        "offload": replace(base, zero=ZeroConfig(offload=offload)),  # type: ignore[arg-type]
    }
    assert_to_the_bit(tmp_path, configs)


def assert_to_the_bit(folder: Path, configs: dict[str, TrainConfig]) -> None:
    """Each run on 3 ranks, and its second half once more."""
    again = {f"{name} again": going_on(config, folder, name) for name, config in configs.items()}
    ended = on_ranks(3, folder, configs | again)
    for name in configs:
        assert ended[f"{name} again"].digest == ended[name].digest, name
        assert ended[f"{name} again"].last == ended[name].last, name
        assert ended[f"{name} again"].restored != ended[name].restored, name
