"""One batch of each split through the recipe's loss before the first step, so that what is wrong with it is said now.

Nothing is left of it: no gradient, no statistics, no random number drawn, nothing written.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from distkit.data import Batch, batch_size
from distkit.data.batch import tensors
from distkit.engine.meter import Meter
from distkit.engine.run import Run
from distkit.errors import ConfigError, nearest, shorten
from distkit.losses import LossOutput
from distkit.returned import calling, check_output
from distkit.runtime.seeding import capture_rng, restore_rng
from distkit.strategies.buffers import refuse_unlike, unlike_rank_0
from distkit.tensors.buffers import buffer_slots, extra_states, set_extra_states
from distkit.tensors.written import Written

#: Of the test set; an evaluation's last batch may have as few. Of the training set it is a whole microbatch, whose size
#: a loss may rely on.
TEST_SAMPLES = 4


def probe(run: Run) -> None:
    """Compute the loss of one microbatch of the training set and of one batch of the test set; all ranks together.

    Raises:
        ConfigError: a batch or a loss that cannot be trained, evaluated or reported, or that trains what is not in the
            model; the message names the function of the recipe.
    """
    loader, test = run.loader, run.test_loader
    with run.runtime.raise_on_all_ranks("reading the first batch of the training set"):
        with calling("the data set of build_dataset"):
            batch = loader.first()
        batch_size(batch)
    with untouched(run):
        check_training(run, batch)
    run.resume.warnings.extend(run.strategy.compiler_notes())
    if test is None:
        return
    with run.runtime.raise_on_all_ranks("reading the first batch of the test set"):
        with calling("the data set of build_dataset"):
            batch = test.first(min(run.config.eval_batch_size or run.split.microbatch_size, TEST_SAMPLES))
        batch_size(batch)
    with untouched(run), torch.no_grad():
        run.strategy.module.eval()
        with run.strategy.evaluating():
            output = loss_of(run, batch)
        check_metrics(run, output, batch_size(batch))
        note_odd_sums(run, output, batch_size(batch))
    run.strategy.skip_compiler_notes()  # compiled once more without gradients


def loss_of(run: Run, batch: Batch) -> LossOutput:
    """The checked loss of `batch`."""
    with run.strategy.precision(), calling("compute_loss"):
        output = run.compute_loss(run.strategy.module, batch)
    check_output(output, run.compute_metrics is not None)
    check_values(output)
    return output


def check_values(output: LossOutput) -> None:
    """Refuse numbers that no mean can be made of; this waits for the device."""
    for name, value in {**output.sums, **output.means}.items():
        if value.is_complex():
            raise ConfigError(f"compute_loss: the metric {name} is complex", expected="a real number", got=value.dtype)
    weight = output.weight
    if weight is not None and (weight.is_complex() or not 0 <= weight.item() < math.inf):
        raise ConfigError("compute_loss: weight must be a number >= 0", expected="what loss is the mean over: tokens",
                          got=weight.item())  # fmt: skip


def check_training(run: Run, batch: Batch) -> None:
    """Refuse a loss that does not depend on the model's parameters, or depends on others, and buffers that differ."""
    root = run.strategy.module
    # hooks would be compiled into the forward
    modules = {} if run.config.compile else dict(root.named_modules())
    # ranks that did not gather the same have said so when this ends, before they ask each other for more
    with noting_calls(root, modules) as (called, own, written), refusing_gradients(root), run.strategy.evaluating():
        output = loss_of(run, batch)
    try:
        check_changes(run, written)
    finally:
        written.put_back_()
    refuse_unlike(root, run.runtime)
    metrics_of(run, output, batch_size(batch))
    note_odd_sums(run, output, batch_size(batch))
    if run.strategy.needs_forward and called and root not in called:
        raise ConfigError("compute_loss calls parts of the model and never the model itself, which alone exchanges "
                          "gradients", expected="model(...) in compute_loss",
                          fix="move the calls of its parts into the model's forward")  # fmt: skip
    if not output.loss.requires_grad:
        raise ConfigError("compute_loss returned a loss without a gradient",
                          expected="a loss computed from model(...), without detach, item or no_grad",
                          got=f"a {output.loss.dtype} tensor that does not require one")  # fmt: skip
    used = list(leaves(output.loss))
    check_parameters(run, output.loss, used, own)
    check_tensors(run, used, batch)


