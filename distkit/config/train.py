"""The configuration of a run. A recipe's own `Config` inherits from `TrainConfig` and adds its fields."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

from distkit.config.check import flag, require, require_number
from distkit.config.checkpoint import CheckpointConfig, ResumeConfig
from distkit.config.choice import Choice, describe, from_values
from distkit.config.data import DataConfig
from distkit.config.every import Epochs
from distkit.config.optim import OPTIMIZERS, SGD, OptimConfig
from distkit.config.schedule import SCHEDULES, Constant, ScheduleConfig
from distkit.config.stop import StopConfig
from distkit.config.strategy import (
    ActivationCheckpointingConfig,
    DDPConfig,
    FSDPConfig,
    StrategyName,
    UnusedParameters,
    ZeroConfig,
    check_sections,
)
from distkit.errors import ConfigError

C = TypeVar("C", bound="TrainConfig")

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Device = Literal["auto", "cuda", "mps", "cpu"]
Split = Literal["train", "test"]
CompileScope = Literal["auto", "whole", "blocks"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
CompileBackend = Literal["inductor", "aot_eager", "eager", "cudagraphs"]
OnNan = Literal["raise", "skip", "rollback"]

#: Steps that a run may leave out; more of them have a reason that skipping does not cure.
MAX_SKIPS = 10
#: Fields that decide which samples a step reads: with another value it would be another run.
FIXED = ("seed", "global_batch_size")
#: Sections that are one of several classes, and these classes by name.
CHOICES: dict[str, Mapping[str, type[Choice]]] = {"optim": OPTIMIZERS, "schedule": SCHEDULES}


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Slow checks that explain a failure: one process, deterministic, anomaly detection, module by module."""

    enabled: bool = False
    """Run in debug mode; `--debug` alone does the same."""
    num_steps: int = 3
    """Steps to run, >= 1."""
    overfit_batches: int | None = None
    """Train on this many batches over and over until the loss is near zero, >= 1."""
    pdb: bool = False
    """Open the debugger at the exception that ends the run."""

    def __post_init__(self) -> None:
        if self.overfit_batches is not None and self.num_steps != 3:
            raise ConfigError(
                "--debug.num-steps and --debug.overfit-batches contradict each other",
                expected="one of the two: overfitting ends when the loss is near zero",
                fix="--debug.num-steps 3",
            )
        require_number("debug.num_steps", self.num_steps, least=1, example="3")
        require_number("debug.overfit_batches", self.overfit_batches, least=1, example="1")


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """Where the values of a run are reported; an observer cannot change anything."""

    console: bool = True
    """Progress on the terminal (rank 0 only)."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run directory; needs distkit[tensorboard]."""
    wandb: bool = False
    """Also report to Weights & Biases; needs distkit[wandb]. WANDB_PROJECT, WANDB_MODE… are honoured."""
    also: tuple[str, ...] | None = None
    """More observers, by their names in the table in distkit/observers/__init__.py."""


