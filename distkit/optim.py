"""Parameter groups, optimizers by name, and optimizer state by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Muon, Optimizer

from distkit.config.optim import NO_WEIGHT_DECAY, TAKES, OptimConfig
from distkit.errors import ConfigError

#: As torch.optim takes it. Keys here: params, param_names (parallel to params), weight_decay, and "kind" where it
#: matters: "muon" or "adamw" with --optim.name muon, "sparse" for parameters whose gradients are sparse.
ParamGroup = dict[str, Any]

_CLASSES: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
    "sparse_adam": torch.optim.SparseAdam,
    "lbfgs": torch.optim.LBFGS,
}
#: Our field -> torch's argument, where they differ.
_RENAMED = {"clip_threshold": "d", "line_search": "line_search_fn", "adjust_lr": "adjust_lr_fn"}
#: Muon's fields that go to the AdamW beside it.
_MUONS_ADAMW = frozenset({"betas", "eps"})
#: Devices on which torch >= 2.11 has the fused kernel (adagrad's CUDA kernel is younger than that).
_FUSED = dict.fromkeys(("sgd", "adam", "adamw"), frozenset({"cuda", "mps", "cpu"})) | {"adagrad": frozenset({"cpu"})}
#: Fused kernels that also take DTensors (torch.distributed.tensor has no sharding rule for the other two).
_FUSED_DTENSOR = frozenset({"adam", "adamw"})
_TAKE_SPARSE = frozenset({"sgd", "adagrad", "sparse_adam", "lbfgs"})


def default_param_groups(model: nn.Module, config: OptimConfig) -> list[ParamGroup]:
    """The parameters that require gradients, tied ones once, split by whether they are decayed.

    Parameters with fewer than two dims (norms, biases) are not decayed unless config.decay_all. Within a group the
    order is that of model.named_parameters(); no group is empty, and where nothing is decayed there is one.
    muon: hidden matrices get kind "muon". What has not two dims, embeddings, and the head, which is the last nn.Linear
    in module order, get kind "adamw" (Jordan 2024, https://kellerjordan.github.io/posts/muon/).

    Raises:
        ConfigError: nothing is trainable, or the optimizer cannot take sparse (or dense) gradients that the model has.
    """
    named = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    if not named:
        raise ConfigError("the model has no parameter to train", expected="requires_grad=True on at least one")
    sparse, not_for_muon = _sparse_parameters(model), _embeddings_and_head(model)
    _check_sparse(named, sparse, config)
    groups: dict[tuple[bool, bool, bool], ParamGroup] = {}
    for name, parameter in named.items():
        kind = "sparse" if parameter in sparse and config.name != "lbfgs" else None
        if config.name == "muon":
            kind = "muon" if parameter.ndim == 2 and parameter not in not_for_muon else "adamw"
        decay = config.weight_decay if config.decay_all or parameter.ndim >= 2 else 0.0
        # sorts Muon's group first and the group without decay last
        place = (kind != "muon", kind == "sparse", decay == 0)
        group = groups.setdefault(place, {"params": [], "param_names": []})
        group["params"].append(parameter)
        group["param_names"].append(name)
        if kind is not None:
            group["kind"] = kind
        if config.name not in NO_WEIGHT_DECAY:
            group["weight_decay"] = decay
    return [groups[place] for place in sorted(groups)]


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its canonical name, tied ones once: without the prefixes of DDP and torch.compile."""
    if isinstance(model, DistributedDataParallel):
        return named_parameters(model.module)
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        return named_parameters(inner)
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters()}


def _sparse_parameters(model: nn.Module) -> set[Tensor]:
    """Weights used by sparse embeddings only; tied to anything else, the sum of their gradients is dense."""
    sparse: set[Tensor] = set()
    dense: set[Tensor] = set()
    for module in model.modules():
        is_sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        (sparse if is_sparse else dense).update(module.parameters(recurse=False))
    return sparse - dense


def _embeddings_and_head(model: nn.Module) -> set[Tensor]:
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return {module.weight for module in (*embeddings, *linears[-1:])}