def check_changes(run: Run, written: Written) -> None:
    """Refuse parameters that the forward changes in place where the change would be lost, or differ between ranks."""
    changed = written.changed()
    names = sorted({name for names in run.runtime.gather(changed) for name in names})
    if not names:
        return
    if not run.strategy.keeps_changes:
        raise ConfigError(f"the forward changes the parameter {names[0]} in place, which {run.strategy.name} loses",
                          expected="parameters that only the optimizer changes, and buffers",
                          fix="self.register_buffer(...), or --strategy ddp")  # fmt: skip
    now = dict(run.strategy.module.named_parameters())
    if unlike := unlike_rank_0({name: now[name].detach() for name in names if name in now}, run.runtime):
        raise ConfigError(f"the forward changes the parameter {unlike[0]} in place, and differently on each rank",
                          expected="the same parameters on all ranks",
                          fix="average the change over the ranks, or distkit.register_rank_buffer")  # fmt: skip
    run.resume.warnings.append(f"the forward changes parameters in place: {shorten(names)}")


@contextmanager
def refusing_gradients(root: nn.Module) -> Iterator[None]:
    """Refuse a compute_loss that makes or drops gradients itself; afterwards there are none."""
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad and parameter.numel()]
    smallest = min(trained, key=lambda parameter: parameter.numel(), default=None)
    if smallest is not None:
        smallest.grad = torch.zeros_like(smallest)
    try:
        zeros = None if smallest is None else smallest.grad
        yield
        touched = smallest is not None and smallest.grad is not zeros
        if touched or any(each.grad is not None for each in trained if each is not smallest) or \
                (zeros is not None and zeros.any()):  # fmt: skip
            raise ConfigError("compute_loss changes the gradients itself (backward, zero_grad)",
                              expected="a loss: the engine calls backward, and drops gradients in time",
                              fix="return LossOutput(loss)")  # fmt: skip
    finally:
        for parameter in trained:
            parameter.grad = None


def check_tensors(run: Run, used: Iterable[Tensor], batch: Batch) -> None:
    """Refuse a loss that trains tensors which are no parameters: nothing would move them."""

    def others(used: Iterable[Tensor]) -> list[Tensor]:
        read = {id(tensor) for _, tensor in tensors(batch)}
        return [leaf for leaf in used if not isinstance(leaf, nn.Parameter) and id(leaf) not in read]

    before = [] if run.config.compile else others(used)
    if not run.runtime.any_rank(bool(before))():
        return
    # what compute_loss makes (the input of a gradient penalty) is another tensor each time
    root = run.strategy.module
    with noting_calls(root, dict(root.named_modules())) as (_, _, written), run.strategy.evaluating():
        again = list(leaves(loss_of(run, batch).loss))  # held, or another one could get the same id
    written.put_back_()
    known = {id(leaf) for leaf in others(again)}
    lasting = [leaf for leaf in before if id(leaf) in known]
    if run.runtime.any_rank(bool(lasting))():
        raise ConfigError(
            f"compute_loss trains {len(lasting) or 'some'} tensors that are no parameters: they would never move",
            expected="every parameter in what build_model returns",
            got=", ".join(f"one of shape {list(leaf.shape)}" for leaf in lasting[:3]) or "another rank's",
            fix="self.log_variance = nn.Parameter(...) in the model",
        )


def check_parameters(run: Run, loss: Tensor, used: Sequence[Tensor], own: Mapping[int, nn.Parameter]) -> None:
    """Refuse a `loss` that uses others than the model's `own` parameters, or not all of them where it must."""
    if run.config.compile and not any(id(leaf) in own for leaf in used):
        return  # gathered ones, which nobody has noted
    foreign = [leaf for leaf in used if isinstance(leaf, nn.Parameter) and id(leaf) not in own]
    if foreign:
        raise ConfigError(
            f"compute_loss trains {len(foreign)} parameters that are not in the model: they would never move",
            expected="every parameter in what build_model returns",
            got=", ".join(f"one of shape {list(parameter.shape)}" for parameter in foreign[:3]),
            fix="self.criterion = … in the model, and model.criterion(…) in compute_loss",
        )
    ids = {id(leaf) for leaf in used}
    trained = {name: p for name, p in run.strategy.module.named_parameters() if p.requires_grad}
    unused = [name for name, parameter in trained.items() if id(parameter) not in ids]
    if unused and not hides_leaves(loss):
        run.strategy.refuse_unused(unused)


@contextmanager
def noting_calls(
    root: nn.Module, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[set[nn.Module], dict[int, nn.Parameter], Written]]:
    """The modules that are called, their parameters then, by id, and what is written to these.

    fsdp has the gathered ones only then. Afterwards parameters are as before.
    """
    called: set[nn.Module] = set()
    own = {id(parameter): parameter for parameter in root.parameters()}
    written = Written()
    written.watch(root.named_parameters() if modules else ())

    def note(name: str, module: nn.Module, _args: object) -> None:
        called.add(module)
        own.update({id(parameter): parameter for parameter in module.parameters()})
        # those of its children may not be gathered yet
        written.watch(module.named_parameters(name, recurse=False))

    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
    try:
        with written if modules else nullcontext():
            yield called, own, written
    finally:
        for handle in handles:
            handle.remove()


