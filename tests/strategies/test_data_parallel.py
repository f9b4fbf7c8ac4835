"""DDP's buckets: the same before and after a resume, so that three ranks sum in the same order (C3)."""

import copy
import itertools
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.harness import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distkit.config import TrainConfig
from distkit.runtime import read_topology
from distkit.runtime.process import Runtime, start
from distkit.strategies.data_parallel import DataParallel

BASE = TrainConfig(num_steps=9, global_batch_size=12, device="cpu", num_threads=1, timeout_seconds=60)
DEPTH, WORDS = 100, 53
WIDTHS = [37 + (i * 29) % 61 for i in range(DEPTH + 1)]


class Odd(nn.Module):
    """200 parameters of odd sizes, 1.8 MB: two buckets; `mixed` runs the layers in another order than that of names."""

    def __init__(self, mixed: bool, sparse: bool) -> None:
        super().__init__()
        self.order = sorted(range(DEPTH), key=lambda i: i * 47 % DEPTH) if mixed else list(range(DEPTH))
        self.embedding = nn.Embedding(WORDS, WIDTHS[0], sparse=sparse)
        self.norm = nn.BatchNorm1d(WIDTHS[0])
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)])

    def forward(self, words: Tensor) -> Tensor:
        hidden = F.pad(self.norm(self.embedding(words)), (0, 100 - WIDTHS[0]))
        for i in self.order:
            out = torch.tanh(self.layers[i](hidden[:, : WIDTHS[i]]))
            hidden = hidden + F.pad(out, (0, 100 - out.shape[1]))
        return hidden


def prepared(runtime: Runtime, model: nn.Module, momentum: float = 0.0) -> DataParallel:
    strategy = DataParallel(BASE, runtime)
    strategy.prepare(model, lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=momentum))
    return strategy


def train(strategy: DataParallel, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 * step + strategy.runtime.rank)
        strategy.zero_gradients()
        for exchange in (False, True):
            words = torch.randint(0, WORDS, (4,), generator=generator)
            strategy.exchange_gradients(exchange)
            strategy.backward(F.cross_entropy(strategy.model(words), words))
        strategy.optimizer.step()


def differing(mixed: bool, sparse: bool) -> list[str]:
    """Names of the tensors that differ between a run of five steps and one that was resumed after three."""
    runtime = start(BASE, read_topology(os.environ))

    def fresh() -> DataParallel:
        torch.manual_seed(0)
        return prepared(runtime, Odd(mixed, sparse), momentum=0.0 if sparse else 0.9)

    straight, resumed = fresh(), fresh()
    assert sum(p.numel() * p.element_size() for p in straight.module.parameters()) > 1.5 * 2**20  # a bucket has 1 MiB
    train(straight, 0, 3)
    resumed.module.load_state_dict(straight.module.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
    before = copy.deepcopy(straight.module.state_dict())
    for strategy in (straight, resumed):
        train(strategy, 3, 5)
    runtime.close()
    ended, again = straight.module.state_dict(), resumed.module.state_dict()
    assert not any(torch.equal(before[name], ended[name]) for name in before)
    return [name for name in ended if not torch.equal(ended[name], again[name])]


@pytest.mark.distributed
@pytest.mark.parametrize(("mixed", "sparse"), [(False, False), (True, False), (True, True)])
def test_three_ranks_resume_to_the_bit(mixed: bool, sparse: bool) -> None:
    assert run_ranks(differing, 3, mixed, sparse) == [[]] * 3


class Touchy(nn.Module):
    """Parameters of many kinds, and a record of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.full((3,), 2.0, dtype=torch.bfloat16))
        self.high = nn.Parameter(torch.full((2, 2), float("nan"), dtype=torch.float64))
        self.scalar = nn.Parameter(torch.tensor(float("inf")))
        self.tied = self.scalar
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.bag = nn.EmbeddingBag(5, 3, sparse=True)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.norm.eval()
        self.calls: list[str] = []
        self.register_forward_pre_hook(lambda *_: self.calls.append("pre hook"))
        self.register_forward_hook(lambda *_: self.calls.append("hook"))
        self.register_full_backward_hook(lambda *_: self.calls.append("backward hook"))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append("forward")
        return x * self.low.sum() + self.norm(x)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            for name, value in model.state_dict().items()}  # fmt: skip


def touched() -> list[str]:
    """What wrapping changed that it should not."""
    warnings.simplefilter("error")
    runtime = start(BASE, read_topology(os.environ))
    torch.manual_seed(0)
    model = Touchy()
    names = ["module." + name for name, _ in model.named_parameters()]
    before, modes, generator = bits(model), [m.training for m in model.modules()], torch.random.get_rng_state()
    with torch.no_grad():
        strategy = prepared(runtime, model)
    kept = {
        "values": bits(model) == before,
        "modes": [m.training for m in model.modules()] == modes,
        "generator": torch.equal(torch.random.get_rng_state(), generator),
        "calls": model.calls == [],
        "gradients": all(p.grad is None for p in model.parameters()),
        "module": isinstance(strategy.model, DistributedDataParallel) and strategy.model.module is model,
        "names": [name for name, _ in strategy.model.named_parameters()] == names,
    }
    # buffers are sent from rank 0 at each forward, as before
    model.norm.running_mean.fill_(runtime.rank + 1.0)
    strategy.model(torch.zeros(2, 4))
    kept["forward"] = model.calls == ["pre hook", "forward", "hook"]
    kept["buffers"] = bool((model.norm.running_mean == 1.0).all())
    runtime.close()
    return [name for name, is_kept in kept.items() if not is_kept]


@pytest.mark.distributed
def test_wrapping_leaves_the_module_as_it_is() -> None:
    assert run_ranks(touched, 2) == [[], []]


def test_one_process_is_not_wrapped() -> None:
    topology = read_topology({})
    strategy = prepared(Runtime(topology=topology, device=torch.device("cpu")), Odd(mixed=False, sparse=False))
    assert strategy.name == "single"
    assert strategy.model is strategy.module
