"""How a model is laid over ranks, and which activations are recomputed instead of stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from distkit.config.check import flag, require, require_number, require_unused
from distkit.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class StrategyRow:
    """What the rest of distkit knows about one strategy."""

    implementation: str = ""
    """Its class, with the module; empty for auto, which means one of the others."""
    section: str | None = None
    """The section of TrainConfig that it reads."""
    ranks: Literal["one", "several", "any"] = "any"
    """On how many ranks it runs."""


_DATA_PARALLEL = "distkit.strategies.data_parallel.DataParallel"
_DEEPSPEED = "distkit.strategies.deepspeed.strategy.DeepSpeed"
#: --strategy -> its row: a new strategy is a file and a row here. auto is single or ddp, so options of ddp are allowed.
STRATEGIES: dict[str, StrategyRow] = {
    "auto": StrategyRow(section="ddp"),
    "single": StrategyRow(implementation=_DATA_PARALLEL, ranks="one"),
    "ddp": StrategyRow(implementation=_DATA_PARALLEL, section="ddp", ranks="several"),
    "fsdp": StrategyRow(implementation="distkit.strategies.fsdp.FullySharded", section="fsdp", ranks="several"),
    "zero1": StrategyRow(implementation=_DEEPSPEED, section="zero", ranks="several"),
    "zero2": StrategyRow(implementation=_DEEPSPEED, section="zero", ranks="several"),
    "zero3": StrategyRow(implementation=_DEEPSPEED, section="zero", ranks="several"),
}
if TYPE_CHECKING:
    StrategyName = str
else:  # the command line shows the choices
    StrategyName = Literal[tuple(STRATEGIES)]
#: Section -> the strategies that read it.
TAKEN_BY: dict[str, frozenset[str]] = {
    section: frozenset(name for name, row in STRATEGIES.items() if row.section == section)
    for section in dict.fromkeys(row.section for row in STRATEGIES.values() if row.section)
}
Low = Literal["fp32", "bf16"]
Offload = Literal["none", "optimizer", "parameters"]
Recomputed = Literal["none", "full", "blocks", "every"]
UnusedParameters = Literal["refuse", "same", "any"]


@dataclass(frozen=True, kw_only=True)
class DDPConfig:
    """ddp: every rank holds the whole model (torch.nn.parallel.DistributedDataParallel)."""

    bucket_mb: int | None = None
    """MiB of gradients per all-reduce, >= 1; None: torch's 25."""
    bf16_gradients: bool = False
    """All-reduce gradients in bf16: half the traffic, and sums rounded to 8 bits."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over the microbatches of all ranks; GPUs only."""
    static_graph: bool = False
    """Every step uses the same parameters: DDP checks once instead of in each step."""

    def __post_init__(self) -> None:
        require_number("ddp.bucket_mb", self.bucket_mb, least=1, example="25")


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    """fsdp: parameters, gradients and optimizer state in shards (torch.distributed.fsdp.fully_shard)."""

    wrap: tuple[str, ...] | None = None
    """Module classes that are gathered one at a time; None: the model's repeated blocks."""
    min_params: int | None = None
    """Instead of classes: every module with at least this many parameters of its own, >= 1."""
    reshard_after_forward: bool = True
    """Free gathered parameters between forward and backward; off: faster, but more memory."""
    cpu_offload: bool = False
    """Keep parameter shards, gradients and optimizer state in CPU memory."""
    replicas: int | None = None
    """Copies of the sharded model (hybrid sharding), >= 2 and a divisor of the ranks, such as the number of
    nodes."""
    gather_precision: Low = "fp32"
    """Precision in which parameters are gathered; bf16: half the traffic, but also rounds what autocast would not."""
    reduce_precision: Low = "fp32"
    """Precision in which gradients are summed over ranks; bf16: half the traffic."""

    def __post_init__(self) -> None:
        require_number("fsdp.min_params", self.min_params, least=1, example="1000000")
        require_number("fsdp.replicas", self.replicas, least=2, example="2")
        for name in ("gather_precision", "reduce_precision"):
            value = getattr(self, name)
            require(value in get_args(Low), f"fsdp.{name}", "fp32 or bf16", value, "fp32")
        if self.wrap is not None and self.min_params is not None:
            raise ConfigError("--fsdp.wrap and --fsdp.min-params both say what is gathered together",
                              expected="one of the two", fix="--fsdp.min-params None")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """zero1, zero2, zero3: DeepSpeed."""

    offload: Offload = "none"
    """What is kept in CPU memory: none, the optimizer state, or (zero3) the parameters too."""
    config: Path | None = None
    """A DeepSpeed configuration (JSON) that overrides the generated one."""

    def __post_init__(self) -> None:
        require(self.offload in get_args(Offload), "zero.offload", ", ".join(get_args(Offload)), self.offload, "none")


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointingConfig:
    """Activations that the backward recomputes instead of storing them (torch.utils.checkpoint)."""

    mode: Recomputed = "none"
    """none; full: recompute every repeated block of the model; every: every n-th block; blocks: modules of some
    classes."""
    every: int | None = None
    """With mode every: recompute every n-th block, >= 2."""
    blocks: tuple[str, ...] | None = None
    """With mode blocks: the names of the module classes."""

    def __post_init__(self) -> None:
        modes = get_args(Recomputed)
        close = nearest(self.mode, modes) or "full"
        require(self.mode in modes, "activation_checkpointing.mode", ", ".join(modes), self.mode, close)
        require_number("activation_checkpointing.every", self.every, least=2, example="2")
        prefix = "activation_checkpointing."
        own: dict[str, object] = {f"{prefix}every": self.every, f"{prefix}blocks": self.blocks}
        taken = {prefix + self.mode} & own.keys()
        require_unused(f"--activation-checkpointing.mode {self.mode}", own, taken)
        for name in taken:
            example = "2" if name.endswith("every") else "Block"
            require(bool(own[name]), name, f"a value, for mode {self.mode}", own[name], example)


Section = DDPConfig | FSDPConfig | ZeroConfig


def check_sections(strategy: str, sections: Mapping[str, Section]) -> None:
    """Refuse an unknown strategy, and options of one that is not chosen.

    Raises:
        ConfigError: naming the options and what to type.
    """
    require(
        strategy in STRATEGIES, "strategy", ", ".join(STRATEGIES), strategy, nearest(strategy, STRATEGIES) or "auto"
    )
    for name, section in sections.items():
        changed = {f"{name}.{f.name}": getattr(section, f.name) for f in fields(section)
                   if getattr(section, f.name) != f.default}  # fmt: skip
        if changed and strategy not in TAKEN_BY[name]:
            takes = sorted(TAKEN_BY[name] - {"auto"})
            raise ConfigError(
                f"--strategy {strategy} does not take {', '.join(flag(option) for option in changed)}",
                expected=f"--strategy {' or '.join(takes)}",
                got=", ".join(f"{flag(option)} {value}" for option, value in changed.items()),
                fix=f"--strategy {takes[-1]}, or leave out {', '.join(flag(option) for option in changed)}",
            )
    zero = sections.get("zero")
    if isinstance(zero, ZeroConfig) and zero.offload == "parameters" and strategy != "zero3":
        raise ConfigError(f"--zero.offload parameters with --strategy {strategy}", expected="--strategy zero3",
                          got=strategy, fix="--zero.offload optimizer")  # fmt: skip
