"""Which strategy `accelerate launch` asks for: its FSDP_*, DeepSpeed and parallelism variables as fields. No torch.

Variables with the value that accelerate writes unasked count as absent. What these say is done by FSDP2 or here anyway,
so any value is taken: FSDP_VERSION (1 is laid out as 2 would), FSDP_BACKWARD_PREFETCH, FSDP_USE_ORIG_PARAMS,
FSDP_SYNC_MODULE_STATES and FSDP_CPU_RAM_EFFICIENT_LOADING (every rank builds the same model), FSDP_STATE_DICT_TYPE
(checkpoints have a form of their own), and ACCELERATE_DEEPSPEED_ZERO3_INIT and _SAVE_16BIT_MODEL (for transformers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from distkit.errors import ConfigError

#: Field, as `fsdp.wrap` -> its value and the variable that says so.
Choices = dict[str, tuple[object, str]]

_NOT_FSDP2 = ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "FSDP_FORWARD_PREFETCH", "FSDP_IGNORED_MODULES")
#: FSDP 1's sharding strategies by name and by number, as reshard_after_forward and whether each node has a copy.
_SHARDING = {
    "FULL_SHARD": (True, False), "1": (True, False),
    "SHARD_GRAD_OP": (False, False), "2": (False, False),
    "HYBRID_SHARD": (True, True), "4": (True, True),
    "HYBRID_SHARD_ZERO2": (False, True), "5": (False, True),
}  # fmt: skip


def truthy(env: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes."""
    return env.get(name, "").strip().lower() in ("1", "true", "yes", "on")


def _said(env: Mapping[str, str], name: str) -> str | None:
    """The value of a variable, unless it says that nothing was chosen."""
    value = env.get(name, "").strip()
    return None if value.lower() in ("", "none", "false", "no") else value


def _refuse(env: Mapping[str, str], variable: str, expected: str, fix: str) -> ConfigError:
    return ConfigError(f"accelerate launch asks for {variable}={env[variable]}, which distkit does not have",
                       expected=expected, got=f"{variable}={env[variable]}", fix=fix)  # fmt: skip