#: Metadata of the fields that debug mode sets back to their defaults: how a step is executed, not what it computes.
_PLAIN = {"reset_by_debug": True}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every recipe has."""

    seed: int = 0
    """Seed of the sample stream, the initial weights and every random draw, 0 to 2^63 - 1."""
    run_dir: Path | None = None
    """Directory of this run; None: runs/RECIPE/DATE_TIME."""
    num_epochs: float | None = None
    """Length of the run in passes over the training set, > 0."""
    num_steps: int | None = None
    """Length of the run in steps, >= 1; set one of the two."""
    global_batch_size: int = 128
    """Samples per optimizer update, over all ranks and microbatches."""
    microbatch_size: int | None = None
    """Samples per forward and backward on one rank; None: global batch / ranks (no accumulation)."""
    precision: Precision = "fp32"
    """fp32; tf32: fp32 on NVIDIA's tensor cores; bf16 or fp16: autocast, with fp32 weights."""
    strategy: StrategyName = field(default="auto", metadata=_PLAIN)
    """How the model is laid out over the ranks; auto: single on one rank, ddp on several."""
    unused_parameters: UnusedParameters = field(default="refuse", metadata=_PLAIN)
    """Parameters that some step's loss does not depend on, as with layer drop. refuse: an error that names them; same:
    allowed, where all ranks leave out the same ones; any: each rank its own. ddp then searches each forward for them;
    fsdp compares the ranks before each exchange, and with any it gathers the whole model at once; zero refuses both."""
    device: Device = "auto"
    """auto: cuda if there is one, else mps, else cpu."""
    deterministic: bool = field(default=True, metadata=_PLAIN)
    """Use kernels that give the same bits every time; off: the fastest ones (cuDNN autotuning)."""
    channels_last: bool = False
    """Store images as NHWC, and convolution weights too unless they are sharded; faster on most devices."""
    compile: bool = field(default=False, metadata=_PLAIN)
    """Run the model through torch.compile."""
    compile_scope: CompileScope = field(default="auto", metadata=_PLAIN)
    """whole: the model as one; blocks: each repeated block, which compiles sooner; auto: blocks under fsdp and
    zero."""
    compile_backend: CompileBackend = field(default="inductor", metadata=_PLAIN)
    """Backend of torch.compile."""
    compile_mode: CompileMode = field(default="default", metadata=_PLAIN)
    """Mode of torch.compile."""
    compile_fullgraph: bool = field(default=False, metadata=_PLAIN)
    """Raise at a graph break instead of splitting the model there."""
    compile_dynamic: bool = field(default=False, metadata=_PLAIN)
    """Compile kernels for any batch size instead of one kernel per size."""
    max_grad_norm: float | None = None
    """Scale gradients down to this global L2 norm, > 0; None: off."""
    max_grad_value: float | None = None
    """Clamp each gradient element (of complex ones both parts) to +- this value, > 0; None: off."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights, which is then evaluated, in (0, 1); None: off."""
    peak_tflops: float | None = None
    """Peak dense TFLOP/s of one rank's device in this precision, > 0, for mfu; None: its data sheet's, if known."""
    num_threads: int | None = None
    """CPU threads per rank, >= 1; None: OMP_NUM_THREADS if above 1, else cores / ranks."""
    on_nan: OnNan = field(default="raise", metadata=_PLAIN)
    """What all ranks do when the loss or a gradient of one is NaN or infinite. raise: end the run at the next report.
    skip: leave that update out. rollback: go back to the last checkpoint, and leave that global batch out this time."""
    max_skips: int = field(default=MAX_SKIPS, metadata=_PLAIN)
    """Steps that --on-nan skip or rollback may leave out in the whole run before it ends, >= 1."""
    report_every: int = 50
    """Steps between train lines, >= 1."""
    eval_every: int | Epochs | None = None
    """Steps between evaluations, >= 1, or epochs, as 1e; None: only at the end."""
    eval_batch_size: int | None = None
    """Samples per evaluation batch on one rank, >= 1; None: the microbatch size."""
    timeout_seconds: float = 1800.0
    """The run ends when a collective or a batch takes longer than this, > 0."""
    start_timeout_seconds: float = 300.0
    """The run ends when its ranks have not found each other after this, > 0."""
    watchdog_seconds: float | None = 1800.0
    """The run ends, and says where, when a rank has not got on for so long, > 0; None: off."""
    ddp: DDPConfig = field(default_factory=DDPConfig, metadata=_PLAIN)
    """Options of ddp."""
    fsdp: FSDPConfig = field(default_factory=FSDPConfig, metadata=_PLAIN)
    """Options of fsdp."""
    zero: ZeroConfig = field(default_factory=ZeroConfig, metadata=_PLAIN)
    """Options of zero1, zero2 and zero3."""
    activation_checkpointing: ActivationCheckpointingConfig = field(
        default_factory=ActivationCheckpointingConfig, metadata=_PLAIN
    )
    """Activations that the backward recomputes."""
    optim: OptimConfig = field(default_factory=SGD)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=Constant)
    """The learning rate over the steps."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the state is saved, and what is kept."""
    stop: StopConfig = field(default_factory=StopConfig)
    """When the run ends early."""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    """Where the run starts from."""
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    """Where the values of the run are reported."""
    debug: DebugConfig = field(default_factory=DebugConfig)
    """Debug mode."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", "an integer in [0, 2^63)", self.seed, "0")
        if (self.num_epochs is None) == (self.num_steps is None):
            both = self.num_epochs is not None
            raise ConfigError(
                "--num-epochs and --num-steps: " + ("both are set" if both else "neither is set"),
                expected="one of the two, the other None",
                got=f"--num-epochs {self.num_epochs} --num-steps {self.num_steps}",
                fix=f"--num-epochs None --num-steps {self.num_steps}" if both else "--num-epochs 10",
            )
        require(self.precision in get_args(Precision), "precision", "fp32, tf32, bf16 or fp16", self.precision, "bf16")
        examples = {"num_steps": "1000", "global_batch_size": "128", "microbatch_size": "64", "report_every": "50",
                    "eval_every": "500", "max_skips": "10"}  # fmt: skip
        for name, example in examples.items():
            if not isinstance(getattr(self, name), Epochs):
                require_number(name, getattr(self, name), least=1, example=example)
        require_number("global_batch_size", self.global_batch_size, most=2**40, example="128")
        require_number("eval_batch_size", self.eval_batch_size, least=1, example="256")
        require_number("num_threads", self.num_threads, least=1, most=512, example="2")
        if self.run_dir is not None:
            require(self.run_dir != Path(), "run_dir", "a directory of its own", repr(str(self.run_dir)), "runs/NAME")
        require(self.unused_parameters in get_args(UnusedParameters), "unused_parameters", "refuse, same or any",
                self.unused_parameters, "any")  # fmt: skip
        self._check_compile()
        self._check_on_nan()
        check_sections(self.strategy, {"ddp": self.ddp, "fsdp": self.fsdp, "zero": self.zero})
        for name in ("num_epochs", "max_grad_norm", "max_grad_value", "peak_tflops", "timeout_seconds",
                     "start_timeout_seconds", "watchdog_seconds"):  # fmt: skip
            require_number(name, getattr(self, name), above=0, example="1")
        require_number("ema_decay", self.ema_decay, above=0, below=1, example="0.999")
        if self.max_grad_norm is not None and self.max_grad_value is not None:
            raise ConfigError(
                "--max-grad-norm and --max-grad-value clip the same gradients twice",
                expected="one of the two",
                fix="--max-grad-value None",
            )
        if self.optim.needs_closure and self.precision == "fp16":
            raise ConfigError(
                f"--optim.name {self.optim.name} cannot scale gradients",
                expected="fp32, tf32 or bf16",
                got="fp16",
                fix="--precision fp32",
            )

    def _check_compile(self) -> None:
        """Options of torch.compile mean nothing without it."""
        defaults = {"compile_scope": "auto", "compile_backend": "inductor", "compile_mode": "default",
                    "compile_fullgraph": False, "compile_dynamic": False}  # fmt: skip
        set_ = [flag(name) for name, default in defaults.items() if getattr(self, name) != default]
        if set_ and not self.compile:
            raise ConfigError(f"{', '.join(set_)} without --compile", expected="--compile too", fix="--compile")

    def _check_on_nan(self) -> None:
        """Refuse a choice that would be ignored, or that cannot be done."""
        require(self.on_nan in get_args(OnNan), "on_nan", "raise, skip or rollback", self.on_nan, "skip")
        if self.on_nan == "raise" and self.max_skips != MAX_SKIPS:
            raise ConfigError("--max-skips without --on-nan skip or rollback", expected="one of them too",
                              got=f"--max-skips {self.max_skips}", fix="--on-nan skip")  # fmt: skip
        if self.on_nan != "raise" and self.optim.needs_closure:
            raise ConfigError(f"--optim.name {self.optim.name} moves the weights several times in a step, before it is "
                              "known whether all of them are finite", expected="--on-nan raise",
                              got=f"--on-nan {self.on_nan}", fix="--on-nan raise")  # fmt: skip
        if self.on_nan == "rollback" and not self.checkpoint.enabled:
            raise ConfigError("--on-nan rollback goes back to a checkpoint, and none is saved",
                              expected="--checkpoint.enabled, or another choice", got="--checkpoint.no-enabled",
                              fix="--on-nan skip")  # fmt: skip


def reset_for_debugging(config: C) -> C:
    """`config` executed in the plainest way: one process, deterministic, not compiled, nothing recomputed."""
    plain: dict[str, object] = {}
    for f in fields(TrainConfig):
        if f.metadata.get("reset_by_debug"):
            plain[f.name] = f.default if f.default_factory is MISSING else f.default_factory()
    return replace(config, **plain)  # type: ignore[arg-type]


def to_json(config: TrainConfig) -> dict[str, object]:
    """The configuration as config.json holds it; `--config` takes it back."""
    values = asdict(config)
    for section in CHOICES:
        values[section] = describe(getattr(config, section))
    return cast(dict[str, object], json.loads(json.dumps(values, default=str)))


def fill_defaults(saved: Mapping[str, object]) -> dict[str, object]:
    """`saved`, from a config.json, with an optimizer's and a schedule's defaults where it has null.

    A section that this version cannot read stays as it is.
    """
    filled = dict(saved)
    for section, table in CHOICES.items():
        with contextlib.suppress(ConfigError, TypeError, ValueError, AttributeError):
            chosen = from_values(table, cast(Mapping[str, object], saved.get(section, {})))
            filled[section] = json.loads(json.dumps(describe(chosen)))
    return filled


@dataclass(frozen=True, kw_only=True)
class BatchSplit:
    """How one global batch is cut: `accum_steps` microbatches on each of `world_size` ranks."""

    global_batch_size: int
    microbatch_size: int
    world_size: int

    @cached_property
    def accum_steps(self) -> int:
        """Microbatches a rank does for one step."""
        return self.global_batch_size // (self.microbatch_size * self.world_size)


def split_batch(config: TrainConfig, world_size: int) -> BatchSplit:
    """Cut config.global_batch_size over `world_size` ranks.

    Raises:
        ConfigError: it does not divide; the message names the nearest size that does.
    """
    total = config.global_batch_size
    if total < world_size:
        raise ConfigError(
            f"--global-batch-size {total} gives {world_size} ranks less than one sample each",
            expected=f"at least {world_size} for {world_size} ranks",
            got=total,
            fix=f"--global-batch-size {world_size * (config.microbatch_size or 1)}, or start at most {total} ranks",
        )
    if config.microbatch_size is None and total % world_size == 0:
        return BatchSplit(global_batch_size=total, microbatch_size=total // world_size, world_size=world_size)
    unit = world_size * (config.microbatch_size or 1)
    if total % unit:
        near = total // unit * unit or unit  # the data have enough samples for a smaller one
        cut = f"{world_size} ranks" + (f" x microbatches of {config.microbatch_size}" if config.microbatch_size else "")
        fix = f"--global-batch-size {near}"
        if total % world_size == 0 and config.microbatch_size:
            closest = min(divisors(total // world_size), key=lambda m: abs(m - (config.microbatch_size or 1)))
            fix += f" or --microbatch-size {closest}"
        raise ConfigError(
            f"--global-batch-size {total} does not divide into {cut}",
            expected=f"a multiple of {unit}",
            got=total,
            fix=fix,
        )
    return BatchSplit(global_batch_size=total, microbatch_size=unit // world_size, world_size=world_size)


def divisors(number: int) -> list[int]:
    """The whole numbers that divide `number`, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def ranks_that_fit(config: TrainConfig, near: int) -> list[int]:
    """The next smaller and the next larger number of ranks over which the global batch of `config` divides."""
    unit = config.microbatch_size or 1
    fitting = [] if config.global_batch_size % unit else divisors(config.global_batch_size // unit)
    return [ranks for ranks in (max((r for r in fitting if r < near), default=0),
                                min((r for r in fitting if r > near), default=0)) if ranks]  # fmt: skip
