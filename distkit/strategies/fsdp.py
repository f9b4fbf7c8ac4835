"""fsdp: each rank holds a shard of every parameter, its gradient and its optimizer state (FSDP2).

torch's `fully_shard` is called directly, with what Accelerate's launcher and configuration files say (they arrive in
`config.fsdp`). Accelerate's own preparation is not used: with `cpu=True` it silently becomes DDP, it wants the
optimizer before the shards exist and swaps its parameters by address, puts embeddings and the final norm into units of
their own from some version on, and replaces buffers by way of the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from distkit.config import FSDPConfig
from distkit.errors import ConfigError
from distkit.runtime.process import Runtime
from distkit.strategies.blocks import modules_of_class, recompute_activations_, repeated_blocks
from distkit.strategies.compiled import compile_
from distkit.strategies.parameters import OwnGradients
from distkit.strategies.sharded import Sharded, make_cuttable_
from distkit.strategies.unused import ExchangeOrder, SeenAllGather, SeenReduceScatter, SharedUse
from distkit.tensors.buffers import shared_buffers
from distkit.tensors.shards import local_part


class FullySharded(Sharded):
    """Parameters are gathered a unit at a time, and gradients leave the backward summed and in shards.

    Parameters and optimizer state are DTensors over `mesh`; buffers are plain, each rank its own.
    """

    name = "fsdp"
    keeps_changes = False
    mesh: DeviceMesh
    _shared_use: SharedUse | None = None

    def prepare(self, module: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Choose what is recomputed and compiled, then shard from the inside out, then build the optimizer."""
        config = self.config
        check_same_everywhere(module, self.runtime)
        self._check_module(module)
        recompute_activations_(module, config.activation_checkpointing)
        if config.compile:
            compile_(module, config, "blocks")
        self.mesh = build_mesh(self.runtime, config.fsdp.replicas)
        self.norm_group = self.mesh.get_group(-1)
        shard_(module, self.mesh, config.fsdp, [] if config.unused_parameters == "any" else units(module, config.fsdp))
        assert isinstance(module, FSDPModule)
        self.module = self.model = self.eval_model = module
        self._units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
        self._exchanges = True
        self._order = self._exchange_order()
        self._watch_exchanges(lambda _: None)
        # FSDP swaps what a module calls its parameter: between forward and backward a unit has the gathered ones
        self._named = dict(module.named_parameters())
        self._parameters = [p for p in self._named.values() if p.requires_grad]
        if config.unused_parameters == "any":
            self._shared_use = SharedUse(module, self.runtime, lambda: bool(self.gradients()))
        self.optimizer = build_optimizer(module)

    @property
    def model_name(self) -> str:
        """The class of the recipe's model, under the one that fully_shard made."""
        return _own_class(self.module)

    def describe(self) -> str:
        """Number and classes of the units, and over what they are cut."""
        inner = [_own_class(unit) for unit in self._units if unit is not self.module]
        replicas = self.config.fsdp.replicas
        cut = f"{self.runtime.world_size // (replicas or 1)} shards" + (f" x {replicas} replicas" if replicas else "")
        return f"fsdp: {cut}, {len(inner)} units {', '.join(sorted(set(inner)))}".rstrip() + " and the rest"

    def exchange_gradients(self, on: bool) -> None:
        """Without an exchange the backward adds up whole gradients (FSDPModule.set_requires_gradient_sync)."""
        if on != self._exchanges:
            self._exchanges = on
            self.model.set_requires_gradient_sync(on)  # type: ignore[operator]  # model is an FSDPModule

    def watch_own_gradients(self) -> None:
        """Look at what each unit is about to exchange: a parameter's own hooks see the sum over the ranks."""
        self._own_gradients = OwnGradients((), self.runtime.device)
        self._watch_exchanges(self._own_gradients.see)

    def _exchange_order(self) -> ExchangeOrder:
        names = {part: name for name, part in self.module.named_modules()}
        may_differ = self.config.unused_parameters != "refuse"
        trained = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        units = [names[unit] for unit in self._units]
        return ExchangeOrder(units, trained, self.name, self.runtime, may_differ=may_differ)

    def _watch_exchanges(self, look: Callable[[Tensor], None]) -> None:
        for index, unit in enumerate(self._units):
            unit.set_custom_all_gather(SeenAllGather(self._order, index))  # type: ignore[arg-type]
            unit.set_custom_reduce_scatter(SeenReduceScatter(self._order, index, look))  # type: ignore[arg-type]

    def zero_gradients(self) -> None:
        """Drop all gradients: a step begins."""
        super().zero_gradients()
        self._order.begin(step=True)
        if self._shared_use is not None:
            self._shared_use.begin()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        scaled = self.scaler.scale(loss)
        if self._shared_use is not None:
            scaled = self._shared_use.watched(scaled, last=self._exchanges)
        scaled.backward()  # type: ignore[no-untyped-call]
        if self._exchanges:
            self._order.end_step([parameter.grad is not None for parameter in self._parameters])

    def gates(self) -> Sequence[tuple[nn.Module, nn.Module]] | None:
        """Before its forward each unit gathers its parameters; a hook inside of what is compiled would be, too."""
        own_units = self.config.fsdp.wrap is not None or self.config.fsdp.min_params is not None
        return None if self.config.compile and own_units else [(unit, unit) for unit in self._units]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Afterwards nothing is gathered: a forward without a backward leaves a unit with the weights it had."""
        self._order.begin(step=False)
        try:
            yield
            self._order.end()
        finally:
            for unit in self._units:
                unit.reshard()
            # a forward with gradients and without a backward is remembered: the next backward would gather for it
            fully_shard.state(self.module)._comm_ctx.post_forward_order.clear()  # type: ignore[attr-defined]

    def gradients(self) -> list[Tensor]:
        """This rank's shards of the gradients, plain tensors."""
        with torch.no_grad():
            return [local_part(p.grad) for p in self._parameters if p.grad is not None]

    def model_tensors(self) -> dict[str, Tensor]:
        """Every parameter (a DTensor) and shared buffer by its name."""
        return {**self._named, **shared_buffers(self.module)}

    def check(self) -> None:
        """Refuse what cannot be sharded."""
        super().check()
        config, world_size = self.config, self.runtime.world_size
        if not config.optim.takes_shards:
            raise ConfigError(f"--optim.name {config.optim.name} cannot update shards of parameters",
                              expected="--strategy ddp, or another optimizer", got="--strategy fsdp",
                              fix="--strategy auto")  # fmt: skip
        self._refuse_whole_compilation("blocks: parameters are gathered between them")
        if config.unused_parameters == "any" and (config.fsdp.wrap is not None or config.fsdp.min_params is not None):
            raise ConfigError("--unused-parameters any gathers the whole model at once", expected="no smaller units",
                              got="--fsdp.wrap or --fsdp.min-params", fix="--unused-parameters same")  # fmt: skip
        replicas = config.fsdp.replicas or 1
        if world_size % replicas or world_size == replicas:
            near = [n for n in range(2, world_size) if world_size % n == 0]
            raise ConfigError(f"--fsdp.replicas {replicas} on {world_size} ranks leaves nothing to shard over",
                              expected=f"a divisor of {world_size}, smaller than it", got=replicas,
                              fix=f"--fsdp.replicas {near[0] if near else None}")  # fmt: skip
        if config.fsdp.gather_precision == "bf16" and config.precision != "bf16":
            raise ConfigError("--fsdp.gather-precision bf16 gives the model bf16 weights to compute with",
                              expected="--precision bf16 too", got=f"--precision {config.precision}",
                              fix="--precision bf16, or --fsdp.gather-precision fp32")  # fmt: skip
        if config.fsdp.cpu_offload and config.precision == "fp16":
            raise ConfigError("--fsdp.cpu-offload with --precision fp16: the scaler looks at gradients on the device",
                              expected="bf16 or fp32", got="fp16", fix="--precision bf16")  # fmt: skip

    def _check_module(self, module: nn.Module) -> None:
        make_cuttable_(module, self.name)
        norms = [name for name, part in module.named_modules() if isinstance(part, _BatchNorm)]
        if norms and self.config.fsdp.gather_precision == "bf16":
            raise ConfigError(f"--fsdp.gather-precision bf16: {norms[0]} is a BatchNorm, which takes fp32 weights only",
                              expected="a model without BatchNorm", fix="--fsdp.gather-precision fp32")  # fmt: skip
        sparse = [name for name, part in module.named_modules() if getattr(part, "sparse", False)]
        if sparse:
            raise ConfigError(f"--strategy fsdp sums dense gradients, and those of {sparse[0]} are sparse",
                              expected="sparse=False", fix="--strategy ddp")  # fmt: skip


