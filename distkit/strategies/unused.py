"""Parameters that some step's loss does not depend on: layer drop, a branch that is not taken (--unused-parameters)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from distkit.errors import ConfigError, shorten
from distkit.runtime.process import Runtime


def no_gradient(names: Sequence[str], strategy: str, prefix: str = "") -> ConfigError:
    """The error for a strategy that has to have a gradient for each parameter, and got none for `names`."""
    fix = f"{prefix}--unused-parameters any, or requires_grad_(False) for them in build_model"
    return ConfigError(f"the loss does not depend on {shorten(names)}", fix=fix,
                       expected=f"a gradient for every parameter in each step, with --strategy {strategy}")  # fmt: skip


def after_backward(loss: Tensor, then: Callable[[], None]) -> Tensor:
    """`loss` with a backward that calls `then` at its end, before what a wrapper of the model calls there."""
    # a tensor of its own: wrappers have hooks on what the model returned, and the first one is called first
    own = loss.view_as(loss)
    own.register_hook(lambda _: Variable._execution_engine.queue_callback(then))  # type: ignore[no-untyped-call]
    return own


class GradientWatch:
    """Sees in every backward which parameters get a gradient, for ZeRO, which needs one for each.

    It updates flat runs of elements: weight decay and momentum would move the others too. Where ranks differ, it would
    add up gradients of different parameters.

    Args:
        parameters: by name, those to be trained.
        strategy: for the message.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], strategy: str) -> None:
        self._strategy, self._names = strategy, dict.fromkeys(parameters)
        self._missing = dict(self._names)
        for name, parameter in parameters.items():
            parameter.register_hook(partial(self._see, name))  # type: ignore[no-untyped-call]

    def _see(self, name: str, _: Tensor) -> None:
        self._missing.pop(name, None)

    def check(self) -> None:
        """After a backward.

        Raises:
            ConfigError: naming the parameters that its loss does not depend on.
        """
        missing, self._missing = self._missing, dict(self._names)
        if missing:
            raise no_gradient(list(missing), self._strategy, "--strategy fsdp ")


#: A unit of the model, and the elements that are exchanged for it.
Exchange = tuple[int, int]
END: Exchange = (-1, 0)


class ExchangeOrder:
    """The order in which units of the model are gathered and their gradients summed: the same on all ranks.

    Otherwise exchanges of different units meet. That hangs, or ends in words of the backend, or, where they have the
    same size, a rank computes with another layer's weights. Until the first step has ended the ranks agree on each
    exchange before it begins. Later steps are compared with that one, or, if steps may differ, agree on theirs too.
    Evaluations are compared between the ranks at their end. Which parameters have a gradient is compared likewise:
    two of one size would not show in an exchange.

    Args:
        units: their names.
        parameters: names of those that are trained.
        strategy: for the message.
        may_differ: steps need not be alike; the ranks must be.
    """

    def __init__(
        self,
        units: Sequence[str],
        parameters: Sequence[str],
        strategy: str,
        runtime: Runtime,
        *,
        may_differ: bool = False,
    ) -> None:
        self._units, self._parameters = list(units), list(parameters)
        self._strategy, self._runtime, self._may_differ = strategy, runtime, may_differ
        self._first_gradients: list[bool] = []
        self._prefix = "" if strategy == "fsdp" else "--strategy fsdp "
        self._first: list[Exchange] | None = None
        self._now: list[Exchange] = []
        self.begin(step=False)

    def begin(self, *, step: bool) -> None:
        """A step begins, or an evaluation."""
        self._now, self._seen = [], (0, 0)
        self._asks = self._first is None or (step and self._may_differ)
        self._expected = self._first if step else None

    def see(self, unit: int, elements: int = 0) -> None:
        """Before an exchange.

        Raises:
            ConfigError: it is not the one that is due.
        """
        exchange = (unit, elements)
        if self._asks:
            self._agree(exchange)
        elif self._expected is not None:
            due = self._expected[len(self._now)] if len(self._now) < len(self._expected) else END
            if exchange != due:
                raise self._differs(self._name(exchange, due), self._name(due, exchange))
        else:  # an evaluation may have any number of them
            self._seen = (self._seen[0] + 1, hash((self._seen[1], exchange)) >> 2)
            return
        self._now.append(exchange)

    def end(self) -> None:
        """An evaluation has ended.

        Raises:
            ConfigError: ranks had different exchanges.
        """
        if self._asks:
            self._agree(END)
        elif not self._runtime.same_everywhere(self._seen):
            raise self._part(f"{self._seen[0]} calls on rank {self._runtime.rank}")

    def end_step(self, gradients: list[bool]) -> None:
        """A step has ended before its update.

        Args:
            gradients: of each parameter, whether it has a gradient.

        Raises:
            ConfigError: some exchange is missing; ranks, or this step and the first one, gave gradients to others.
        """
        if self._asks:
            self._agree(END)
            if not self._runtime.same_everywhere(list(map(int, gradients))):
                first, *others = self._runtime.gather(gradients)
                rank, other = next((rank, other) for rank, other in enumerate(others, 1) if other != first)
                name = self._unlike(first, other)
                raise self._part(f"a gradient for {name} on one of ranks 0 and {rank} only")
            if self._first is None:
                self._first, self._first_gradients = self._now, gradients
        elif self._expected is not None and len(self._now) < len(self._expected):
            due = self._expected[len(self._now)]
            raise self._differs(self._name(END, due), self._name(due, END))
        elif gradients != self._first_gradients:
            name = self._unlike(gradients, self._first_gradients)
            now, then = ("a", "no") if gradients[self._parameters.index(name)] else ("no", "a")
            raise self._differs(f"{now} gradient for {name}", f"{then} gradient for it")

    def _unlike(self, one: Sequence[bool], other: Sequence[bool]) -> str:
        return next(name for name, mine, its in zip(self._parameters, one, other, strict=True) if mine != its)

    def _agree(self, exchange: Exchange) -> None:
        if self._runtime.same_everywhere(exchange):
            return
        first, *others = self._runtime.gather(exchange)
        rank = next(rank for rank, other in enumerate(others, 1) if other != first)
        names = [self._name(one, other) for one, other in ((first, others[rank - 1]), (others[rank - 1], first))]
        raise self._part(f"{names[0]} on rank 0, {names[1]} on rank {rank}")

    def _part(self, got: str) -> ConfigError:
        error = ConfigError("the ranks do not use the same parts of the model",
                            expected=f"the same ones in the same order, with --strategy {self._strategy}", got=got,
                            fix=f"{self._prefix}--unused-parameters any")  # fmt: skip
        error.on_all_ranks = True
        return error

    def _differs(self, now: str, then: str) -> ConfigError:
        fix = (
            f"{self._prefix}--unused-parameters same, where all ranks leave out the same parts; any, where they do not"
        )
        return ConfigError("a step does not use the same parts of the model as the first one",
                           expected=f"the same ones in every step, with --strategy {self._strategy}",
                           got=f"{now} where that had {then}",
                           fix=f"{fix}; the run goes on from its last checkpoint")  # fmt: skip

    def _name(self, exchange: Exchange, other: Exchange) -> str:
        unit, elements = exchange
        if unit < 0:
            return "nothing more"
        of = f"{elements} elements of " if unit == other[0] else ""
        return of + (self._units[unit] or "the model outside of its blocks")


