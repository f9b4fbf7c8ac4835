"""The optimizers: one class each, with the fields that it takes and what the rest of distkit must know about it.

A new optimizer is a class here (or in a file of its own) and its entry in `OPTIMIZERS`; no other module has a table
of optimizers. Fields have torch's names and defaults, except for lr and weight_decay, which are 0.1 and 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from distkit.config.check import require
from distkit.config.choice import Choice, number

_CPU_AND_GPU = frozenset({"cuda", "mps", "cpu"})


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Choice):
    """What every optimizer has. Class attributes are facts about the torch class, not settings."""

    section = "optim"
    torch_class: ClassVar[str]
    """Where the optimizer's class is imported from, with its module."""
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Our field -> torch's argument, where they differ."""
    has_weight_decay: ClassVar[bool] = True
    """Whether the torch class takes weight_decay."""
    fused_on: ClassVar[frozenset[str]] = frozenset()
    """Device types on which torch >= 2.11 has the fused kernel."""
    fused_takes_dtensors: ClassVar[bool] = False
    """Whether torch.distributed.tensor has a sharding rule for the fused kernel."""
    takes_sparse: ClassVar[bool] = False
    """Whether it updates parameters with sparse gradients."""
    takes_dense: ClassVar[bool] = True
    """Whether it updates parameters with dense gradients."""
    takes_shards: ClassVar[bool] = True
    """Whether it updates DTensors as it would the whole parameters (fsdp)."""
    takes_flat_shards: ClassVar[bool] = False
    """Whether it treats each element by itself, so that it can update runs of elements of any parameters (DeepSpeed),
    and has no state before its first step."""
    needs_closure: ClassVar[bool] = False
    """Whether its step evaluates the loss by itself; it then takes one parameter group."""
    flattens_parameters: ClassVar[bool] = False
    """Whether it keeps all parameters in one vector, in the order of its group; they must be contiguous."""
    splits_matrices: ClassVar[bool] = False
    """Whether it wants each group's "kind": "muon" for hidden matrices, "adamw" for the rest."""
    state_depends_on: ClassVar[tuple[str, ...]] = ()
    """Keys of a parameter group that decide which state there is; of momentum only whether it is zero."""
    scalar_state: ClassVar[frozenset[str]] = frozenset({"step"})
    """Entries of a parameter's state that are a single number: plain tensors, even when parameters are DTensors."""
    scalars_on_device: ClassVar[bool] = False
    """Whether these are on the parameter's device even if the kernel is neither fused nor capturable."""
    contiguous_state: ClassVar[frozenset[str]] = frozenset()
    """Entries that are contiguous whatever the memory format of their parameter."""

    lr: float = number(0.1, above=0)
    """Peak learning rate, > 0; the schedule multiplies it."""
    weight_decay: float = number(0.0, least=0, example="5e-4")
    """Weight decay, >= 0, as the chosen torch class applies it (decoupled in adamw, muon and adafactor)."""
    decay_all: bool = False
    """Also decay norms and biases (parameters with fewer than two dims)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.has_weight_decay:
            require(self.weight_decay == 0, "optim.weight_decay", f"0: {self.name} has none", self.weight_decay, "0")


@dataclass(frozen=True, kw_only=True)
class SGD(OptimConfig):
    """Stochastic gradient descent, with or without momentum."""

    name = "sgd"
    torch_class = "torch.optim.SGD"
    fused_on = _CPU_AND_GPU
    takes_sparse = True
    takes_flat_shards = True
    state_depends_on = ("momentum", "kind")

    momentum: float = number(0.0, least=0, below=1, example="0.9")
    """Momentum, in [0, 1)."""
    dampening: float = number(0.0, least=0, most=1, example="0")
    """Dampening of the momentum, in [0, 1]."""
    nesterov: bool = False
    """Nesterov momentum; needs momentum > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov:
            ok = self.momentum > 0 and self.dampening == 0
            require(ok, "optim.momentum", "> 0 with nesterov, and no dampening", self.momentum, "0.9")


