"""What `accelerate launch` says in the environment, as fields of the configuration. No torch.

Variables with the value that Accelerate writes when nothing was chosen count as absent. These are ignored, because
distkit does what they ask for in any case: FSDP_VERSION (1 is laid out as 2 would be), FSDP_USE_ORIG_PARAMS,
FSDP_SYNC_MODULE_STATES and FSDP_CPU_RAM_EFFICIENT_LOADING (every rank builds the same model), FSDP_STATE_DICT_TYPE
(checkpoints have their own format), ACCELERATE_DEEPSPEED_ZERO3_INIT and _SAVE_16BIT_MODEL (for transformers).

Accelerate's plugins read the same variables, but take 3 s to import, do not say which variable is wrong, and replace
what they do not support by something else with a warning. A test compares their reading with this one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from distkit.config import CompileBackend, CompileMode
from distkit.errors import ConfigError, nearest
from distkit.json_files import read_object

Env = Mapping[str, str]
#: Field, such as `fsdp.wrap` -> its value, and what the environment says: `VARIABLE=value`.
Choices = dict[str, tuple[object, str]]

YES, NO = ("1", "true", "yes", "y", "on", "t"), ("", "0", "false", "no", "n", "off", "f", "none")
#: Variable -> what distkit does not have, and what to do instead.
UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "distributed_type: FSDP or DEEPSPEED for what one GPU cannot hold"),
    "ACCELERATE_USE_SAGEMAKER": ("SageMaker", "compute_environment: LOCAL_MACHINE"),
    "ACCELERATE_USE_IPEX": ("Intel's extension", "ipex_config: {ipex: false}"),
    "ACCELERATE_CPU_AFFINITY": ("cores for each process", "enable_cpu_affinity: false, and taskset or numactl"),
    "ACCELERATE_DEBUG_MODE": ("checks of Accelerate's own collectives", "debug: false; --debug of the recipe instead"),
}
#: FSDP 1's sharding strategies by name and by number, as (reshard_after_forward, one copy per node).
SHARDING = {
    "FULL_SHARD": (True, False),
    "SHARD_GRAD_OP": (False, False),
    "HYBRID_SHARD": (True, True),
    "HYBRID_SHARD_ZERO2": (False, True),
}
SHARDING |= dict(zip(("1", "2", "4", "5"), SHARDING.values(), strict=True))


def read_accelerate_env(env: Env, world_size: int) -> Choices:
    """The fields that `accelerate launch` decides; empty where it leaves everything open.

    `accum_steps` is no field: the microbatch size follows from it.

    Raises:
        ConfigError: a variable has a value it cannot have, contradicts another one, or asks for something that
            distkit does not have.
    """
    for variable, (what, fix) in UNSUPPORTED.items():
        if switched(env, variable):
            raise ConfigError(
                f"accelerate launch asks for {what}, which distkit does not have", got=_said(env, variable), fix=fix
            )
    choices = _strategy(env, world_size)
    if switched(env, "ACCELERATE_USE_CPU"):
        choices["device"] = ("cpu", _said(env, "ACCELERATE_USE_CPU"))
    variable = "ACCELERATE_MIXED_PRECISION"
    if (precision := env.get(variable, "no").lower()) != "no":
        _one_of(env, variable, precision, ("bf16", "fp16", "no"))
        choices["precision"] = (precision, _said(env, variable))
    variable = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if env.get(variable, "auto").lower() != "auto":
        choices["accum_steps"] = (_whole(env, variable, "1"), _said(env, variable))
    return choices | _compile(env)


def switched(env: Env, variable: str) -> bool:
    """Whether a variable says yes; ConfigError when it says neither yes nor no."""
    value = env.get(variable, "").strip().lower()
    if value not in YES and value not in NO:
        raise _refusal(env, variable, "true or false", f"true or false for {_option(variable)}")
    return value in YES


def _whole(env: Env, variable: str, default: str) -> int:
    """A whole number, at least 1."""
    value = env.get(variable, default).strip()
    if not value.isdecimal() or int(value) < 1:
        raise _refusal(env, variable, "a whole number, at least 1", f"{_option(variable)}: {default}")
    return int(value)


def _option(variable: str) -> str:
    """The option of Accelerate's config file behind a variable."""
    return variable.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()


