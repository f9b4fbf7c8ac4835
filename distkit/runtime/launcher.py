"""What `accelerate launch` put into the environment, merged into the configuration. No torch.

The launcher's values win over a preset's; a flag that says something else is an error that names both (C7).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeVar, cast, get_args

from distkit.config import CompileBackend, CompileMode, Precision, TrainConfig
from distkit.config.check import flag
from distkit.config.strategy import TAKEN_BY
from distkit.errors import ConfigError, nearest
from distkit.runtime.launcher_strategy import asked_strategy, switched

C = TypeVar("C", bound=TrainConfig)
Value = TypeVar("Value")

#: Variable -> what distkit does not have, and what to do; starting without it would be a silent lie.
UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "distributed_type: FSDP or DEEPSPEED for what one GPU cannot hold"),
    "ACCELERATE_USE_SAGEMAKER": ("SageMaker", "compute_environment: LOCAL_MACHINE"),
    "ACCELERATE_USE_IPEX": ("Intel's extension", "ipex_config: {ipex: false}"),
    "ACCELERATE_CPU_AFFINITY": ("cores for each process", "enable_cpu_affinity: false, and taskset or numactl"),
    "ACCELERATE_DEBUG_MODE": ("checks of Accelerate's own collectives", "debug: false; --debug of the recipe instead"),
}


@dataclass(frozen=True)
class _Merge:
    """One configuration and the flags that were typed for it."""

    config: TrainConfig
    typed: Set[str]

    def take(self, name: str, value: Value, variable: str, env: Mapping[str, str]) -> Value:
        """`value` from the environment, unless a flag was typed that differs."""
        mine = reduce(getattr, name.split("."), cast(object, self.config))
        if name in self.typed and mine != value:
            said = env.get(variable)
            raise ConfigError(
                f"{flag(name)} contradicts what accelerate launch says",
                expected=f"{flag(name)} {value} ({variable}{'' if said is None else f'={said}'})",
                got=f"{flag(name)} {mine}",
                fix="change one of the two: the flag, or accelerate launch's option or config file",
            )
        return value


def merge_launcher_env(config: C, typed: Set[str], env: Mapping[str, str], world_size: int) -> C:
    """Honour strategy, mixed precision, dynamo, gradient accumulation and CPU of `accelerate launch`.

    Args:
        config: the parsed configuration.
        typed: names of the fields that the user set by flag or `--config`, such as `optim.lr`.
        env: the environment; variables that accelerate writes for "nothing chosen" count as absent.
        world_size: number of ranks, for the accumulation steps.

    Raises:
        ConfigError: a flag contradicts the launcher, or the launcher asks for something unsupported.
    """
    for variable, (what, fix) in UNSUPPORTED.items():
        if switched(env, variable):
            raise ConfigError(f"accelerate launch asks for {what}, which distkit does not have",
                              got=f"{variable}={env[variable]}", fix=fix)  # fmt: skip
    config = _merge_strategy(config, typed, env, world_size)
    merge = _Merge(config, typed)
    if switched(env, "ACCELERATE_USE_CPU"):
        config = replace(config, device=merge.take("device", "cpu", "ACCELERATE_USE_CPU", env))
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":
        if precision not in ("bf16", "fp16"):
            raise ConfigError(f"accelerate launch asks for mixed precision {precision}", expected="no, bf16 or fp16",
                              got=precision, fix="accelerate launch --mixed_precision bf16")  # fmt: skip
        chosen = merge.take("precision", cast(Precision, precision), "ACCELERATE_MIXED_PRECISION", env)
        config = replace(config, precision=chosen)
    config = _merge_dynamo(config, merge, env)
    return _merge_accumulation(config, typed, env, world_size)


def launched_strategy(env: Mapping[str, str], world_size: int) -> str | None:
    """The strategy that `accelerate launch` asks for; None where it leaves it open.

    Raises:
        ConfigError: it asks for something unsupported.
    """
    name, _ = asked_strategy(env, world_size).get("strategy", (None, ""))
    return None if name is None else str(name)


def _merge_strategy(config: C, typed: Set[str], env: Mapping[str, str], world_size: int) -> C:
    choices = asked_strategy(env, world_size)
    if not choices:
        return config
    merge = _Merge(config, typed - {"strategy"} if config.strategy == "auto" else typed)
    sections: dict[str, dict[str, object]] = {}
    top: dict[str, object] = {}
    for name, (value, variable) in choices.items():
        section, dot, field = name.rpartition(".")
        (sections.setdefault(section, {}) if dot else top)[field] = merge.take(name, value, variable, env)
    strategy = str(top.get("strategy", config.strategy))
    for section, takers in TAKEN_BY.items():
        # a preset's options of another strategy mean nothing to the launcher's; typed ones are refused with it
        if strategy not in takers and not any(name.startswith(f"{section}.") for name in typed):
            top[section] = type(getattr(config, section))()
    if top.get("max_grad_norm") is not None and "max_grad_value" not in typed:
        top["max_grad_value"] = None
    changed = {section: replace(getattr(config, section), **fields) for section, fields in sections.items()}
    return replace(config, **{**top, **changed})


def _merge_dynamo(config: C, merge: _Merge, env: Mapping[str, str]) -> C:
    variable = "ACCELERATE_DYNAMO_BACKEND"
    backend = env.get(variable, "NO").lower()
    if backend == "no":
        return config
    _known("dynamo_backend", backend, get_args(CompileBackend))
    # accelerate writes default and False unasked
    mode = "ACCELERATE_DYNAMO_MODE"
    regional, fullgraph, dynamic = (
        f"ACCELERATE_DYNAMO_USE_{name}" for name in ("REGIONAL_COMPILATION", "FULLGRAPH", "DYNAMIC")
    )
    chosen = env.get(mode, "default")
    _known("dynamo_mode", chosen, get_args(CompileMode))
    return replace(
        config,
        compile=merge.take("compile", True, variable, env),
        compile_backend=merge.take("compile_backend", cast(CompileBackend, backend), variable, env),
        compile_mode=config.compile_mode
        if chosen == "default"
        else merge.take("compile_mode", cast(CompileMode, chosen), mode, env),
        compile_scope=merge.take("compile_scope", "blocks", regional, env)
        if switched(env, regional)
        else config.compile_scope,
        compile_fullgraph=merge.take("compile_fullgraph", True, fullgraph, env)
        if switched(env, fullgraph)
        else config.compile_fullgraph,
        compile_dynamic=merge.take("compile_dynamic", True, dynamic, env)
        if switched(env, dynamic)
        else config.compile_dynamic,
    )


def _known(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = nearest(value, choices) or choices[0]
        raise ConfigError(f"accelerate launch asks for --{option} {value}", expected=", ".join(choices), got=value,
                          fix=f"accelerate launch --{option} {close}")  # fmt: skip


def _merge_accumulation(config: C, typed: Set[str], env: Mapping[str, str], world_size: int) -> C:
    variable = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    text = env.get(variable, "auto").lower()
    # accelerate config writes 1 unasked: a preset's microbatch stays, and a typed one must agree
    if text == "auto" or (text == "1" and "microbatch_size" not in typed):
        return config
    accum_steps = int(text) if text.isdecimal() else 0
    micro, rest = divmod(config.global_batch_size, world_size * max(accum_steps, 1))
    differs = "microbatch_size" in typed and config.microbatch_size not in (None, micro)
    if accum_steps < 1 or rest or differs:
        raise ConfigError(
            f"{variable}={text} does not fit the batch sizes over {world_size} ranks",
            expected="global batch = microbatch x ranks x accumulation steps",
            got=f"--global-batch-size {config.global_batch_size} --microbatch-size {config.microbatch_size}",
            fix="leave gradient_accumulation_steps out: distkit derives it from the two sizes",
        )
    return replace(config, microbatch_size=micro)