def graph(loss: Tensor) -> Iterator[Node]:
    """The nodes of the backward of `loss`."""
    nodes, known = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        yield node
        nodes.extend(following for following, _ in node.next_functions)


def leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that a backward of `loss` would give gradients."""
    for node in graph(loss):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable


def hides_leaves(loss: Tensor) -> bool:
    """Whether a part of the backward may have a graph of its own, as torch.utils.checkpoint with use_reentrant has."""
    known = ("distkit.", "deepspeed.", "torch.distributed.")
    kinds = {type(node) for node in graph(loss) if issubclass(type(node), BackwardCFunction)}
    return any(not getattr(kind, "_forward_cls", kind).__module__.startswith(known) for kind in kinds)


def note_odd_sums(run: Run, output: LossOutput, samples: int) -> None:
    """Note what looks like a mean among the sums of a batch of `samples`: it would be divided once more."""
    here = {}
    for name, value in output.sums.items() if run.compute_metrics is None and samples > 1 else ():
        if value.dtype == torch.bool or (value.is_floating_point() and 0 < value.item() < 1):
            told = f"the sum {name} of {samples} samples is {value.item():.3g}, and is reported divided by {samples}"
            here[name] = f"compute_loss: {told}; a mean belongs into LossOutput(loss, means={{{name!r}: ...}})"
    noted = run.resume.warnings
    for name, note in run.runtime.broadcast(here).items():
        if not any(note.startswith(f"compute_loss: the sum {name} of ") for note in noted):
            noted.append(note)


def metrics_of(run: Run, output: LossOutput, samples: int) -> dict[str, float]:
    """The metrics that a report of this batch of every rank would have."""
    meter = Meter(run.runtime, run.compute_metrics)
    meter.add(output, samples)
    return meter.reduce().metrics


def check_metrics(run: Run, output: LossOutput, samples: int) -> None:
    """Refuse choices of the recipe and the configuration that name a metric which is not reported."""
    names = ["loss", *metrics_of(run, output, samples)]
    wanted = {"the recipe's best": run.trackers.rule.metric}
    if run.plateau is not None:
        wanted["--schedule.metric"] = run.plateau.metric
    if run.early_stop is not None:
        wanted["--stop.metric"] = run.early_stop.config.metric
    for who, metric in wanted.items():
        if metric not in names:
            close = nearest(metric, names) or "loss"
            fix = f"{who} {close}" if who.startswith("--") else f'best=("{close}", …)'
            raise ConfigError(f"{who} is {metric}, which compute_loss does not report for the test set",
                              expected=f"one of {', '.join(names)}", got=metric, fix=fix)  # fmt: skip


@contextmanager
def untouched(run: Run) -> Iterator[None]:
    """Afterwards generators, buffers, extra states and modes of the model are as before."""
    model, generators = run.strategy.module, capture_rng(run.runtime.device)
    modes = {module: module.training for module in model.modules()}
    buffers = {(slot.owner, slot.key): (slot.tensor, copy.deepcopy(slot.tensor)) for slot in buffer_slots(model)}
    extras = copy.deepcopy(extra_states(model))
    try:
        yield
    finally:
        for slot in list(buffer_slots(model)):
            tensor, values = buffers.get((slot.owner, slot.key), (None, None))
            if tensor is not None and values is not None:
                put_back_(tensor, values)
            if (slot.owner, slot.key) in buffers:
                slot.owner._buffers[slot.key] = tensor
            else:
                del slot.owner._buffers[slot.key]
        set_extra_states(model, {name: extras[name] for name in extras if can_restore(model.get_submodule(name))})
        for module, mode in modes.items():
            module.training = mode
        restore_rng(generators, run.runtime.device)


def can_restore(module: nn.Module) -> bool:
    """False for a module that gives an extra state and takes none: what it gives is no state."""
    return type(module).set_extra_state is not nn.Module.set_extra_state


@torch.no_grad()
def put_back_(tensor: Tensor, values: Tensor) -> None:
    """Give a buffer its `values` again, in its own memory, which other buffers may share."""
    if tensor.layout is not torch.strided:
        return  # a layer replaces such a tensor as a whole
    if tensor.shape != values.shape:
        tensor.set_(values.untyped_storage(), 0, values.shape, values.stride())
    elif not torch.equal(tensor, values):  # one that overlaps itself can be read only
        tensor.copy_(values)