def _check_sparse(named: Mapping[str, Tensor], sparse: set[Tensor], config: OptimConfig) -> None:
    found = ", ".join([name for name, parameter in named.items() if parameter in sparse][:5])
    dense = [name for name, parameter in named.items() if parameter not in sparse]
    if config.name == "sparse_adam" and dense:
        raise ConfigError(f"--optim.name sparse_adam cannot update {len(dense)} parameters with dense gradients",
                          expected="nn.Embedding or nn.EmbeddingBag with sparse=True", got=", ".join(dense[:5]),
                          fix="--optim.name adam, or leave them out in the recipe's build_param_groups")  # fmt: skip
    if found and config.name not in _TAKE_SPARSE:
        raise ConfigError(f"--optim.name {config.name} cannot take the sparse gradients of {found}",
                          expected=f"one of {', '.join(sorted(_TAKE_SPARSE))}, or sparse=False in the embedding",
                          got=config.name, fix="--optim.name sgd")  # fmt: skip
    if found and config.weight_decay:
        raise ConfigError(f"--optim.weight-decay cannot decay {found}: the gradients are sparse",
                          expected="0, or sparse=False in the embedding", got=config.weight_decay,
                          fix="--optim.weight-decay 0")  # fmt: skip


def build_optimizer(config: OptimConfig, groups: Sequence[ParamGroup]) -> Optimizer:
    """The optimizer that `config` names, over `groups`; each group's "initial_lr" is the lr that `set_lr` multiplies.

    Fused where torch has a fused kernel for all parameters, else torch's own choice (foreach on CUDA). Measured on one
    CPU core, torch 2.15, microseconds an update, single-tensor / foreach / fused (fused leads on two cores too):

        Linear(16, 4)          sgd 30 / 49 / 28         adam 72 / 126 / 50         adagrad 43 / 85 / 37
        ResNet-18, 62 tensors  sgd 8900 / 27600 / 4000  adam 25800 / 19800 / 6000  adagrad 12800 / 16900 / 4400

    Raises:
        ConfigError: the groups do not suit the optimizer.
    """
    copies = [dict(group) for group in groups]
    if not any(len(group["params"]) for group in copies):
        raise ConfigError("the parameter groups hold no parameter", got=f"{len(copies)} groups")
    options = {name: value for name in sorted(TAKES[config.name]) if (value := getattr(config, name)) is not None}
    optimizer = _build_muon(config, copies, options) if config.name == "muon" else _build(config, copies, options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _build(config: OptimConfig, groups: list[ParamGroup], options: dict[str, object]) -> Optimizer:
    if config.name == "lbfgs" and len(groups) > 1:
        raise ConfigError("--optim.name lbfgs takes one parameter group", expected="1 group", got=f"{len(groups)}",
                          fix="a build_param_groups in the recipe that returns one group")  # fmt: skip
    fused = can_fuse(config, groups)
    arguments = {_RENAMED.get(name, name): value for name, value in options.items()} | {"lr": config.lr}
    if config.name not in NO_WEIGHT_DECAY:
        arguments["weight_decay"] = config.weight_decay
    if fused:
        arguments["fused"] = True
    optimizer = _CLASSES[config.name](groups, **arguments)
    if fused and config.name == "sgd":
        _fill_momentum_(optimizer)
    return optimizer


def can_fuse(config: OptimConfig, groups: Sequence[ParamGroup]) -> bool:
    """True where torch has a fused kernel of this optimizer for every parameter in `groups`."""
    # the momentum of fused SGD starts wrong where there is dampening: see _fill_momentum_
    if any(group.get("kind") == "sparse" or group.get("dampening", config.dampening) for group in groups):
        return False
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(
        parameter.is_floating_point()
        and parameter.device.type in _FUSED.get(config.name, ())
        and (type(parameter) in (Tensor, nn.Parameter) or config.name in _FUSED_DTENSOR)
        for parameter in parameters
    )


def _fill_momentum_(optimizer: Optimizer) -> None:
    """Start fused SGD from momentum 0: without dampening the first update is the same.

    torch allocates the momentum uninitialised in the first update. It stays so when fp16 skips that update, and a
    parameter without gradient then raises a TypeError later (seen in torch 2.15).
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _build_muon(config: OptimConfig, groups: list[ParamGroup], options: dict[str, object]) -> Optimizer:
    strange = {str(group.get("kind")) for group in groups} - {"muon", "adamw"}
    if strange:
        raise ConfigError('--optim.name muon needs to know each group\'s "kind"', expected="muon or adamw",
                          got=", ".join(sorted(strange)), fix='{"params": [...], "kind": "muon"}')  # fmt: skip
    matrices = [group for group in groups if group["kind"] == "muon"]
    if not matrices:
        raise ConfigError("--optim.name muon found no hidden matrix in the model", expected="parameters with two dims",
                          got="none but embeddings and the last nn.Linear", fix="--optim.name adamw")  # fmt: skip
    shared = {"lr": config.lr, "weight_decay": config.weight_decay}
    for_muon = {_RENAMED.get(name, name): value for name, value in options.items() if name not in _MUONS_ADAMW}
    muon = Muon(matrices, **shared, **for_muon)  # type: ignore[arg-type]  # checked by OptimConfig
    rest = [group for group in groups if group["kind"] == "adamw"]
    if not rest:
        return MuonWithAdamW(muon)
    for_adamw = {name: value for name, value in options.items() if name in _MUONS_ADAMW}
    fused = {"fused": True} if can_fuse(OptimConfig(name="adamw"), rest) else {}
    return MuonWithAdamW(muon, AdamW(rest, **shared, **for_adamw, **fused))  # type: ignore[arg-type]


class MuonWithAdamW(Optimizer):
    """Muon for hidden matrices and AdamW for everything else, as one optimizer.

    `param_groups` holds the two optimizers' own dicts, so a group's lr set here is theirs, and all share one `state`.
    """

    def __init__(self, muon: Muon, adamw: AdamW | None = None) -> None:
        self._parts: list[Optimizer] = [muon] if adamw is None else [muon, adamw]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Make the parts work on this optimizer's groups and state."""
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict replaces the groups and the state through here
        super().__setstate__(state)
        self._share()

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Only the constructor adds groups.

        Raises:
            ConfigError: a group that is neither Muon's nor AdamW's.
        """
        if not any(param_group is group for part in self._parts for group in part.param_groups):
            raise ConfigError("MuonWithAdamW takes its groups when it is made", fix="build_optimizer(config, groups)")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of both; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def set_lr(optimizer: Optimizer, multiplier: float) -> None:
    """Give every group `multiplier` times its initial lr."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def skips_on_device(optimizer: Optimizer) -> bool:
    """True when fp16 can skip its update on the device; otherwise GradScaler.step waits for the device each step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def named_optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Every value in optimizer.state as `PARAMETER/KEY` (`PARAMETER/KEY/INDEX` in lists) -> tensor, not copied.

    Names are canonical, so they do not depend on the order of groups or on wrappers. Python numbers become 0-dim
    float64 or int64 tensors on the CPU; None is left out.

    Raises:
        ConfigError: the optimizer updates a parameter that is not in the model.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in named_parameters(model).items()}
    flat: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        if parameter not in names:
            raise ConfigError(f"the optimizer updates a parameter of shape {list(parameter.shape)} that the model does "
                              "not have", fix="register it in build_model's module")  # fmt: skip
        _flatten(names[parameter], state, flat)
    return flat


def _flatten(path: str, value: object, flat: dict[str, Tensor]) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(f"{path}/{key}", inner, flat)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _flatten(f"{path}/{index}", inner, flat)
    elif isinstance(value, Tensor):
        flat[path] = value
    elif isinstance(value, float | int):
        flat[path] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    elif value is not None:
        raise TypeError(f"optimizer state {path} is a {type(value).__name__}, which has no tensor form")
