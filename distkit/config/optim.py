"""Which optimizer, and its numbers. Torch's own names and defaults; what an optimizer does not take cannot be set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from distkit.config.check import require, require_number, require_unused
from distkit.errors import nearest

OptimizerName = Literal[
    "sgd",
    "adam",
    "adamw",
    "adamax",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "adagrad",
    "adadelta",
    "asgd",
    "adafactor",
    "muon",
    "sparse_adam",
    "lbfgs",
]
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)

#: The optional fields that each optimizer takes. `muon` passes `betas` and `eps` to the AdamW that updates the rest.
TAKES: dict[str, frozenset[str]] = {
    "sgd": frozenset({"momentum", "dampening", "nesterov"}),
    "adam": frozenset({"betas", "eps", "amsgrad"}),
    "adamw": frozenset({"betas", "eps", "amsgrad"}),
    "adamax": frozenset({"betas", "eps"}),
    "nadam": frozenset({"betas", "eps", "momentum_decay", "decoupled_weight_decay"}),
    "radam": frozenset({"betas", "eps", "decoupled_weight_decay"}),
    "rmsprop": frozenset({"momentum", "alpha", "eps", "centered"}),
    "rprop": frozenset({"etas", "step_sizes"}),
    "adagrad": frozenset({"lr_decay", "initial_accumulator_value", "eps"}),
    "adadelta": frozenset({"rho", "eps"}),
    "asgd": frozenset({"lambd", "alpha", "t0"}),
    "adafactor": frozenset({"beta2_decay", "clip_threshold"}),
    "muon": frozenset({"momentum", "nesterov", "ns_steps", "adjust_lr", "betas", "eps"}),
    "sparse_adam": frozenset({"betas", "eps"}),
    "lbfgs": frozenset({"max_iter", "history_size", "line_search", "tolerance_grad", "tolerance_change"}),
}
#: Optimizers whose torch class has no weight decay.
NO_WEIGHT_DECAY = frozenset({"rprop", "sparse_adam", "lbfgs"})


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer. Fields that are None keep torch's default for the chosen optimizer."""

    name: OptimizerName = "sgd"
    """Which of torch.optim's optimizers."""
    lr: float = 0.1
    """Peak learning rate, > 0; the schedule multiplies it."""
    weight_decay: float = 0.0
    """Weight decay, >= 0, as the chosen torch class understands it (decoupled in adamw, muon and adafactor)."""
    decay_all: bool = False
    """Also decay norms and biases (parameters with fewer than two dims)."""
    momentum: float | None = None
    """Momentum, in [0, 1)."""
    dampening: float | None = None
    """Dampening of the momentum, in [0, 1]."""
    nesterov: bool | None = None
    """Nesterov momentum; needs momentum > 0."""
    betas: tuple[float, float] | None = None
    """Decay rates of the first and second moment, each in [0, 1)."""
    eps: float | None = None
    """Added to the denominator, > 0."""
    amsgrad: bool | None = None
    """Use the maximum of all second moments."""
    momentum_decay: float | None = None
    """NAdam's momentum decay, >= 0."""
    decoupled_weight_decay: bool | None = None
    """Decay the weights directly rather than through the gradient."""
    alpha: float | None = None
    """Smoothing constant of rmsprop, or power of asgd's eta update, > 0."""
    centered: bool | None = None
    """Normalise rmsprop by the variance instead of the second moment."""
    etas: tuple[float, float] | None = None
    """Rprop's factors for shrinking (0..1) and growing (> 1) a step."""
    step_sizes: tuple[float, float] | None = None
    """Rprop's least and largest step."""
    lr_decay: float | None = None
    """Adagrad's own decay of the learning rate, >= 0."""
    initial_accumulator_value: float | None = None
    """Adagrad's initial sum of squares, >= 0."""
    rho: float | None = None
    """Adadelta's averaging constant, in [0, 1]."""
    lambd: float | None = None
    """ASGD's decay term, >= 0."""
    t0: float | None = None
    """ASGD's step at which averaging starts, >= 0."""
    beta2_decay: float | None = None
    """Adafactor's exponent of the second-moment decay, <= 0."""
    clip_threshold: float | None = None
    """Adafactor's clipping threshold `d`, >= 1."""
    ns_steps: int | None = None
    """Muon's Newton-Schulz steps, 1 to 99."""
    adjust_lr: Literal["original", "match_rms_adamw"] | None = None
    """How Muon scales the learning rate with the shape of a matrix."""
    max_iter: int | None = None
    """LBFGS: closure evaluations' iterations in one step, >= 1."""
    history_size: int | None = None
    """LBFGS: update pairs remembered, >= 1."""
    line_search: Literal["strong_wolfe"] | None = None
    """LBFGS: the line search; None takes full steps."""
    tolerance_grad: float | None = None
    """LBFGS: stop when the largest gradient is below this, >= 0."""
    tolerance_change: float | None = None
    """LBFGS: stop when parameters or loss change less than this, >= 0."""

    def __post_init__(self) -> None:
        close = nearest(self.name, OPTIMIZERS) or "adamw"
        require(self.name in OPTIMIZERS, "optim.name", "one of " + ", ".join(OPTIMIZERS), self.name, close)
        optional = {f"optim.{f.name}": getattr(self, f.name) for f in fields(self) if f.default is None}
        require_unused(f"--optim.name {self.name}", optional, {f"optim.{name}" for name in TAKES[self.name]})
        require_number("optim.lr", self.lr, above=0, example="0.1")
        require_number("optim.weight_decay", self.weight_decay, least=0, example="5e-4")
        require_number("optim.momentum", self.momentum, least=0, below=1, example="0.9")
        require_number("optim.dampening", self.dampening, least=0, most=1, example="0")
        require_number("optim.eps", self.eps, above=0, example="1e-8")
        require_number("optim.alpha", self.alpha, above=0, example="0.99")
        for name in ("momentum_decay", "lr_decay", "initial_accumulator_value", "lambd", "t0", "tolerance_grad"):
            require_number(f"optim.{name}", getattr(self, name), least=0, example="0")
        require_number("optim.tolerance_change", self.tolerance_change, least=0, example="1e-9")
        require_number("optim.rho", self.rho, least=0, most=1, example="0.9")
        require_number("optim.beta2_decay", self.beta2_decay, most=0, example="-0.8")
        require_number("optim.clip_threshold", self.clip_threshold, least=1, example="1")
        require_number("optim.ns_steps", self.ns_steps, least=1, most=99, example="5")
        require_number("optim.max_iter", self.max_iter, least=1, example="20")
        require_number("optim.history_size", self.history_size, least=1, example="100")
        for beta in self.betas or ():
            require(0 <= beta < 1, "optim.betas", "two numbers in [0, 1)", self.betas, "0.9 0.999")
        if self.etas is not None:
            require(0 < self.etas[0] < 1 < self.etas[1], "optim.etas", "0 < first < 1 < second", self.etas, "0.5 1.2")
        if self.step_sizes is not None:
            low, high = self.step_sizes
            require(0 < low <= high, "optim.step_sizes", "0 < least <= largest", self.step_sizes, "1e-6 50")
        if self.nesterov and self.name == "sgd":
            ok = bool(self.momentum) and not self.dampening
            require(ok, "optim.momentum", "> 0 with nesterov, and no dampening", self.momentum, "0.9")
        if self.name in NO_WEIGHT_DECAY:
            require(self.weight_decay == 0, "optim.weight_decay", f"0: {self.name} has none", self.weight_decay, "0")
