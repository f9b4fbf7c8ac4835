"""DeepSpeed's configuration: a generated one, a user's JSON that overrides it, and what the two must not contradict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from distkit.config import BatchSplit, TrainConfig
from distkit.errors import ConfigError, nearest
from distkit.json_files import JsonError, read_object

Section = dict[str, object]

#: Gradients in one bucket and gathered parameters in one go, at most (DeepSpeed's defaults need 2 GB for tiny models).
BUCKET_NUMEL = 50_000_000
#: Sections that would repeat or contradict the run's own options.
OWN_FLAGS = {
    "activation_checkpointing": "--activation-checkpointing.mode full",
    "optimizer": "--optim.name adamw",
    "scheduler": "--schedule.name cosine",
    "amp": "--precision bf16",
    "checkpoint": "--checkpoint.save-every 1000",
}
#: Sections that change the model, the data or the batch, remember or write something, behind the run's back.
BEHIND = (
    "autotuning", "comet", "compression_training", "csv_monitor", "curriculum_learning", "data_efficiency",
    "eigenvalue", "elasticity", "hybrid_engine", "pipeline", "progressive_layer_drop", "tensor_parallel", "tensorboard",
    "wandb",
)  # fmt: skip
#: All else that a file may hold; DeepSpeed ignores what it does not know.
TAKEN = (
    "aio", "bf16", "comms_logger", "communication_data_type", "dump_state", "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_clipping", "gradient_predivide_factor", "memory_breakdown",
    "prescale_gradients", "steps_per_print", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
#: Options of zero_optimization under which weights or optimizer state are where a checkpoint does not find them.
UNMAPPED = (
    "cpu_offload", "cpu_offload_params", "elastic_checkpoint", "mics_shard_size",
    "stage3_use_all_reduce_for_fetch_params", "zenflow", "zero_hpz_partition_size",
    "zero_quantized_nontrainable_weights", "zero_quantized_weights",
)  # fmt: skip


def deepspeed_config(config: TrainConfig, split: BatchSplit, stage: int, numel: int, *, pinned: bool) -> Section:
    """The configuration of one run.

    Args:
        config: of the run; `config.zero` is read here.
        split: its batch sizes.
        stage: of ZeRO, 1, 2 or 3.
        numel: parameters of the model.
        pinned: whether what is offloaded is in pinned memory, for a GPU to copy from.

    Raises:
        ConfigError: the user's JSON cannot be read, or contradicts the run; both are named.
    """
    generated = generate(config, split, stage, numel, pinned=pinned)
    if config.zero.config is None:
        return generated
    own = read(config.zero.config)
    check(own, config, split, stage)
    merged = merge(generated, own)
    # clipping is done before DeepSpeed's step, and 16 bits are autocast: see the strategy
    return {**merged, "gradient_clipping": 0.0} | {name: {"enabled": False} for name in ("fp16", "bf16")}


def generate(config: TrainConfig, split: BatchSplit, stage: int, numel: int, *, pinned: bool) -> Section:
    """The configuration where a user says nothing."""
    bucket = max(1, min(BUCKET_NUMEL, numel))
    zero: Section = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket // 4,
            # parameters as small as a norm's stay gathered; averaged weights would have to be gathered again
            "stage3_param_persistence_threshold": 0 if config.ema_decay is not None else numel // 10_000,
            "stage3_max_reuse_distance": bucket // 4,
            "stage3_max_live_parameters": max(bucket, numel // 4),
        }
    else:
        # the norm is measured here; DeepSpeed measures its own where it offloads
        zero["compute_grad_norm"] = config.zero.offload != "none"
    place = {"device": "cpu", "pin_memory": pinned}
    if config.zero.offload != "none":
        zero["offload_optimizer"] = place
    if config.zero.offload == "parameters":
        zero["offload_param"] = place
    section: Section = {
        "train_batch_size": split.global_batch_size,
        "train_micro_batch_size_per_gpu": split.microbatch_size,
        "gradient_accumulation_steps": split.accum_steps,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        # any optimizer that goes element by element; the strategy knows which do
        "zero_allow_untested_optimizer": True,
        # torch's fused Adam on the CPU needs no compiler
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.precision in ("bf16", "fp16"):
        dtype = "bfloat16" if config.precision == "bf16" else "float16"
        section["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return section


def read(path: Path) -> Section:
    """A user's configuration.

    Raises:
        ConfigError: it is missing or not a JSON object.
    """
    try:
        return read_object(path)
    except (OSError, JsonError) as error:
        raise ConfigError(f"--zero.config {path} cannot be read", expected="a JSON file", got=error,
                          fix="--zero.config FILE") from error  # fmt: skip


def merge(below: Mapping[str, object], above: Mapping[str, object]) -> Section:
    """`above` over `below`, section by section; "auto" leaves what is below."""
    merged = dict(below)
    for name, value in above.items():
        under = below.get(name)
        if value == "auto":
            continue
        merged[name] = merge(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return _without_auto(merged)


def _without_auto(section: Section) -> Section:
    kept = {name: _without_auto(value) if isinstance(value, dict) else value for name, value in section.items()}
    return {name: value for name, value in kept.items() if value != "auto"}


def check(own: Section, config: TrainConfig, split: BatchSplit, stage: int) -> None:
    """Refuse a user's configuration that contradicts the run.

    Raises:
        ConfigError: naming both.
    """
    where = f"--zero.config {config.zero.config}"
    zero = _section(own, "zero_optimization", where)
    clip = config.max_grad_norm
    said: dict[str, tuple[object, object, str]] = {
        "train_batch_size": (
            own.get("train_batch_size"), split.global_batch_size, f"--global-batch-size {own.get('train_batch_size')}"
        ),
        "train_micro_batch_size_per_gpu": (
            own.get("train_micro_batch_size_per_gpu"), split.microbatch_size,
            f"--microbatch-size {own.get('train_micro_batch_size_per_gpu')}",
        ),
        "gradient_accumulation_steps": (
            own.get("gradient_accumulation_steps"), split.accum_steps, "--microbatch-size: the steps follow from it"
        ),
        "gradient_clipping": (
            own.get("gradient_clipping") or None, clip, f"--max-grad-norm {own.get('gradient_clipping')}"
        ),
        "zero_allow_untested_optimizer": (own.get("zero_allow_untested_optimizer"), True, '"auto"'),
        "zero_optimization.stage": (
            zero.get("stage"), stage,
            f"--strategy zero{zero.get('stage')}" if zero.get("stage") in (1, 2, 3) else "--strategy ddp",
        ),
    }  # fmt: skip
    if "gradient_clipping" in own and own["gradient_clipping"] in (0, 0.0) and clip is not None:
        said["gradient_clipping"] = (own["gradient_clipping"], clip, "--max-grad-norm None")
    for name, (theirs, ours, fix) in said.items():
        if theirs is not None and theirs != "auto" and theirs != ours:
            raise ConfigError(f"{where} and the run contradict each other in {name}",
                              expected=f"{ours}, as in the run", got=f"{theirs}",
                              fix=f"{fix}, or leave it out of the file")  # fmt: skip
    for name, fix in OWN_FLAGS.items():
        if name in own:
            raise ConfigError(f'{where}: "{name}" is set by the run\'s own options', expected="a file without it",
                              got=json.dumps(own[name])[:80], fix=fix)  # fmt: skip
    for name in BEHIND:
        section = own.get(name)
        if section not in (None, {}, "auto") and not (isinstance(section, dict) and section.get("enabled") is False):
            raise ConfigError(f'{where}: "{name}" acts behind the run\'s back', got=section,
                              expected="a file without it", fix=f'leave "{name}" out')  # fmt: skip
    for name in sorted(own.keys() - {*TAKEN, *BEHIND}):
        close = nearest(name, TAKEN)
        raise ConfigError(f'{where}: "{name}" is not taken', expected=f"one of {', '.join(TAKEN)}", got=name,
                          fix=f'"{close}"' if close else f'leave "{name}" out')  # fmt: skip
    _check_precision(own, config, where)
    _check_zero(zero, config, where)


def _section(own: Mapping[str, object], name: str, where: str) -> Section:
    section = own.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f'{where}: "{name}" is not a section', expected="{...}", got=section, fix=f'"{name}": {{}}')
    return cast(Section, section)


def _check_precision(own: Section, config: TrainConfig, where: str) -> None:
    """Weights stay fp32 and forward passes are autocast; a file may say which dtype, and no more."""
    for name in ("fp16", "bf16"):
        section = _section(own, name, where)
        enabled = section.get("enabled", False)
        if enabled not in (False, "auto") and config.precision != name:
            raise ConfigError(f'{where} and the run contradict each other in "{name}"',
                              expected=f"--precision {name}, or no such section", got=f"--precision {config.precision}",
                              fix=f"--precision {name}")  # fmt: skip
        if others := sorted(key for key, value in section.items() if key != "enabled" and value != "auto"):
            raise ConfigError(f'{where}: "{name}" holds {", ".join(others)}: weights stay fp32 here and forward passes '
                              "are autocast by torch", expected=f'"{name}": {{"enabled": true}}',
                              fix=f"--precision {name}, and no such options in the file")  # fmt: skip
    autocast = _section(own, "torch_autocast", where)
    for name in ("enabled", "dtype"):
        if name in autocast:
            raise ConfigError(f'{where}: "torch_autocast" holds {name}, which is set by --precision',
                              expected="lower_precision_safe_modules alone", got=autocast[name],
                              fix="--precision bf16")  # fmt: skip
    if autocast and config.precision not in ("bf16", "fp16"):
        raise ConfigError(f'{where} holds "torch_autocast"', expected="--precision bf16 or fp16",
                          got=f"--precision {config.precision}", fix="--precision bf16")  # fmt: skip


def _is_off(value: object) -> bool:
    """Not said, False, or the number of parts that cuts nothing."""
    return value in (None, "auto") or value is False or (value in (-1, 1) and value is not True)


def _check_zero(zero: Section, config: TrainConfig, where: str) -> None:
    for name in UNMAPPED:
        if not _is_off(zero.get(name)):
            raise ConfigError(f"{where}: zero_optimization.{name} keeps state where checkpoints do not find it",
                              expected="a file without it", got=zero[name], fix=f'leave "{name}" out')  # fmt: skip
    if zero.get("stage3_param_persistence_threshold") not in (None, 0, "auto") and config.ema_decay is not None:
        raise ConfigError(f"{where}: stage3_param_persistence_threshold with --ema-decay: averaged weights are "
                          "evaluated from their shards", expected="0", got=zero["stage3_param_persistence_threshold"],
                          fix='"stage3_param_persistence_threshold": 0')  # fmt: skip
    chosen = config.zero.offload
    for name, wanted in (("offload_optimizer", chosen != "none"), ("offload_param", chosen == "parameters")):
        section = _section(zero, name, f"{where}: zero_optimization")
        device = section.get("device", "auto" if section == {} else "none")
        if device in (None, "auto"):
            continue
        if device not in ("none", "cpu"):
            raise ConfigError(f"{where}: {name}.device {device} keeps state where checkpoints do not find it",
                              expected="cpu or none", got=device, fix=f'"{name}": {{"device": "cpu"}}')  # fmt: skip
        if (device == "cpu") != wanted:
            right = "parameters" if name == "offload_param" else "optimizer"
            raise ConfigError(f"{where} and --zero.offload {chosen} contradict each other in {name}",
                              expected=f'device {"cpu" if wanted else "none"}', got=f"device {device}",
                              fix=f"--zero.offload {right if device == 'cpu' else 'none'}")  # fmt: skip
        if section.get("ratio", 1.0) != 1.0 or section.get("super_offload"):
            raise ConfigError(f"{where}: {name} in part", expected="all of it or nothing",
                              got=json.dumps(section)[:80], fix=f'"{name}": {{"device": "cpu"}}')  # fmt: skip
