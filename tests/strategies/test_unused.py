"""Parameters that some step's loss does not depend on: trained as in one process, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.harness import ROOT, run_recipe_cli
from support.layer_drop import RECIPE, Config
from support.strategy_runs import differences, needs_deepspeed, on_ranks
from torch import Tensor, nn

from distkit.config import ActivationCheckpointingConfig, FSDPConfig, TrainConfig
from distkit.errors import ConfigError
from distkit.strategies.unused import GradientWatch, after_backward

BASE = replace(RECIPE.presets["default"], timeout_seconds=240, report_every=1)
SAME = {"ddp, same": {"strategy": "ddp", "unused_parameters": "same"},
        "fsdp, same": {"strategy": "fsdp", "unused_parameters": "same"}}  # fmt: skip
ANY = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "fsdp, recomputed": {"strategy": "fsdp", "activation_checkpointing": ActivationCheckpointingConfig(mode="full")},
    "fsdp, kept": {"strategy": "fsdp", "fsdp": FSDPConfig(reshard_after_forward=False)},
    "fsdp, offloaded": {"strategy": "fsdp", "fsdp": FSDPConfig(cpu_offload=True)},
}
REFUSE = {"ddp, none": {"strategy": "ddp"}, "fsdp, none": {"strategy": "fsdp"}}


def variants(base: Config) -> dict[str, Config]:
    """Every way in which ranks may train `base`."""
    ways = {name: {"unused_parameters": "any", **way} for name, way in ANY.items()}
    if base.draws == "same" or not base.drop:
        ways |= SAME
    if not base.drop:
        ways |= REFUSE
    return {name: replace(base, **way) for name, way in ways.items()}  # type: ignore[arg-type]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("drop", "draws", "microbatch_size"),
    [(0.0, "own", 4), (0.5, "same", 4), (0.5, "own", 4), (0.5, "own", 1), (0.5, "heads", 4)],
)
def test_layer_drop_is_the_one_of_a_single_process(
    drop: float, draws: str, microbatch_size: int, tmp_path: Path
) -> None:
    base = replace(BASE, drop=drop, draws=draws, microbatch_size=microbatch_size)  # type: ignore[arg-type]
    alone = on_ranks(1, tmp_path / "alone", {"single": base})["single"]
    found = on_ranks(2, tmp_path / "ranks", variants(base))
    for name, ended in found.items():
        losses, weights = differences(ended, alone)
        assert losses < 1e-5, name
        assert weights < 1e-5, name


@pytest.mark.distributed
def test_layer_drop_in_the_quick_layer(tmp_path: Path) -> None:
    base = replace(BASE, num_steps=6, microbatch_size=4)
    alone = on_ranks(1, tmp_path / "alone", {"single": base})["single"]
    ways = {name: replace(base, strategy=name, unused_parameters="any") for name in ("ddp", "fsdp")}  # type: ignore[arg-type]
    for name, ended in on_ranks(2, tmp_path / "ranks", ways).items():
        assert max(differences(ended, alone)) < 1e-5, name


WRONG = "does not depend on"
ORDER = "do not use the same parts of the model"
LATER = "a step does not use the same parts of the model as the first one"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "allowed", "draws", "keep", "microbatch_size", "words"), [
    ("ddp", "refuse", "same", 0, 4, WRONG),
    ("ddp", "refuse", "own", 4, 4, WRONG),
    ("ddp", "refuse", "same", 4, 2, WRONG),
    ("ddp", "refuse", "own", 4, 2, WRONG),
    ("fsdp", "refuse", "own", 0, 4, ORDER),
    ("fsdp", "refuse", "own", 4, 4, LATER),
    ("fsdp", "refuse", "same", 4, 2, LATER),
    ("fsdp", "refuse", "heads", 0, 4, "a gradient for heads.0 on one of ranks 0 and 1 only"),
    ("fsdp", "same", "heads", 4, 4, "a gradient for heads.0 on one of ranks 0 and 1 only"),
    ("fsdp", "refuse", "heads", 4, 4, "no gradient for heads.0"),
    ("fsdp", "same", "own", 0, 4, ORDER),
    ("fsdp", "same", "own", 4, 2, ORDER),
    pytest.param("zero1", "refuse", "same", 0, 4, WRONG, marks=needs_deepspeed),
    pytest.param("zero1", "refuse", "own", 4, 4, WRONG, marks=needs_deepspeed),
    pytest.param("zero1", "refuse", "own", 4, 2, WRONG, marks=needs_deepspeed),
    pytest.param("zero2", "refuse", "own", 4, 2, WRONG, marks=needs_deepspeed),
    pytest.param("zero3", "refuse", "own", 0, 4, ORDER, marks=needs_deepspeed),
    pytest.param("zero3", "refuse", "own", 4, 4, LATER, marks=needs_deepspeed),
    pytest.param("zero3", "refuse", "same", 4, 2, LATER, marks=needs_deepspeed),
    pytest.param("zero3", "any", "own", 0, 4, "needs a gradient for every parameter in every step",
                 marks=needs_deepspeed),
])  # fmt: skip
def test_what_would_be_wrong_is_refused(
    strategy: str, allowed: str, draws: str, keep: int, microbatch_size: int, words: str, tmp_path: Path
) -> None:
    argv = ["--strategy", strategy, "--unused-parameters", allowed, "--draws", draws, "--keep-steps", str(keep)]
    argv += ["--microbatch-size", str(microbatch_size), "--run-dir", str(tmp_path / "run")]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    recipe = ROOT / "tests" / "support" / "layer_drop.py"
    ranks = run_recipe_cli(argv, tmp_path, recipe=recipe, world_size=2, env=env, timeout=120)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert words in ranks[0].stderr
    assert "Traceback" not in ranks[0].stderr
    advice = "--strategy fsdp" if allowed == "any" else "--unused-parameters"
    assert advice in ranks[0].stderr.partition("type:")[2]
    found = keep > 0 or draws == "heads"  # fsdp has no need of all gradients
    assert (tmp_path / "run").exists() == found, "one batch is computed before anything is written"


def test_the_watch_names_what_a_backward_left_out() -> None:
    layers = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcd"})
    watch = GradientWatch(dict(layers.named_parameters()), "zero2")

    def backward(names: str) -> None:
        loss = sum(layers[name](torch.ones(1, 2)).sum() for name in names)
        assert isinstance(loss, Tensor)
        after_backward(loss, watch.check).backward()  # type: ignore[no-untyped-call]

    backward("abcd")
    with pytest.raises(ConfigError, match=r"b\.weight, b\.bias, c\.weight and 3 more.*\n.*\n.*--unused-parameters any"):
        backward("a")
    backward("abcd")
    with pytest.raises(ConfigError, match=r"depend on d\.weight, d\.bias\n"):
        backward("abc")


def test_a_choice_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="refuse, same or any"):
        TrainConfig(num_steps=1, unused_parameters="all")  # type: ignore[arg-type]
