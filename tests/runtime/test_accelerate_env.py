"""What `accelerate launch` says is honoured; a flag that contradicts it is refused and both are named."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from distkit.cli import parse
from distkit.config import ActivationCheckpointingConfig, DDPConfig, FSDPConfig, TrainConfig, ZeroConfig, to_json
from distkit.errors import ConfigError
from distkit.runtime import read_accelerate_env

PLAIN = TrainConfig(num_steps=10)
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
FSDP1 = FSDP | {"FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
REPLICAS = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
    "PARALLELISM_CONFIG_TP_SIZE": "1",
}
INDUCTOR = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
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


def launch(preset: TrainConfig, env: Mapping[str, str], world_size: int, *argv: str) -> TrainConfig:
    """The configuration of a recipe with one preset, started by a launcher that leaves `env`."""
    launched = read_accelerate_env(env, world_size)
    return parse(TrainConfig, {"preset": preset}, argv, "x.py", "", launched, world_size)


def test_nothing_chosen_changes_nothing() -> None:
    config = TrainConfig(num_steps=10, precision="bf16", compile=True, device="cpu")
    assert launch(config, NOTHING_CHOSEN, 1) == config
    assert launch(config, NOTHING_CHOSEN, 1, "--precision", "bf16") == config


def test_precision_cpu_and_dynamo_are_honoured() -> None:
    env = NOTHING_CHOSEN | {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_DYNAMO_MODE": "max-autotune",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True",
    }
    config = launch(PLAIN, env, 1)
    assert (config.precision, config.device) == ("bf16", "cpu")
    assert (config.compile, config.compile_backend, config.compile_mode) == (True, "inductor", "max-autotune")
    assert config.compile_fullgraph
    assert not config.compile_dynamic


def test_launcher_wins_over_a_preset() -> None:
    preset = TrainConfig(num_steps=10, precision="fp16")
    assert launch(preset, {"ACCELERATE_MIXED_PRECISION": "bf16"}, 1).precision == "bf16"


def test_accumulation_sets_the_microbatch() -> None:
    env = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    assert launch(PLAIN, env, 2).microbatch_size == 16
    assert launch(PLAIN, env, 2, "--microbatch-size", "16").microbatch_size == 16


@pytest.mark.parametrize(
    ("argv", "env", "names"),
    [
        (
            ["--precision", "fp32"],
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            ("--precision fp32", "ACCELERATE_MIXED_PRECISION=bf16"),
        ),
        (
            ["--device", "cuda"],
            {"ACCELERATE_USE_CPU": "True"},
            ("--device cuda", "ACCELERATE_USE_CPU=True"),
        ),
        (
            ["--no-compile"],
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            ("--no-compile", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR"),
        ),
        (
            ["--microbatch-size", "64"],
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            ("--microbatch-size 64", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4"),
        ),
        ([], {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, ("128", "3")),
        ([], {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "two"}, ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=two",)),
        (
            ["--microbatch-size", "8"],
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
            ("--microbatch-size 8", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1"),
        ),
        ([], {"ACCELERATE_USE_MEGATRON_LM": "true"}, ("Megatron", "ACCELERATE_USE_MEGATRON_LM=true")),
        ([], {"ACCELERATE_USE_SAGEMAKER": "true"}, ("ACCELERATE_USE_SAGEMAKER=true",)),
        ([], {"ACCELERATE_CPU_AFFINITY": "1"}, ("ACCELERATE_CPU_AFFINITY=1", "numactl")),
        ([], {"ACCELERATE_DEBUG_MODE": "true"}, ("ACCELERATE_DEBUG_MODE=true", "--debug")),
        ([], {"ACCELERATE_USE_CPU": "perhaps"}, ("ACCELERATE_USE_CPU=perhaps", "true or false")),
        (["--strategy", "ddp"], FSDP, ("--strategy ddp", "ACCELERATE_USE_FSDP=true")),
        (["--ddp.bucket-mb", "5"], FSDP, ("--ddp.bucket-mb 5", "fsdp")),
        (
            ["--fsdp.replicas", "4"],
            FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD", "LOCAL_WORLD_SIZE": "4"},
            ("--fsdp.replicas 4", "FSDP_SHARDING_STRATEGY=HYBRID_SHARD"),
        ),
        ([], FSDP | {"FSDP_IGNORED_MODULES": "head"}, ("FSDP_IGNORED_MODULES=head",)),
        ([], FSDP | {"FSDP_FORWARD_PREFETCH": "true"}, ("FSDP_FORWARD_PREFETCH=true",)),
        ([], FSDP | {"FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, ("CHECKPOINTING_OFFLOAD",)),
        ([], FSDP | {"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, ("FSDP_SHARDING_STRATEGY=NO_SHARD",)),
        ([], FSDP | {"FSDP_AUTO_WRAP_POLICY": "MINE"}, ("FSDP_AUTO_WRAP_POLICY=MINE",)),
        ([], FSDP | REPLICAS | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, ("PARALLELISM_CONFIG_TP_SIZE=2",)),
        ([], FSDP | REPLICAS | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "3"}, ("2 x 3", "8 ranks")),
        ([], FSDP | REPLICAS | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "x"}, ("DP_SHARD_SIZE=x",)),
        ([], REPLICAS, ("without FSDP",)),
        ([], FSDP | ZERO, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")),
        ([], FSDP | {"FSDP_VERSION": "3"}, ("FSDP_VERSION=3",)),
        ([], FSDP | {"FSDP_OFFLOAD_PARAMS": "maybe"}, ("FSDP_OFFLOAD_PARAMS=maybe",)),
        ([], FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "later"}, ("FSDP_RESHARD_AFTER_FORWARD=later",)),
        ([], FSDP | {"FSDP_BACKWARD_PREFETCH": "NO_PREFETCH"}, ("FSDP_BACKWARD_PREFETCH=NO_PREFETCH",)),
        (
            [],
            FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "1e6"},
            ("FSDP_MIN_NUM_PARAMS=1e6",),
        ),
        ([], ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, ("ZeRO stage 0",)),
        ([], ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, ("OFFLOAD_OPTIMIZER_DEVICE",)),
        ([], ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere.json"}, ("/nowhere.json",)),
        ([], ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "some"}, ("ACCELERATE_GRADIENT_CLIPPING=some",)),
        ([], ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, ("OFFLOAD_PARAM_DEVICE", "stage 2")),
        (
            [],
            ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            ("OFFLOAD_PARAM_DEVICE", "offload_optimizer_device: cpu"),
        ),
        (
            ["--max-grad-norm", "1"],
            ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
            ("--max-grad-norm 1.0", "ACCELERATE_GRADIENT_CLIPPING=0.5"),
        ),
        ([], {"ACCELERATE_MIXED_PRECISION": "fp8"}, ("fp8",)),
        ([], {"ACCELERATE_DYNAMO_BACKEND": "TENSORRT"}, ("dynamo_backend",)),
        ([], INDUCTOR | {"ACCELERATE_DYNAMO_MODE": "max-autotune-no-cudagraphs"}, ("dynamo_mode",)),
        (
            ["--compile", "--compile-mode", "reduce-overhead"],
            INDUCTOR | {"ACCELERATE_DYNAMO_MODE": "max-autotune"},
            ("--compile-mode reduce-overhead", "ACCELERATE_DYNAMO_MODE=max-autotune"),
        ),
        (
            ["--compile", "--no-compile-fullgraph"],
            INDUCTOR | {"ACCELERATE_DYNAMO_USE_FULLGRAPH": "True"},
            ("--no-compile-fullgraph", "ACCELERATE_DYNAMO_USE_FULLGRAPH=True"),
        ),
        (
            ["--compile", "--compile-scope", "whole"],
            INDUCTOR | {"ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True"},
            ("--compile-scope whole", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=True"),
        ),
    ],
)
def test_contradictions_name_both(argv: list[str], env: dict[str, str], names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        launch(PLAIN, env, 8, *argv)
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
        (FSDP | REPLICAS | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "1", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"},
         FSDPConfig(), "none"),
    ],
)  # fmt: skip
def test_fsdp_is_honoured(env: dict[str, str], fsdp: FSDPConfig, again: str) -> None:
    config = launch(PLAIN, env, 8)
    assert (config.strategy, config.fsdp, config.activation_checkpointing.mode) == ("fsdp", fsdp, again)
    blocks = ("Block", "Head") if again == "blocks" else None
    assert config.activation_checkpointing.blocks == blocks


def test_fsdp_wins_over_a_preset_and_leaves_its_other_options() -> None:
    preset = TrainConfig(num_steps=10, strategy="ddp", ddp=DDPConfig(bucket_mb=5),
                         activation_checkpointing=ActivationCheckpointingConfig(mode="full"))  # fmt: skip
    config = launch(preset, FSDP, 8)
    assert (config.strategy, config.ddp, config.activation_checkpointing.mode) == ("fsdp", DDPConfig(), "full")
    sharded = TrainConfig(num_steps=10, strategy="fsdp", fsdp=FSDPConfig(reduce_precision="bf16"))
    assert launch(PLAIN, FSDP, 8, "--strategy", "fsdp", "--fsdp.reduce-precision", "bf16") == sharded
    assert launch(PLAIN, FSDP, 8, "--strategy", "auto").strategy == "fsdp"


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_deepspeed_is_honoured(stage: str) -> None:
    parameters = "cpu" if stage == "3" else "none"
    env = ZERO | {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": parameters,
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
    }
    config = launch(PLAIN, env, 8)
    assert (config.strategy, config.max_grad_norm) == (f"zero{stage}", 0.5)
    assert config.zero == ZeroConfig(offload="parameters" if stage == "3" else "optimizer")


@pytest.mark.parametrize("nothing", ["auto", "0", "none"])
def test_deepspeed_without_clipping_leaves_it_to_the_run(nothing: str) -> None:
    clips = TrainConfig(num_steps=10, max_grad_norm=1.0)
    assert launch(clips, ZERO | {"ACCELERATE_GRADIENT_CLIPPING": nothing}, 8).max_grad_norm == 1


def deepspeed_file(folder: Path, **said: object) -> dict[str, str]:
    """The environment of a launcher with a DeepSpeed configuration."""
    (folder / "ds.json").write_text(json.dumps(said))
    return ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "ds.json")}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deepspeed_file_decides_like_the_lines_of_a_config(stage: int, tmp_path: Path) -> None:
    env = deepspeed_file(tmp_path, zero_optimization={"stage": stage})
    config = launch(PLAIN, env, 8)
    assert (config.strategy, config.zero) == (f"zero{stage}", ZeroConfig(config=tmp_path / "ds.json"))
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    full = deepspeed_file(tmp_path, zero_optimization=zero, gradient_clipping=0.5, fp16={"enabled": True})
    config = launch(PLAIN, full, 8)
    assert (config.max_grad_norm, config.precision, config.zero.offload) == (0.5, "fp16", "optimizer")
    with pytest.raises(ConfigError, match="--precision fp32"):
        launch(PLAIN, full, 8, "--precision", "fp32")
    other = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2" if stage == 1 else "1"}
    with pytest.raises(ConfigError, match=r"ZERO_STAGE=[12] and .*ds.json contradict"):
        launch(PLAIN, full | other, 8)
    auto = deepspeed_file(tmp_path, zero_optimization=zero, gradient_clipping="auto", bf16={"enabled": "auto"})
    config = launch(PLAIN, auto, 8)
    assert (config.max_grad_norm, config.precision) == (None, "fp32")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"zero_optimization": []}', '{"zero_optimization": {"stage": 0}}'])
def test_a_deepspeed_file_that_says_no_stage_is_refused(text: str, tmp_path: Path) -> None:
    env = deepspeed_file(tmp_path)
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=r"ds.json|CONFIG_FILE"):
        launch(PLAIN, env, 8)


def test_reshard_after_forward_takes_the_names_of_fsdp_1() -> None:
    env = FSDP1 | {"FSDP_RESHARD_AFTER_FORWARD": "SHARD_GRAD_OP"}
    assert not launch(PLAIN, env, 8).fsdp.reshard_after_forward


def test_unasked_values_contradict_nothing() -> None:
    typed = TrainConfig(num_steps=10, compile=True, compile_mode="reduce-overhead", compile_fullgraph=False)
    env = NOTHING_CHOSEN | INDUCTOR
    argv = ["--compile", "--compile-mode", "reduce-overhead", "--no-compile-fullgraph"]
    assert launch(PLAIN, env, 1, *argv) == typed
    preset = TrainConfig(num_steps=10, microbatch_size=16)
    for nothing in ("1", "auto"):
        env = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": nothing}
        assert launch(preset, env, 2) == preset


def test_regional_compilation_is_by_block() -> None:
    env = INDUCTOR | {"ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True"}
    assert launch(PLAIN, env, 1).compile_scope == "blocks"


def test_options_of_the_launchers_strategy_may_be_typed() -> None:
    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}
    config = launch(PLAIN, env, 8, "--fsdp.cpu-offload")
    assert (config.strategy, config.fsdp.cpu_offload, config.fsdp.wrap) == ("fsdp", True, ("Block",))
    with pytest.raises(ConfigError, match="contradicts what accelerate launch says"):
        launch(PLAIN, env, 8, "--fsdp.wrap", "MLP")
    # another strategy's are still refused, and so is another strategy
    with pytest.raises(ConfigError, match=r"does not take --zero\.offload"):
        launch(PLAIN, env, 8, "--zero.offload", "optimizer")
    with pytest.raises(ConfigError, match="--strategy contradicts"):
        launch(PLAIN, env, 8, "--strategy", "ddp")
    preset = replace(PLAIN, strategy="ddp", ddp=DDPConfig(bucket_mb=5))
    assert launch(preset, ZERO, 8).ddp == DDPConfig()


def test_typed_clipping_by_value_contradicts_the_launchers_by_norm() -> None:
    env = ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}
    clips = TrainConfig(num_steps=10, max_grad_value=1.0)
    assert launch(clips, env, 8).max_grad_value is None
    with pytest.raises(ConfigError, match="--max-grad-norm contradicts"):
        launch(PLAIN, env, 8, "--max-grad-value", "1")


def test_a_config_file_of_the_same_launch_is_taken_back(tmp_path: Path) -> None:
    saved = launch(PLAIN, FSDP | BLOCKS, 8)
    (tmp_path / "config.json").write_text(json.dumps(to_json(saved)))
    again = ["--config", str(tmp_path / "config.json")]
    assert launch(PLAIN, FSDP | BLOCKS, 8, *again) == saved
    with pytest.raises(ConfigError, match="ACCELERATE_MIXED_PRECISION=bf16"):
        launch(PLAIN, FSDP | BLOCKS | {"ACCELERATE_MIXED_PRECISION": "bf16"}, 8, *again)


# --- the same reading as Accelerate's own plugins


@pytest.mark.parametrize(
    "env",
    [
        FSDP,
        FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_OFFLOAD_PARAMS": "true"},
        FSDP1 | {"FSDP_RESHARD_AFTER_FORWARD": "SHARD_GRAD_OP", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"},
        FSDP1 | {"FSDP_SHARDING_STRATEGY": "2"},
        FSDP1 | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD_ZERO2"},
        FSDP | BLOCKS | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "5000"},
    ],
)
def test_fsdp_is_read_as_accelerate_reads_it(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    config = launch(PLAIN, env, 8)
    resharded = plugin.reshard_after_forward
    if plugin.fsdp_version == 1:
        resharded = plugin.sharding_strategy.name in ("FULL_SHARD", "HYBRID_SHARD")
    assert config.fsdp.reshard_after_forward == resharded
    fsdp2_offload = type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"
    assert config.fsdp.cpu_offload == getattr(plugin.cpu_offload, "offload_params", fsdp2_offload)
    assert [*(config.fsdp.wrap or ())] == [name.strip() for name in plugin.transformer_cls_names_to_wrap or ()]
    assert config.fsdp.min_params == (plugin.min_num_params or None)
    assert (config.activation_checkpointing.mode != "none") == plugin.activation_checkpointing


def test_compilation_and_replicas_are_read_as_accelerate_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import ParallelismConfig
    from accelerate.utils import TorchDynamoPlugin

    dynamo = {"MODE": "max-autotune", "USE_FULLGRAPH": "True", "USE_REGIONAL_COMPILATION": "True"}
    env = FSDP | REPLICAS | INDUCTOR | {f"ACCELERATE_DYNAMO_{name}": value for name, value in dynamo.items()}
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    plugin, parallelism, config = TorchDynamoPlugin(), ParallelismConfig(), launch(PLAIN, env, 8)
    assert (config.compile_backend, config.compile_mode) == (plugin.backend.value.lower(), plugin.mode)
    assert (config.compile_fullgraph, config.compile_dynamic) == (plugin.fullgraph, bool(plugin.dynamic))
    assert (config.compile_scope == "blocks") == plugin.use_regional_compilation
    assert config.fsdp.replicas == parallelism.dp_replicate_size