def asked_strategy(env: Mapping[str, str], world_size: int) -> Choices:
    """The fields that the launcher's environment decides, {} where it leaves the strategy open.

    Raises:
        ConfigError: it asks for something that distkit does not have; the variable is named.
    """
    fsdp, deepspeed = truthy(env, "ACCELERATE_USE_FSDP"), truthy(env, "ACCELERATE_USE_DEEPSPEED")
    choices = _fsdp(env, world_size) if fsdp else _deepspeed(env) if deepspeed else {}
    if truthy(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        choices |= _parallelism(env, world_size, fsdp)
    return choices


def _fsdp(env: Mapping[str, str], world_size: int) -> Choices:
    for variable in _NOT_FSDP2:
        if _said(env, variable) is not None:
            raise _refuse(env, variable, "the variable unset", "leave it out of fsdp_config")
    choices: Choices = {"strategy": ("fsdp", "ACCELERATE_USE_FSDP")}
    choices |= _sharding(env, world_size) | _wrapping(env)
    if truthy(env, "FSDP_OFFLOAD_PARAMS"):
        choices["fsdp.cpu_offload"] = (True, "FSDP_OFFLOAD_PARAMS")
    if truthy(env, "FSDP_ACTIVATION_CHECKPOINTING"):
        variable = "FSDP_ACTIVATION_CHECKPOINTING"
        wrap = choices.get("fsdp.wrap")
        choices["activation_checkpointing.mode"] = ("blocks" if wrap and wrap[0] else "full", variable)
        if wrap and wrap[0]:
            choices["activation_checkpointing.blocks"] = (wrap[0], variable)
    return choices


def _sharding(env: Mapping[str, str], world_size: int) -> Choices:
    variable = "FSDP_SHARDING_STRATEGY"
    named = (_said(env, variable) or "FULL_SHARD").upper()
    if named not in _SHARDING:
        raise _refuse(env, variable, ", ".join(name for name in _SHARDING if not name.isdigit()),
                      "fsdp_sharding_strategy: FULL_SHARD, or no FSDP for NO_SHARD")  # fmt: skip
    reshard, hybrid = _SHARDING[named]
    choices: Choices = {} if reshard else {"fsdp.reshard_after_forward": (False, variable)}
    if env.get("FSDP_RESHARD_AFTER_FORWARD", "").strip().lower() == "false":
        choices["fsdp.reshard_after_forward"] = (False, "FSDP_RESHARD_AFTER_FORWARD")
    if hybrid:
        per_node = env.get("LOCAL_WORLD_SIZE", "")
        nodes = world_size // int(per_node) if per_node.isdigit() and per_node != "0" else 1
        if nodes > 1:
            choices["fsdp.replicas"] = (nodes, variable)
    return choices


def _wrapping(env: Mapping[str, str]) -> Choices:
    variable = "FSDP_AUTO_WRAP_POLICY"
    policy = (_said(env, variable) or "TRANSFORMER_BASED_WRAP").upper()
    if policy == "TRANSFORMER_BASED_WRAP":
        names = _said(env, "FSDP_TRANSFORMER_CLS_TO_WRAP")
        found = tuple(name.strip() for name in (names or "").split(",") if name.strip())
        return {"fsdp.wrap": (found, "FSDP_TRANSFORMER_CLS_TO_WRAP")} if found else {}
    if policy == "SIZE_BASED_WRAP":
        least = env.get("FSDP_MIN_NUM_PARAMS", "100000000")
        return {"fsdp.min_params": (max(1, int(least)) if least.isdigit() else 100_000_000, "FSDP_MIN_NUM_PARAMS")}
    if policy == "NO_WRAP":
        return {"fsdp.wrap": ((), variable)}
    raise _refuse(env, variable, "TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP or NO_WRAP",
                  "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP")  # fmt: skip


def _parallelism(env: Mapping[str, str], world_size: int, fsdp: bool) -> Choices:
    """Replicas and shards; tensor, context and sequence parallelism are not here."""
    prefix = "PARALLELISM_CONFIG_"
    for name in ("TP_SIZE", "CP_SIZE", "SP_SIZE"):
        if env.get(prefix + name, "1") != "1":
            raise _refuse(env, prefix + name, "1", f"parallelism_config_{name.lower()}: 1")
    replicate, shard = (int(env.get(prefix + name, "1")) for name in ("DP_REPLICATE_SIZE", "DP_SHARD_SIZE"))
    variable = f"{prefix}DP_REPLICATE_SIZE"
    if replicate * shard != world_size or (shard > 1 and not fsdp):
        raise ConfigError(
            f"accelerate launch asks for {replicate} x {shard} ranks (PARALLELISM_CONFIG_DP_REPLICATE_SIZE, "
            f"_DP_SHARD_SIZE{'' if fsdp else ', without FSDP'})",
            expected=f"a product of {world_size} ranks, and use_fsdp where something is sharded",
            fix=f"parallelism_config_dp_shard_size: {max(1, world_size // max(1, replicate))}",
        )
    return {"fsdp.replicas": (replicate, variable)} if fsdp and replicate > 1 else {}


def _deepspeed(env: Mapping[str, str]) -> Choices:
    prefix = "ACCELERATE_DEEPSPEED_"
    if _said(env, f"{prefix}MOE_LAYER_CLS_NAMES") is not None:
        raise _refuse(env, f"{prefix}MOE_LAYER_CLS_NAMES", "the variable unset", "leave it out of deepspeed_config")
    choices: Choices = {}
    variable = f"{prefix}ZERO_STAGE"
    stage = env.get(variable, "2")
    if (file := _said(env, f"{prefix}CONFIG_FILE")) is not None:
        variable = f"{prefix}CONFIG_FILE"
        choices["zero.config"] = (Path(file), variable)
        stage = _stage_of(Path(file))
    if stage not in ("1", "2", "3"):
        raise ConfigError(f"accelerate launch asks for DeepSpeed's ZeRO stage {stage} ({variable})",
                          expected="1, 2 or 3", got=stage, fix="zero_stage: 2, or no DeepSpeed for 0")  # fmt: skip
    choices["strategy"] = (f"zero{stage}", variable)
    for what, offload in (("OPTIMIZER", "optimizer"), ("PARAM", "parameters")):
        variable = f"{prefix}OFFLOAD_{what}_DEVICE"
        device = _said(env, variable)
        if device not in (None, "cpu"):
            raise _refuse(env, variable, "none or cpu", f"offload_{what.lower()}_device: cpu")
        if device == "cpu" and (what == "OPTIMIZER" or stage == "3"):
            choices["zero.offload"] = (offload, variable)
    if (clip := _said(env, "ACCELERATE_GRADIENT_CLIPPING")) is not None and float(clip) > 0:
        choices["max_grad_norm"] = (float(clip), "ACCELERATE_GRADIENT_CLIPPING")
    return choices


def _stage_of(file: Path) -> str:
    try:
        section = json.loads(file.read_text()).get("zero_optimization", {})
        return str(section.get("stage", 0))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"accelerate launch's DeepSpeed configuration {file} cannot be read",
                          expected='JSON with {"zero_optimization": {"stage": 2}}', got=error,
                          fix="deepspeed_config_file: FILE") from error  # fmt: skip