def _said(env: Env, variable: str) -> str:
    return f"{variable}={env[variable]}" if variable in env else f"no {variable}"


def _chosen(env: Env, variable: str) -> str | None:
    """The value of a variable, None where it says that nothing was chosen."""
    value = env.get(variable, "").strip()
    return None if value.lower() in ("", "none", "false", "no", "auto") else value


def _refusal(env: Env, variable: str, expected: str, fix: str) -> ConfigError:
    what = f"accelerate launch says {_said(env, variable)}, which distkit cannot do"
    return ConfigError(what, expected=expected, got=env.get(variable), fix=fix)


def _one_of(env: Env, variable: str, value: str, choices: tuple[str, ...]) -> str:
    """`value`, which `variable` says and which must be one of `choices`."""
    if value not in choices:
        close = nearest(value, choices) or choices[0]
        option = _option(variable)
        raise _refusal(env, variable, ", ".join(choices), f"accelerate launch --{option} {close}")
    return value


def _compile(env: Env) -> Choices:
    prefix = "ACCELERATE_DYNAMO_"
    backend = env.get(f"{prefix}BACKEND", "no").lower()
    if backend == "no":
        return {}
    said = _said(env, f"{prefix}BACKEND")
    _one_of(env, f"{prefix}BACKEND", backend, get_args(CompileBackend))
    choices: Choices = {"compile": (True, said), "compile_backend": (backend, said)}
    if (mode := env.get(f"{prefix}MODE", "default")) != "default":
        _one_of(env, f"{prefix}MODE", mode, get_args(CompileMode))
        choices["compile_mode"] = (mode, _said(env, f"{prefix}MODE"))
    switches: tuple[tuple[str, str, object], ...] = (
        ("USE_REGIONAL_COMPILATION", "compile_scope", "blocks"),
        ("USE_FULLGRAPH", "compile_fullgraph", True),
        ("USE_DYNAMIC", "compile_dynamic", True),
    )
    for name, field, value in switches:
        if switched(env, prefix + name):
            choices[field] = (value, _said(env, prefix + name))
    return choices


def _strategy(env: Env, world_size: int) -> Choices:
    fsdp, deepspeed = switched(env, "ACCELERATE_USE_FSDP"), switched(env, "ACCELERATE_USE_DEEPSPEED")
    if fsdp and deepspeed:
        raise ConfigError(
            "ACCELERATE_USE_FSDP and ACCELERATE_USE_DEEPSPEED contradict each other",
            expected="one of the two",
            fix="--use_fsdp or --use_deepspeed",
        )
    choices = _fsdp(env, world_size) if fsdp else _deepspeed(env) if deepspeed else {}
    if switched(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        choices |= _parallelism(env, world_size, fsdp)
    return choices


def _fsdp(env: Env, world_size: int) -> Choices:
    for variable in ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "FSDP_FORWARD_PREFETCH"):
        if switched(env, variable):
            raise _refusal(env, variable, "false", f"{variable.lower()}: false")
    if _chosen(env, "FSDP_IGNORED_MODULES") is not None:
        raise _refusal(env, "FSDP_IGNORED_MODULES", "the variable unset", "leave it out of fsdp_config")
    if env.get("FSDP_VERSION", "2") not in ("1", "2"):
        raise _refusal(env, "FSDP_VERSION", "2", "fsdp_version: 2")
    if (_chosen(env, "FSDP_BACKWARD_PREFETCH") or "BACKWARD_PRE").upper() not in ("BACKWARD_PRE", "1"):
        # FSDP2 always gathers the next unit before it is needed
        raise _refusal(env, "FSDP_BACKWARD_PREFETCH", "BACKWARD_PRE", "fsdp_backward_prefetch: BACKWARD_PRE")
    choices: Choices = {"strategy": ("fsdp", _said(env, "ACCELERATE_USE_FSDP"))}
    choices |= _sharding(env, world_size) | _wrapping(env)
    if switched(env, "FSDP_OFFLOAD_PARAMS"):
        choices["fsdp.cpu_offload"] = (True, _said(env, "FSDP_OFFLOAD_PARAMS"))
    variable = "FSDP_ACTIVATION_CHECKPOINTING"
    if switched(env, variable):
        classes, _ = choices.get("fsdp.wrap", (None, ""))
        choices["activation_checkpointing.mode"] = ("blocks" if classes else "full", _said(env, variable))
        if classes:
            choices["activation_checkpointing.blocks"] = (classes, _said(env, variable))
    return choices