class SeenAllGather:
    """What FSDP does by itself, after a look at which unit it is (torch's interface AllGather)."""

    def __init__(self, order: ExchangeOrder, unit: int) -> None:
        self._order, self._unit = order, unit

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a unit's parameters."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """`output_tensor` becomes what all ranks have in `input_tensor`."""
        self._order.see(self._unit, input_tensor.numel())
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)


class SeenReduceScatter:
    """The same for gradients (torch's interface ReduceScatter)."""

    def __init__(self, order: ExchangeOrder, unit: int, look: Callable[[Tensor], None]) -> None:
        self._order, self._unit, self._look = order, unit, look

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a unit's gradients."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        """`output_tensor` becomes this rank's share of what all ranks have in `input_tensor`."""
        self._order.see(self._unit, input_tensor.numel())
        self._look(input_tensor)
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)


class SharedUse:
    """Gives a parameter that the loss of some rank depends on a gradient on all of them: zeros where it has none.

    One that no rank's loss depends on stays without, so that the optimizer leaves it alone, as in one process.

    Args:
        module: whose parameters are whole at the end of a backward, in an order that is the same on all ranks.
        reduced: whether the gradients have been summed over the ranks already, which is too early.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, reduced: Callable[[], bool]) -> None:
        self._module, self._runtime, self._reduced = module, runtime, reduced
        self._used = torch.zeros(sum(1 for _ in module.parameters()), dtype=torch.uint8)

    def begin(self) -> None:
        """A step begins."""
        self._used.zero_()

    def watched(self, loss: Tensor, *, last: bool) -> Tensor:
        """The `loss` of a microbatch, to be passed to backward; after the step's `last` one gradients are summed."""
        return after_backward(loss, partial(self._fill, last))

    def _fill(self, last: bool) -> None:
        parameters = list(self._module.parameters())
        own = [place for place, parameter in enumerate(parameters) if parameter.grad is not None]
        self._used[own] = 1
        if not last:
            return
        if self._reduced():
            raise ConfigError("--unused-parameters any: fsdp sums gradients before the backward has ended, because an "
                              "input of the model requires a gradient", expected="inputs without",
                              fix="--strategy ddp")  # fmt: skip
        before = self._used.clone()
        dist.all_reduce(self._used, dist.ReduceOp.MAX, group=self._runtime.cpu_group)
        for place in (self._used - before).nonzero().flatten().tolist():
            parameters[place].grad = torch.zeros_like(parameters[place])
