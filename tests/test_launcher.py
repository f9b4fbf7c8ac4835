"""What `accelerate launch` says is honoured; a flag that contradicts it is refused and both are named."""

import json
from pathlib import Path

import pytest

from distkit.config import ActivationCheckpointingConfig, DDPConfig, FSDPConfig, TrainConfig, ZeroConfig
from distkit.errors import ConfigError
from distkit.runtime import merge_launcher_env

PLAIN = TrainConfig(num_steps=10)
#: What accelerate launch writes when nothing was chosen.
#: What accelerate launch 1.15 writes for `use_fsdp: true` and nothing else.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}
FSDP1 = FSDP | {"FSDP_VERSION": "1"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
REPLICAS = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
    "PARALLELISM_CONFIG_TP_SIZE": "1",
}
DDP = TrainConfig(num_steps=10, strategy="ddp")
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
        (PLAIN, "", {"ACCELERATE_USE_MEGATRON_LM": "true"}, ("Megatron",)),
        (DDP, "strategy", FSDP, ("--strategy ddp", "ACCELERATE_USE_FSDP=true")),
        (TrainConfig(num_steps=1, ddp=DDPConfig(bucket_mb=5)), "ddp.bucket_mb", FSDP, ("--ddp.bucket-mb 5", "fsdp")),
        (
            TrainConfig(num_steps=1, strategy="fsdp", fsdp=FSDPConfig(replicas=4)),
            "fsdp.replicas",
            FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD", "LOCAL_WORLD_SIZE": "4"},
            ("--fsdp.replicas 4", "FSDP_SHARDING_STRATEGY=HYBRID_SHARD"),
        ),
        (PLAIN, "", FSDP | {"FSDP_IGNORED_MODULES": "head"}, ("FSDP_IGNORED_MODULES=head",)),
        (PLAIN, "", FSDP | {"FSDP_FORWARD_PREFETCH": "true"}, ("FSDP_FORWARD_PREFETCH=true",)),
        (PLAIN, "", FSDP | {"FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, ("CHECKPOINTING_OFFLOAD",)),
        (PLAIN, "", FSDP | {"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, ("FSDP_SHARDING_STRATEGY=NO_SHARD",)),
        (PLAIN, "", FSDP | {"FSDP_AUTO_WRAP_POLICY": "MINE"}, ("FSDP_AUTO_WRAP_POLICY=MINE",)),
        (PLAIN, "", FSDP | REPLICAS | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, ("PARALLELISM_CONFIG_TP_SIZE=2",)),
        (PLAIN, "", FSDP | REPLICAS | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "3"}, ("2 x 3", "8 ranks")),
        (PLAIN, "", REPLICAS, ("without FSDP",)),
        (PLAIN, "", ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, ("ZeRO stage 0",)),
        (PLAIN, "", ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, ("OFFLOAD_OPTIMIZER_DEVICE",)),
        (PLAIN, "", ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere.json"}, ("/nowhere.json",)),
        (
            TrainConfig(num_steps=1, max_grad_norm=1.0),
            "max_grad_norm",
            ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
            ("--max-grad-norm 1.0", "ACCELERATE_GRADIENT_CLIPPING=0.5"),
        ),
        (PLAIN, "", {"ACCELERATE_MIXED_PRECISION": "fp8"}, ("fp8",)),
        (PLAIN, "", {"ACCELERATE_DYNAMO_BACKEND": "TENSORRT"}, ("dynamo_backend",)),
    ],
)
def test_contradictions_name_both(config: TrainConfig, typed: str, env: dict[str, str], names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_launcher_env(config, frozenset({typed}), env, 8)
    for name in names:
        assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) < 10


BLOCKS = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block, Head"}


@pytest.mark.parametrize(
    ("env", "fsdp", "again"),
    [
        (FSDP, FSDPConfig(), "none"),
        (FSDP1, FSDPConfig(), "none"),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, FSDPConfig(reshard_after_forward=False), "none"),
        (FSDP1 | {"FSDP_SHARDING_STRATEGY": "2"}, FSDPConfig(reshard_after_forward=False), "none"),
        (FSDP1 | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD", "LOCAL_WORLD_SIZE": "4"}, FSDPConfig(replicas=2), "none"),
        (FSDP1 | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD", "LOCAL_WORLD_SIZE": "8"}, FSDPConfig(), "none"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, FSDPConfig(cpu_offload=True), "none"),
        (FSDP | BLOCKS, FSDPConfig(wrap=("Block", "Head")), "none"),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "5000"},
         FSDPConfig(min_params=5000), "none"),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, FSDPConfig(wrap=()), "none"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, FSDPConfig(), "full"),
        (FSDP | BLOCKS | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, FSDPConfig(wrap=("Block", "Head")), "blocks"),
        (FSDP | REPLICAS, FSDPConfig(replicas=2), "none"),
    ],
)  # fmt: skip
def test_fsdp_is_honoured(env: dict[str, str], fsdp: FSDPConfig, again: str) -> None:
    config = merge_launcher_env(PLAIN, frozenset(), env, 8)
    assert (config.strategy, config.fsdp, config.activation_checkpointing.mode) == ("fsdp", fsdp, again)
    blocks = ("Block", "Head") if again == "blocks" else None
    assert config.activation_checkpointing.blocks == blocks


def test_fsdp_wins_over_a_preset_and_leaves_its_other_options() -> None:
    preset = TrainConfig(num_steps=10, strategy="ddp", ddp=DDPConfig(bucket_mb=5),
                         activation_checkpointing=ActivationCheckpointingConfig(mode="full"))  # fmt: skip
    config = merge_launcher_env(preset, frozenset(), FSDP, 8)
    assert (config.strategy, config.ddp, config.activation_checkpointing.mode) == ("fsdp", DDPConfig(), "full")
    sharded = TrainConfig(num_steps=10, strategy="fsdp", fsdp=FSDPConfig(reduce_precision="bf16"))
    assert merge_launcher_env(sharded, frozenset({"strategy", "fsdp.reduce_precision"}), FSDP, 8) == sharded
    auto = TrainConfig(num_steps=10)
    assert merge_launcher_env(auto, frozenset({"strategy"}), FSDP, 8).strategy == "fsdp"


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_deepspeed_is_honoured(stage: str, tmp_path: Path) -> None:
    env = ZERO | {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
    }
    config = merge_launcher_env(PLAIN, frozenset(), env, 8)
    assert (config.strategy, config.max_grad_norm) == (f"zero{stage}", 0.5)
    assert config.zero == ZeroConfig(offload="parameters" if stage == "3" else "optimizer")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": int(stage)}}))
    config = merge_launcher_env(PLAIN, frozenset(), ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}, 8)
    assert (config.strategy, config.zero.config) == (f"zero{stage}", file)


def test_regional_compilation_is_by_block() -> None:
    env = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True"}
    assert merge_launcher_env(PLAIN, frozenset(), env, 1).compile_scope == "blocks"
