"""What `accelerate launch` says is honoured; a flag that contradicts it is refused and both are named."""

import pytest

from distkit.config import TrainConfig
from distkit.errors import ConfigError
from distkit.runtime import merge_launcher_env

PLAIN = TrainConfig(num_steps=10)
#: What accelerate launch writes when nothing was chosen.
NOTHING_CHOSEN = {
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
}


def test_nothing_chosen_changes_nothing() -> None:
    config = TrainConfig(num_steps=10, precision="bf16", compile=True, device="cpu")
    assert merge_launcher_env(config, frozenset(), NOTHING_CHOSEN, 1) == config
    assert merge_launcher_env(config, frozenset({"precision"}), NOTHING_CHOSEN, 1) == config


def test_precision_cpu_and_dynamo_are_honoured() -> None:
    env = NOTHING_CHOSEN | {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_DYNAMO_MODE": "max-autotune",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True",
    }
    config = merge_launcher_env(PLAIN, frozenset(), env, 1)
    assert (config.precision, config.device) == ("bf16", "cpu")
    assert (config.compile, config.compile_backend, config.compile_mode) == (True, "inductor", "max-autotune")
    assert config.compile_fullgraph
    assert not config.compile_dynamic


def test_launcher_wins_over_a_preset() -> None:
    preset = TrainConfig(num_steps=10, precision="fp16")
    assert merge_launcher_env(preset, frozenset(), {"ACCELERATE_MIXED_PRECISION": "bf16"}, 1).precision == "bf16"


def test_accumulation_sets_the_microbatch() -> None:
    env = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    assert merge_launcher_env(PLAIN, frozenset(), env, 2).microbatch_size == 16
    typed = TrainConfig(num_steps=10, microbatch_size=16)
    assert merge_launcher_env(typed, frozenset({"microbatch_size"}), env, 2) == typed


@pytest.mark.parametrize(
    ("config", "typed", "env", "names"),
    [
        (
            TrainConfig(num_steps=1, precision="fp32"),
            "precision",
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            ("--precision fp32", "ACCELERATE_MIXED_PRECISION=bf16"),
        ),
        (
            TrainConfig(num_steps=1, device="cuda"),
            "device",
            {"ACCELERATE_USE_CPU": "True"},
            ("--device cuda", "ACCELERATE_USE_CPU=True"),
        ),
        (
            TrainConfig(num_steps=1, compile=False),
            "compile",
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            ("--compile False", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR"),
        ),
        (
            TrainConfig(num_steps=1, microbatch_size=64),
            "microbatch_size",
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            ("--microbatch-size 64", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4"),
        ),
        (PLAIN, "", {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, ("128", "3")),
        (PLAIN, "", {"ACCELERATE_USE_FSDP": "true"}, ("FSDP",)),
        (PLAIN, "", {"ACCELERATE_USE_DEEPSPEED": "true"}, ("DeepSpeed",)),
        (PLAIN, "", {"ACCELERATE_MIXED_PRECISION": "fp8"}, ("fp8",)),
        (PLAIN, "", {"ACCELERATE_DYNAMO_BACKEND": "TENSORRT"}, ("dynamo_backend",)),
    ],
)
def test_contradictions_name_both(config: TrainConfig, typed: str, env: dict[str, str], names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_launcher_env(config, frozenset({typed}), env, 1)
    for name in names:
        assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) < 10