@dataclass(frozen=True, kw_only=True)
class _Moments(OptimConfig):
    """What Adam and its relatives have in common."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment, each in [0, 1)."""
    eps: float = number(1e-8, above=0)
    """Added to the denominator, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = all(0 <= beta < 1 for beta in self.betas)
        require(ok, "optim.betas", "two numbers in [0, 1)", self.betas, "0.9 0.999")


@dataclass(frozen=True, kw_only=True)
class Adam(_Moments):
    """Adam."""

    name = "adam"
    torch_class = "torch.optim.Adam"
    fused_on = _CPU_AND_GPU
    fused_takes_dtensors = True
    takes_flat_shards = True
    state_depends_on = ("amsgrad",)

    amsgrad: bool = False
    """Use the maximum of all second moments so far (AMSGrad)."""


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay."""

    name = "adamw"
    torch_class = "torch.optim.AdamW"


@dataclass(frozen=True, kw_only=True)
class Adamax(_Moments):
    """Adam with the infinity norm."""

    name = "adamax"
    torch_class = "torch.optim.Adamax"
    takes_flat_shards = True


@dataclass(frozen=True, kw_only=True)
class RAdam(_Moments):
    """Rectified Adam."""

    name = "radam"
    torch_class = "torch.optim.RAdam"
    takes_flat_shards = True

    decoupled_weight_decay: bool = False
    """Decay the weights directly rather than through the gradient."""


@dataclass(frozen=True, kw_only=True)
class NAdam(RAdam):
    """Adam with Nesterov momentum."""

    name = "nadam"
    torch_class = "torch.optim.NAdam"
    scalar_state = frozenset({"step", "mu_product"})

    momentum_decay: float = number(4e-3, least=0)
    """Decay of the momentum, >= 0."""


@dataclass(frozen=True, kw_only=True)
class RMSprop(OptimConfig):
    """RMSprop."""

    name = "rmsprop"
    torch_class = "torch.optim.RMSprop"
    takes_flat_shards = True
    state_depends_on = ("momentum", "centered")

    momentum: float = number(0.0, least=0, below=1, example="0.9")
    """Momentum, in [0, 1)."""
    alpha: float = number(0.99, above=0)
    """Smoothing constant of the second moment, > 0."""
    eps: float = number(1e-8, above=0)
    """Added to the denominator, > 0."""
    centered: bool = False
    """Normalise by the variance instead of the second moment."""


@dataclass(frozen=True, kw_only=True)
class Rprop(OptimConfig):
    """Resilient backpropagation."""

    name = "rprop"
    torch_class = "torch.optim.Rprop"
    takes_flat_shards = True
    has_weight_decay = False

    etas: tuple[float, float] = (0.5, 1.2)
    """Factors for shrinking (0..1) and growing (> 1) a step."""
    step_sizes: tuple[float, float] = (1e-6, 50.0)
    """Smallest and largest step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.etas[0] < 1 < self.etas[1], "optim.etas", "0 < first < 1 < second", self.etas, "0.5 1.2")
        low, high = self.step_sizes
        require(0 < low <= high, "optim.step_sizes", "0 < smallest <= largest", self.step_sizes, "1e-6 50")


@dataclass(frozen=True, kw_only=True)
class Adagrad(OptimConfig):
    """Adagrad."""

    name = "adagrad"
    torch_class = "torch.optim.Adagrad"
    fused_on = frozenset({"cpu"})  # its CUDA kernel is younger than torch 2.11
    takes_sparse = True
    takes_flat_shards = False  # its state is made with it, for the parameters that it is given

    lr_decay: float = number(0.0, least=0)
    """Adagrad's own decay of the learning rate, >= 0."""
    initial_accumulator_value: float = number(0.0, least=0)
    """Initial sum of squares, >= 0."""
    eps: float = number(1e-10, above=0)
    """Added to the denominator, > 0."""


