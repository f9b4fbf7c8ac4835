"""Parameters by name, and the groups they are optimized in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distkit.config.optim import OPTIMIZERS, OptimConfig
from distkit.errors import ConfigError

#: As torch.optim takes it. Keys here: params, param_names (parallel to params), weight_decay, and "kind" where it
#: matters: "muon" or "adamw" with --optim.name muon, "sparse" for parameters whose gradients are sparse.
ParamGroup = dict[str, Any]


def default_param_groups(model: nn.Module, config: OptimConfig) -> list[ParamGroup]:
    """The parameters that require gradients, tied ones once, split by whether they are decayed.

    Parameters with fewer than two dims (norms, biases) are not decayed unless config.decay_all. Within a group the
    order is that of model.named_parameters(); no group is empty, and where nothing is decayed there is one.
    muon: hidden matrices get kind "muon". What has not two dims, embeddings, and the head get kind "adamw" (Jordan
    2024, https://kellerjordan.github.io/posts/muon/). The head is `model.head` where there is one, as in timm, else the
    last nn.Linear in module order.

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
        kind = "sparse" if parameter in sparse and not config.needs_closure else None
        if config.splits_matrices:
            kind = "muon" if parameter.ndim == 2 and parameter not in not_for_muon else "adamw"
        decay = config.weight_decay if config.decay_all or parameter.ndim >= 2 else 0.0
        # sorts Muon's group first and the group without decay last
        place = (kind != "muon", kind == "sparse", decay == 0)
        group = groups.setdefault(place, {"params": [], "param_names": []})
        group["params"].append(parameter)
        group["param_names"].append(name)
        if kind is not None:
            group["kind"] = kind
        if config.has_weight_decay:
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
    head = getattr(model, "head", None)
    last = head.parameters() if isinstance(head, nn.Module) else [module.weight for module in linears[-1:]]
    return {*(module.weight for module in embeddings), *last}


def _check_sparse(named: Mapping[str, Tensor], sparse: set[Tensor], config: OptimConfig) -> None:
    names = ", ".join([name for name, parameter in named.items() if parameter in sparse][:5])
    dense = [name for name, parameter in named.items() if parameter not in sparse]
    if dense and not config.takes_dense:
        raise ConfigError(f"--optim.name {config.name} cannot update {len(dense)} parameters with dense gradients",
                          expected="nn.Embedding or nn.EmbeddingBag with sparse=True", got=", ".join(dense[:5]),
                          fix="--optim.name adam, or leave them out in the recipe's build_param_groups")  # fmt: skip
    if names and not config.takes_sparse:
        takers = ", ".join(sorted(name for name, row in OPTIMIZERS.items() if row.takes_sparse))
        raise ConfigError(f"--optim.name {config.name} cannot take the sparse gradients of {names}",
                          expected=f"one of {takers}, or sparse=False in the embedding",
                          got=config.name, fix="--optim.name sgd")  # fmt: skip
    if names and config.weight_decay:
        raise ConfigError(f"--optim.weight-decay cannot decay {names}: the gradients are sparse",
                          expected="0, or sparse=False in the embedding", got=config.weight_decay,
                          fix="--optim.weight-decay 0")  # fmt: skip
