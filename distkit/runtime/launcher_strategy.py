"""Which strategy `accelerate launch` asks for: its FSDP_*, DeepSpeed and parallelism variables as fields. No torch.

Variables with the value that accelerate writes unasked count as absent. What these say is done by FSDP2 or here anyway,
so any value is taken: FSDP_VERSION (1 is laid out as 2 would), FSDP_USE_ORIG_PARAMS,
FSDP_SYNC_MODULE_STATES and FSDP_CPU_RAM_EFFICIENT_LOADING (every rank builds the same model), FSDP_STATE_DICT_TYPE
(checkpoints have a form of their own), and ACCELERATE_DEEPSPEED_ZERO3_INIT and _SAVE_16BIT_MODEL (for transformers).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from distkit.errors import ConfigError

#: Field, as `fsdp.wrap` -> its value and the variable that says so.
Choices = dict[str, tuple[object, str]]

YES, NO = ("1", "true", "yes", "y", "on", "t"), ("", "0", "false", "no", "n", "off", "f", "none")
#: FSDP 1's sharding strategies by name and by number, as reshard_after_forward and whether each node has a copy.
_SHARDING = {
    "FULL_SHARD": (True, False), "1": (True, False),
    "SHARD_GRAD_OP": (False, False), "2": (False, False),
    "HYBRID_SHARD": (True, True), "4": (True, True),
    "HYBRID_SHARD_ZERO2": (False, True), "5": (False, True),
}  # fmt: skip


def switched(env: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes; ConfigError when it says neither yes nor no."""
    value = env.get(name, "").strip().lower()
    if value not in YES and value not in NO:
        raise ConfigError(f"accelerate launch says {name}={env[name]}", expected="true or false", got=env[name],
                          fix=f"true or false for {_option(name)}")  # fmt: skip
    return value in YES


def whole(env: Mapping[str, str], name: str, default: str, least: int = 1) -> int:
    """A whole number, at least `least`; ConfigError when it is none."""
    value = env.get(name, default).strip()
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"accelerate launch says {name}={value}", expected=f"a whole number, at least {least}",
                          got=value, fix=f"{_option(name)}: {default}")  # fmt: skip
    return int(value)


def _option(variable: str) -> str:
    """The option of accelerate's config file behind a variable."""
    return variable.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()


def _said(env: Mapping[str, str], name: str) -> str | None:
    """The value of a variable, unless it says that nothing was chosen."""
    value = env.get(name, "").strip()
    return None if value.lower() in ("", "none", "false", "no", "auto") else value


def _refuse(env: Mapping[str, str], variable: str, expected: str, fix: str) -> ConfigError:
    return ConfigError(f"accelerate launch asks for {variable}={env[variable]}, which distkit does not have",
                       expected=expected, got=f"{variable}={env[variable]}", fix=fix)  # fmt: skip


def asked_strategy(env: Mapping[str, str], world_size: int) -> Choices:
    """The fields that the launcher's environment decides, {} where it leaves the strategy open.

    Raises:
        ConfigError: it asks for something that distkit does not have; the variable is named.
    """
    fsdp, deepspeed = switched(env, "ACCELERATE_USE_FSDP"), switched(env, "ACCELERATE_USE_DEEPSPEED")
    if fsdp and deepspeed:
        raise ConfigError("ACCELERATE_USE_FSDP and ACCELERATE_USE_DEEPSPEED contradict each other",
                          expected="one of the two", fix="--use_fsdp or --use_deepspeed")  # fmt: skip
    choices = _fsdp(env, world_size) if fsdp else _deepspeed(env) if deepspeed else {}
    if switched(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        choices |= _parallelism(env, world_size, fsdp)
    return choices


def _fsdp(env: Mapping[str, str], world_size: int) -> Choices:
    for variable in ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "FSDP_FORWARD_PREFETCH"):
        if switched(env, variable):
            raise _refuse(env, variable, "false", f"{variable.lower()}: false")
    if _said(env, "FSDP_IGNORED_MODULES") is not None:
        raise _refuse(env, "FSDP_IGNORED_MODULES", "the variable unset", "leave it out of fsdp_config")
    if env.get("FSDP_VERSION", "2") not in ("1", "2"):
        raise _refuse(env, "FSDP_VERSION", "2", "fsdp_version: 2")
    if (_said(env, "FSDP_BACKWARD_PREFETCH") or "BACKWARD_PRE").upper() not in ("BACKWARD_PRE", "1"):
        # FSDP2 gathers the next unit before it needs it, always
        raise _refuse(env, "FSDP_BACKWARD_PREFETCH", "BACKWARD_PRE", "fsdp_backward_prefetch: BACKWARD_PRE")
    choices: Choices = {"strategy": ("fsdp", "ACCELERATE_USE_FSDP")}
    choices |= _sharding(env, world_size) | _wrapping(env)
    if switched(env, "FSDP_OFFLOAD_PARAMS"):
        choices["fsdp.cpu_offload"] = (True, "FSDP_OFFLOAD_PARAMS")
    variable = "FSDP_ACTIVATION_CHECKPOINTING"
    if switched(env, variable):
        wrap = choices.get("fsdp.wrap")
        choices["activation_checkpointing.mode"] = ("blocks" if wrap and wrap[0] else "full", variable)
        if wrap and wrap[0]:
            choices["activation_checkpointing.blocks"] = (wrap[0], variable)
    return choices