def build_mesh(runtime: Runtime, replicas: int | None) -> DeviceMesh:
    """All ranks as one axis, or as [replicas, shards]: ranks of one copy are neighbours, on one node where they fit."""
    kind, world_size = runtime.device.type, runtime.world_size
    if replicas is None:
        return init_device_mesh(kind, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))


def shard_(module: nn.Module, mesh: DeviceMesh, config: FSDPConfig, parts: Sequence[nn.Module]) -> None:
    """fully_shard on each of the `parts`, from the inside out, and on what is left as the root."""
    low, reduce = config.gather_precision == "bf16", config.reduce_precision
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None,
        # set together with param_dtype: without it, torch before 2.15 would sum in that dtype
        reduce_dtype=torch.bfloat16 if reduce == "bf16" else torch.float32 if low else None,
        # autocast casts where it should, and nothing else
        cast_forward_inputs=False,
    )
    pinned = mesh.device_type != "cpu"
    offload = CPUOffloadPolicy(pin_memory=pinned) if config.cpu_offload else OffloadPolicy()
    for unit in [*parts[::-1], module]:
        # the root is needed again as soon as its forward has ended
        reshard = config.reshard_after_forward if unit is not module else None
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)


def units(module: nn.Module, config: FSDPConfig) -> list[nn.Module]:
    """What is gathered at a time besides the root, from the outside in."""
    if config.wrap is not None:
        found = modules_of_class(module, config.wrap, "--fsdp.wrap")
    elif config.min_params is not None:
        found = large_modules(module, config.min_params)
    else:
        found = repeated_blocks(module)
    # containers have no forward of their own to gather before
    containers = nn.ModuleList | nn.ModuleDict
    found = [unit for unit in found if unit is not module and not isinstance(unit, containers) and _has(unit)]
    shared = [unit for unit in found if not _owns(module, unit)]
    if shared and config.wrap is not None:
        name = type(shared[0]).__name__
        raise ConfigError(f"--fsdp.wrap {name}: its parameters are also used outside of it", got=name,
                          expected="a class whose parameters are its own", fix="--fsdp.wrap Block")  # fmt: skip
    return [unit for unit in found if unit not in shared]