def _sharding(env: Env, world_size: int) -> Choices:
    variable, newer = "FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD"
    if env.get(newer, "").strip().upper() in SHARDING.keys() - {"1"}:
        variable = newer  # it takes the names of FSDP 1, too
    name = (_chosen(env, variable) or "FULL_SHARD").upper()
    if name not in SHARDING:
        names = ", ".join(name for name in SHARDING if not name.isdigit())
        raise _refusal(env, variable, names, "fsdp_sharding_strategy: FULL_SHARD, or no FSDP for NO_SHARD")
    reshard, hybrid = SHARDING[name]
    choices: Choices = {} if reshard else {"fsdp.reshard_after_forward": (False, _said(env, variable))}
    if variable != newer and env.get(newer, "") and not switched(env, newer):
        choices["fsdp.reshard_after_forward"] = (False, _said(env, newer))
    nodes = world_size // min(world_size, _whole(env, "LOCAL_WORLD_SIZE", str(world_size))) if hybrid else 1
    if nodes > 1:
        choices["fsdp.replicas"] = (nodes, _said(env, variable))
    return choices


def _wrapping(env: Env) -> Choices:
    variable = "FSDP_AUTO_WRAP_POLICY"
    policy = (_chosen(env, variable) or "TRANSFORMER_BASED_WRAP").upper()
    if policy == "TRANSFORMER_BASED_WRAP":
        variable = "FSDP_TRANSFORMER_CLS_TO_WRAP"
        names = (_chosen(env, variable) or "").split(",")
        classes = tuple(name.strip() for name in names if name.strip())
        return {"fsdp.wrap": (classes, _said(env, variable))} if classes else {}
    if policy == "SIZE_BASED_WRAP":
        variable = "FSDP_MIN_NUM_PARAMS"
        return {"fsdp.min_params": (_whole(env, variable, "100000000"), _said(env, variable))}
    if policy == "NO_WRAP":
        return {"fsdp.wrap": ((), _said(env, variable))}
    expected = "TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP or NO_WRAP"
    raise _refusal(env, variable, expected, "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP")


def _parallelism(env: Env, world_size: int, fsdp: bool) -> Choices:
    """Replicas and shards; tensor, context and sequence parallelism are not supported."""
    prefix = "PARALLELISM_CONFIG_"
    for name in ("TP_SIZE", "CP_SIZE", "SP_SIZE"):
        if env.get(prefix + name, "1") != "1":
            raise _refusal(env, prefix + name, "1", f"parallelism_config_{name.lower()}: 1")
    replicas, shards = (_whole(env, prefix + name, "1") for name in ("DP_REPLICATE_SIZE", "DP_SHARD_SIZE"))
    if replicas * shards != world_size or (shards > 1 and not fsdp):
        raise ConfigError(
            f"accelerate launch asks for {replicas} x {shards} ranks (PARALLELISM_CONFIG_DP_REPLICATE_SIZE, "
            f"_DP_SHARD_SIZE{'' if fsdp else ', without FSDP'})",
            expected=f"a product of {world_size} ranks, and use_fsdp where something is sharded",
            fix=f"--parallelism_config_dp_shard_size {max(1, world_size // replicas)}",
        )
    return {"fsdp.replicas": (replicas, _said(env, f"{prefix}DP_REPLICATE_SIZE"))} if fsdp and replicas > 1 else {}