def _sharding(env: Mapping[str, str], world_size: int) -> Choices:
    variable, newer = "FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD"
    if env.get(newer, "").strip().upper() in _SHARDING.keys() - {"1"}:
        variable = newer  # FSDP 1's way to fill it
    named = (_said(env, variable) or "FULL_SHARD").upper()
    if named not in _SHARDING:
        raise _refuse(env, variable, ", ".join(name for name in _SHARDING if not name.isdigit()),
                      "fsdp_sharding_strategy: FULL_SHARD, or no FSDP for NO_SHARD")  # fmt: skip
    reshard, hybrid = _SHARDING[named]
    choices: Choices = {} if reshard else {"fsdp.reshard_after_forward": (False, variable)}
    if variable != newer and env.get(newer, "") and not switched(env, newer):
        choices["fsdp.reshard_after_forward"] = (False, newer)
    if hybrid:
        nodes = world_size // min(world_size, whole(env, "LOCAL_WORLD_SIZE", str(world_size)))
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
        return {"fsdp.min_params": (whole(env, "FSDP_MIN_NUM_PARAMS", "100000000"), "FSDP_MIN_NUM_PARAMS")}
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
    replicate, shard = (whole(env, prefix + name, "1") for name in ("DP_REPLICATE_SIZE", "DP_SHARD_SIZE"))
    variable = f"{prefix}DP_REPLICATE_SIZE"
    if replicate * shard != world_size or (shard > 1 and not fsdp):
        raise ConfigError(
            f"accelerate launch asks for {replicate} x {shard} ranks (PARALLELISM_CONFIG_DP_REPLICATE_SIZE, "
            f"_DP_SHARD_SIZE{'' if fsdp else ', without FSDP'})",
            expected=f"a product of {world_size} ranks, and use_fsdp where something is sharded",
            fix=f"--parallelism_config_dp_shard_size {max(1, world_size // replicate)}",
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
        choices = _of_file(Path(file), f"{prefix}CONFIG_FILE")
        asked = str(choices.pop("stage", ("0", ""))[0])
        if variable in env and stage != asked:
            raise ConfigError(f"{variable}={stage} and accelerate launch's {file} contradict each other",
                              expected=f"stage {stage} in both", got=f'"stage": {asked} in {file}',
                              fix="change one of the two")  # fmt: skip
        variable, stage = f"{prefix}CONFIG_FILE", asked
    if stage not in ("1", "2", "3"):
        raise ConfigError(f"accelerate launch asks for DeepSpeed's ZeRO stage {stage} ({variable})",
                          expected="1, 2 or 3", got=stage, fix="zero_stage: 2, or no DeepSpeed for 0")  # fmt: skip
    choices["strategy"] = (f"zero{stage}", variable)
    choices |= _offload(env, stage)
    variable = "ACCELERATE_GRADIENT_CLIPPING"
    if (clip := _said(env, variable)) is not None and (norm := _norm(variable, clip)) > 0:
        choices["max_grad_norm"] = (norm, variable)
    return choices


def _norm(variable: str, text: str) -> float:
    try:
        norm = float(text)
    except ValueError:
        norm = math.nan
    if not 0 <= norm < math.inf:
        raise ConfigError(f"accelerate launch says {variable}={text}", expected="a number, or 0 for no clipping",
                          got=text, fix="gradient_clipping: 1.0")  # fmt: skip
    return norm


def _offload(env: Mapping[str, str], stage: str) -> Choices:
    found: dict[str, str] = {}
    for what in ("OPTIMIZER", "PARAM"):
        variable = f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE"
        device = _said(env, variable)
        if device not in (None, "cpu"):
            raise _refuse(env, variable, "none or cpu", f"offload_{what.lower()}_device: cpu")
        if device == "cpu":
            found[what] = variable
    if "PARAM" in found and stage != "3":
        raise ConfigError(f"{found['PARAM']}=cpu with ZeRO stage {stage}", expected="stage 3, which cuts weights",
                          got=f"stage {stage}", fix="zero_stage: 3, or offload_param_device: none")  # fmt: skip
    if "PARAM" in found and "OPTIMIZER" not in found:
        raise ConfigError(f"{found['PARAM']}=cpu without the optimizer's state", expected="both in CPU memory",
                          got="offload_optimizer_device: none", fix="offload_optimizer_device: cpu")  # fmt: skip
    if not found:
        return {}
    what = "PARAM" if "PARAM" in found else "OPTIMIZER"
    return {"zero.offload": ("parameters" if what == "PARAM" else "optimizer", found[what])}


def _of_file(file: Path, variable: str) -> Choices:
    """What a DeepSpeed configuration decides, which the run's options must then say too; its stage as `stage`.

    The rest of it is compared with the run where the strategy is built.
    """
    try:
        said = json.loads(file.read_text())
        zero = said.get("zero_optimization", {})
        devices = {name: (zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param")}
        precisions = [name for name in ("bf16", "fp16") if said.get(name, {}).get("enabled") is True]
        choices: Choices = {"zero.config": (file, variable), "stage": (zero.get("stage", 0), variable)}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"accelerate launch's DeepSpeed configuration {file} cannot be read",
                          expected='JSON with {"zero_optimization": {"stage": 2}}', got=error,
                          fix="deepspeed_config_file: FILE") from error  # fmt: skip
    clip = said.get("gradient_clipping")
    if isinstance(clip, int | float) and clip > 0:
        choices["max_grad_norm"] = (float(clip), variable)
    if precisions:
        choices["precision"] = (precisions[0], variable)
    if "cpu" in devices.values():
        choices["zero.offload"] = ("parameters" if devices["offload_param"] == "cpu" else "optimizer", variable)
    return choices