def _own_class(unit: nn.Module) -> str:
    return type(unit).__mro__[2].__name__


def _has(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _owns(root: nn.Module, unit: nn.Module) -> bool:
    """Whether no module outside of `unit` has one of its parameters."""
    inside, own = set(unit.modules()), set(unit.parameters())
    return not any(p in own for part in root.modules() if part not in inside for p in part.parameters(recurse=False))


#: A container has no forward of its own to gather before, and an embedding's weight is often read as the head's, by
#: the model's own forward, where nothing gathers it; what they hold counts for their parent.
NO_UNITS = (nn.ModuleList, nn.ModuleDict, nn.Embedding)


def large_modules(module: nn.Module, min_params: int) -> list[nn.Module]:
    """Modules with at least `min_params` parameters that no such module inside them has, from the outside in."""
    own: dict[nn.Module, int] = {}

    def visit(part: nn.Module) -> int:
        left = sum(p.numel() for p in part.parameters(recurse=False)) + sum(map(visit, part.children()))
        own[part] = left
        return 0 if left >= min_params and not isinstance(part, NO_UNITS) else left

    visit(module)
    return [part for part in module.modules() if own[part] >= min_params and not isinstance(part, NO_UNITS)]


def check_same_everywhere(module: nn.Module, runtime: Runtime) -> None:
    """Each rank shards its own copy of the model: they must be the same.

    Raises:
        ConfigError: on every rank, naming the first tensor that differs.
    """
    tensors = {**dict(module.named_parameters()), **shared_buffers(module)}
    # as text: a NaN is not equal to itself
    sums = {name: str(_sum(tensor.detach())) for name, tensor in tensors.items()}
    first, *others = runtime.gather(sums)
    for name in first:
        if any(other.get(name) != first[name] for other in others):
            raise ConfigError(f"build_model produced different values for {name} on some rank than on rank 0",
                              expected="the same model on every rank: it is called under the same seed",
                              fix="draw weights from torch's global generator only")  # fmt: skip


def _sum(tensor: Tensor) -> float:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.sum(dtype=torch.float64).item()