def _deepspeed(env: Env) -> Choices:
    prefix = "ACCELERATE_DEEPSPEED_"
    if _chosen(env, f"{prefix}MOE_LAYER_CLS_NAMES") is not None:
        raise _refusal(env, f"{prefix}MOE_LAYER_CLS_NAMES", "the variable unset", "leave it out of deepspeed_config")
    variable = f"{prefix}ZERO_STAGE"
    stage, said = env.get(variable, "2"), _said(env, variable)
    choices: Choices = {}
    if (file := _chosen(env, f"{prefix}CONFIG_FILE")) is not None:
        file_stage, choices = _deepspeed_file(Path(file), f"{prefix}CONFIG_FILE={file}")
        if variable in env and stage != file_stage:
            raise ConfigError(
                f"{variable}={stage} and accelerate launch's {file} contradict each other",
                expected=f"stage {stage} in both",
                got=f'"stage": {file_stage} in {file}',
                fix="change one of the two",
            )
        stage, said = file_stage, f"{prefix}CONFIG_FILE={file}"
    if stage not in ("1", "2", "3"):
        raise ConfigError(
            f"accelerate launch asks for DeepSpeed's ZeRO stage {stage} ({said})",
            expected="1, 2 or 3",
            got=stage,
            fix="zero_stage: 2, or no DeepSpeed for 0",
        )
    choices = {"strategy": (f"zero{stage}", said)} | choices | _offload(env, stage)
    variable = "ACCELERATE_GRADIENT_CLIPPING"
    if (text := _chosen(env, variable)) is not None:
        try:
            norm = float(text)
        except ValueError:
            norm = math.nan
        if not 0 <= norm < math.inf:
            raise _refusal(env, variable, "a number, or 0 for no clipping", "gradient_clipping: 1.0")
        if norm > 0:
            choices["max_grad_norm"] = (norm, _said(env, variable))
    return choices


def _offload(env: Env, stage: str) -> Choices:
    offloaded: dict[str, str] = {}
    for what in ("param", "optimizer"):
        variable = f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE"
        device = _chosen(env, variable)
        if device not in (None, "cpu"):
            raise _refusal(env, variable, "none or cpu", f"offload_{what}_device: cpu")
        if device == "cpu":
            offloaded[what] = _said(env, variable)
    if "param" in offloaded and stage != "3":
        raise ConfigError(
            f"{offloaded['param']} with ZeRO stage {stage}",
            expected="stage 3, which shards the parameters",
            got=f"stage {stage}",
            fix="zero_stage: 3, or offload_param_device: none",
        )
    if offloaded and "optimizer" not in offloaded:
        raise ConfigError(
            f"{offloaded['param']} without the optimizer's state",
            expected="both in CPU memory",
            got="offload_optimizer_device: none",
            fix="offload_optimizer_device: cpu",
        )
    value = "parameters" if "param" in offloaded else "optimizer"
    return {"zero.offload": (value, next(iter(offloaded.values())))} if offloaded else {}


def _deepspeed_file(file: Path, said: str) -> tuple[str, Choices]:
    """The ZeRO stage of a DeepSpeed configuration, and the fields that must agree with it.

    The rest of the file is compared with the run when the strategy is built.
    """
    try:
        config: dict[str, Any] = read_object(file)
        zero = config.get("zero_optimization", {})
        stage = str(zero.get("stage", 0))
        devices = {name: (zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param")}
        precisions = [name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True]
        clip = config.get("gradient_clipping")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"accelerate launch's DeepSpeed configuration {file} cannot be read",
            expected='JSON with {"zero_optimization": {"stage": 2}}',
            got=error,
            fix="deepspeed_config_file: FILE",
        ) from error
    choices: Choices = {"zero.config": (file, said)}
    if isinstance(clip, int | float) and clip > 0:
        choices["max_grad_norm"] = (float(clip), said)
    if precisions:
        choices["precision"] = (precisions[0], said)
    if "cpu" in devices.values():
        choices["zero.offload"] = ("parameters" if devices["offload_param"] == "cpu" else "optimizer", said)
    return stage, choices