@dataclass(frozen=True, kw_only=True)
class Adadelta(OptimConfig):
    """Adadelta."""

    name = "adadelta"
    torch_class = "torch.optim.Adadelta"
    takes_flat_shards = True

    rho: float = number(0.9, least=0, most=1)
    """Averaging constant, in [0, 1]."""
    eps: float = number(1e-6, above=0)
    """Added to the denominator, > 0."""


@dataclass(frozen=True, kw_only=True)
class ASGD(OptimConfig):
    """Averaged stochastic gradient descent."""

    name = "asgd"
    torch_class = "torch.optim.ASGD"
    takes_flat_shards = True
    scalar_state = frozenset({"step", "eta", "mu"})
    scalars_on_device = True

    lambd: float = number(1e-4, least=0)
    """Decay term, >= 0."""
    alpha: float = number(0.75, above=0)
    """Power of the update of eta, > 0."""
    t0: float = number(1e6, least=0)
    """Step at which averaging starts, >= 0."""


@dataclass(frozen=True, kw_only=True)
class Adafactor(OptimConfig):
    """Adafactor: second moments of matrices as a row and a column."""

    name = "adafactor"
    torch_class = "torch.optim.Adafactor"
    renamed = MappingProxyType({"clip_threshold": "d"})
    takes_shards = False  # it averages over whole rows and columns
    contiguous_state = frozenset({"row_var", "col_var"})

    beta2_decay: float = number(-0.8, most=0)
    """Exponent of the second moment's decay, <= 0."""
    clip_threshold: float = number(1.0, least=1)
    """Clipping threshold `d`, >= 1."""


@dataclass(frozen=True, kw_only=True)
class Muon(_Moments):
    """Muon for hidden matrices; betas and eps are those of the AdamW that updates everything else."""

    name = "muon"
    torch_class = "distkit.optim.muon.MuonWithAdamW"
    renamed = MappingProxyType({"adjust_lr": "adjust_lr_fn"})
    splits_matrices = True
    state_depends_on = ("kind",)

    momentum: float = number(0.95, least=0, below=1)
    """Momentum, in [0, 1)."""
    nesterov: bool = True
    """Nesterov momentum."""
    ns_steps: int = number(5, least=1, most=99)
    """Newton-Schulz steps, 1 to 99."""
    adjust_lr: Literal["original", "match_rms_adamw"] = "original"
    """How the learning rate is scaled with the shape of a matrix."""


@dataclass(frozen=True, kw_only=True)
class SparseAdam(_Moments):
    """Adam for embeddings with sparse gradients."""

    name = "sparse_adam"
    torch_class = "torch.optim.SparseAdam"
    has_weight_decay = False
    takes_sparse = True
    takes_dense = False
    takes_shards = False  # a shard's gradient is dense


@dataclass(frozen=True, kw_only=True)
class LBFGS(OptimConfig):
    """L-BFGS, which evaluates the loss several times in one step."""

    name = "lbfgs"
    torch_class = "torch.optim.LBFGS"
    renamed = MappingProxyType({"line_search": "line_search_fn"})
    has_weight_decay = False
    takes_sparse = True
    takes_shards = False
    needs_closure = True
    flattens_parameters = True
    state_depends_on = ("history_size",)

    max_iter: int = number(20, least=1)
    """Iterations in one step, >= 1."""
    history_size: int = number(100, least=1)
    """Update pairs remembered, >= 1."""
    line_search: Literal["strong_wolfe"] | None = None
    """The line search; None takes full steps."""
    tolerance_grad: float = number(1e-7, least=0)
    """Stop when the largest gradient is below this, >= 0."""
    tolerance_change: float = number(1e-9, least=0)
    """Stop when parameters or loss change less than this, >= 0."""


OPTIMIZERS: dict[str, type[OptimConfig]] = {
    kind.name: kind
    for kind in (
        SGD,
        Adam,
        AdamW,
        Adamax,
        NAdam,
        RAdam,
        RMSprop,
        Rprop,
        Adagrad,
        Adadelta,
        ASGD,
        Adafactor,
        Muon,
        SparseAdam,
        LBFGS,
    )
}
