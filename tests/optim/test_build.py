"""Every optimizer by name equals the torch class made by hand; groups, names, and what fp16 needs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distkit.config import LBFGS, OPTIMIZERS, SGD, Adam, AdamW, Muon, OptimConfig, RMSprop, SparseAdam
from distkit.errors import ConfigError
from distkit.optim import (
    MuonWithAdamW,
    OptimizerState,
    build_optimizer,
    can_fuse,
    default_param_groups,
    named_parameters,
    set_lr,
    skips_on_device,
)

Model = nn.Module


class Tiny(nn.Module):
    """Embedding, hidden matrix, norm, convolution, head."""

    def __init__(self, sparse: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6, sparse=sparse)
        self.hidden = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.head = nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.hidden(self.embedding(tokens)))
        x = self.conv(x.unsqueeze(1)).squeeze(1)
        return self.head(torch.tanh(x))


def values(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    return OptimizerState(optimizer, named_parameters(model), OptimConfig).all_values()


def make(sparse: bool = False, tied: bool = False) -> Tiny:
    torch.manual_seed(0)
    return Tiny(sparse, tied)


def loss_of(model: Model) -> Tensor:
    tokens = torch.tensor([0, 3, 3, 6, 1])
    return nn.functional.cross_entropy(model(tokens), tokens)


def train(model: Model, *optimizers: Optimizer, num_steps: int = 3) -> None:
    def closure() -> float:
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    for _ in range(num_steps):
        if isinstance(optimizers[0], torch.optim.LBFGS):
            optimizers[0].step(closure)
            continue
        closure()
        for optimizer in optimizers:
            optimizer.step()


def assert_same_weights(left: Model, right: Model, atol: float = 0.0) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


#: Name -> the options we set, and torch's class with the same ones.
BY_HAND: dict[str, tuple[dict[str, object], Callable[..., Optimizer], dict[str, object]]] = {
    "sgd": ({"momentum": 0.9, "nesterov": True}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": ({"betas": (0.8, 0.9), "amsgrad": True}, torch.optim.Adam, {"betas": (0.8, 0.9), "amsgrad": True}),
    "adamw": ({"eps": 1e-6}, torch.optim.AdamW, {"eps": 1e-6}),
    "adamax": ({"betas": (0.8, 0.9)}, torch.optim.Adamax, {"betas": (0.8, 0.9)}),
    "nadam": (
        {"momentum_decay": 1e-3, "decoupled_weight_decay": True},
        torch.optim.NAdam,
        {"momentum_decay": 1e-3, "decoupled_weight_decay": True},
    ),
    "radam": ({"decoupled_weight_decay": True}, torch.optim.RAdam, {"decoupled_weight_decay": True}),
    "rmsprop": (
        {"alpha": 0.9, "momentum": 0.5, "centered": True},
        torch.optim.RMSprop,
        {"alpha": 0.9, "momentum": 0.5, "centered": True},
    ),
    "rprop": (
        {"etas": (0.4, 1.3), "step_sizes": (1e-5, 1.0)},
        torch.optim.Rprop,
        {"etas": (0.4, 1.3), "step_sizes": (1e-5, 1.0)},
    ),
    "adagrad": (
        {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
    "adadelta": ({"rho": 0.8}, torch.optim.Adadelta, {"rho": 0.8}),
    "asgd": (
        {"lambd": 1e-3, "alpha": 0.6, "t0": 1.0},
        torch.optim.ASGD,
        {"lambd": 1e-3, "alpha": 0.6, "t0": 1.0},
    ),
    "adafactor": ({"beta2_decay": -0.7, "clip_threshold": 2.0}, torch.optim.Adafactor, {"beta2_decay": -0.7, "d": 2.0}),
}
NO_DECAY = {"rprop", "sparse_adam", "lbfgs"}


@pytest.mark.parametrize("name", BY_HAND)
def test_equals_the_torch_class(name: str) -> None:
    options, torch_class, arguments = BY_HAND[name]
    decay = 0.0 if name in NO_DECAY else 0.05
    config = OPTIMIZERS[name](lr=0.01, weight_decay=decay, **options)  # type: ignore[arg-type]
    ours, theirs = make(), make()
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2]} | ({"weight_decay": decay} if decay else {}),
        {"params": [p for p in theirs.parameters() if p.ndim < 2]} | ({"weight_decay": 0.0} if decay else {}),
    ]
    train(ours, build_optimizer(config, default_param_groups(ours, config)))
    train(theirs, torch_class(groups, lr=0.01, **arguments))
    fused = name in ("sgd", "adam", "adamw", "adagrad")
    assert_same_weights(ours, theirs, atol=1e-6 if fused else 0.0)
    assert not torch.equal(ours.hidden.weight, make().hidden.weight)


def test_every_name_is_tested() -> None:
    assert {*BY_HAND, "muon", "sparse_adam", "lbfgs"} == set(OPTIMIZERS)


def test_lbfgs_takes_a_closure_and_one_group() -> None:
    config = LBFGS(lr=0.5, max_iter=4, history_size=3, line_search="strong_wolfe")
    ours, theirs = make(), make()
    groups = default_param_groups(ours, config)
    assert len(groups) == 1
    assert len(groups[0]["params"]) == len(list(ours.parameters()))
    optimizer = build_optimizer(config, groups)
    train(ours, optimizer)
    hand = torch.optim.LBFGS(theirs.parameters(), 0.5, max_iter=4, history_size=3, line_search_fn="strong_wolfe")
    train(theirs, hand)
    assert_same_weights(ours, theirs)
    state = values(optimizer, ours)
    assert "embedding.weight/old_dirs/0" in state
    assert state["embedding.weight/n_iter"].dtype == torch.int64
    with pytest.raises(ConfigError, match="one parameter group"):
        build_optimizer(config, [{"params": [p]} for p in ours.parameters()])


# --- groups


def names_of(groups: list[dict[str, object]]) -> list[object]:
    return [group["param_names"] for group in groups]


def test_norms_and_biases_are_not_decayed() -> None:
    model = make()
    decay, rest = default_param_groups(model, SGD(weight_decay=0.1))
    assert decay["param_names"] == ["embedding.weight", "hidden.weight", "conv.weight", "head.weight"]
    assert rest["param_names"] == ["hidden.bias", "norm.weight", "norm.bias", "conv.bias"]
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    for group in (decay, rest):
        named = dict(model.named_parameters())
        assert all(p is named[n] for p, n in zip(group["params"], group["param_names"], strict=True))


def test_one_group_where_all_parameters_are_treated_alike() -> None:
    model = make()
    every_name = [name for name, _ in model.named_parameters()]
    assert names_of(default_param_groups(model, SGD(weight_decay=0.1, decay_all=True))) == [every_name]
    assert names_of(default_param_groups(model, SGD(weight_decay=0.0))) == [every_name]


def test_frozen_parameters_are_left_out_and_empty_groups_dropped() -> None:
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "hidden.weight")
    assert names_of(default_param_groups(model, SGD(weight_decay=0.1))) == [["hidden.weight"]]
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter to train"):
        default_param_groups(model, SGD())


def test_tied_weights_count_once() -> None:
    decay, _ = default_param_groups(make(tied=True), SGD(weight_decay=0.1))
    assert decay["param_names"] == ["embedding.weight", "hidden.weight", "conv.weight"]


def test_names_are_canonical_behind_wrappers() -> None:
    model = make()
    expected = [name for name, _ in model.named_parameters()]
    assert list(named_parameters(torch.compile(model, backend="eager"))) == expected  # type: ignore[arg-type]
    outer = nn.Sequential(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    assert list(named_parameters(outer)) == [f"0.{name}" for name in expected]


def test_names_are_canonical_behind_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: nn.Module, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    monkeypatch.setattr(DistributedDataParallel, "__init__", init)
    model = make()
    wrapped = DistributedDataParallel(model)
    assert list(named_parameters(wrapped)) == [name for name, _ in model.named_parameters()]


def test_groups_of_a_recipe_keep_their_own_lr() -> None:
    model = make()
    groups = [{"params": list(model.hidden.parameters()), "lr": 0.5}, {"params": list(model.head.parameters())}]
    optimizer = build_optimizer(SGD(lr=0.1), groups)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert "initial_lr" not in groups[0]
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]
    with pytest.raises(ConfigError, match="no parameter"):
        build_optimizer(SGD(), [])


# --- sparse gradients


@pytest.mark.filterwarnings("ignore:.*[Ss]parse.*:UserWarning")
@pytest.mark.parametrize("name", ["sparse_adam", "sgd", "adagrad"])
def test_sparse_embeddings(name: str) -> None:
    model = nn.Embedding(7, 3, sparse=True)
    before = model.weight.detach().clone()
    config = OPTIMIZERS[name](lr=0.1)
    groups = default_param_groups(model, config)
    assert [group["kind"] for group in groups] == ["sparse"]
    optimizer = build_optimizer(config, groups)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([1, 4])).pow(2).sum().backward()
        optimizer.step()
    changed = (model.weight != before).any(dim=1)
    assert changed.tolist() == [row in (1, 4) for row in range(7)]


def test_sparse_adam_names_the_dense_parameters() -> None:
    with pytest.raises(ConfigError) as caught:
        default_param_groups(make(sparse=True), SparseAdam())
    message = str(caught.value)
    assert "hidden.weight" in message
    assert "embedding.weight" not in message
    assert "--optim.name adam" in message


def test_sparse_gradients_need_an_optimizer_that_takes_them() -> None:
    with pytest.raises(ConfigError, match=r"adam cannot take the sparse gradients of embedding\.weight"):
        default_param_groups(make(sparse=True), Adam())
    with pytest.raises(ConfigError, match=r"--optim\.weight-decay 0"):
        default_param_groups(make(sparse=True), SGD(weight_decay=0.1))
    # tied to a dense use the gradient is dense
    default_param_groups(make(sparse=True, tied=True), Adam(weight_decay=0.1))


# --- fused


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad"])
def test_fused_kernels_are_taken_on_the_cpu(name: str) -> None:
    model = make()
    config = OPTIMIZERS[name](lr=0.1)
    optimizer = build_optimizer(config, default_param_groups(model, config))
    assert all(group["fused"] for group in optimizer.param_groups)
    # torch 2.11's fused adagrad does not
    assert skips_on_device(optimizer) or name == "adagrad"


def test_no_fused_kernel() -> None:
    complex_group = [{"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]}]
    assert not can_fuse(SGD(), complex_group)
    assert not can_fuse(RMSprop(), default_param_groups(make(), SGD()))
    config = SGD(momentum=0.9, dampening=0.1)
    optimizer = build_optimizer(config, default_param_groups(make(), config))
    assert not skips_on_device(optimizer)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad"])
def test_fp16_skips_the_first_update_and_goes_on(name: str) -> None:
    config = SGD(lr=0.1, momentum=0.9) if name == "sgd" else OPTIMIZERS[name](lr=0.1)
    skipped, clean = make(), make()
    optimizer = build_optimizer(config, default_param_groups(skipped, config))
    # memory that torch hands out again uninitialised
    garbage = [torch.full_like(p, float("nan")) for p in skipped.parameters() for _ in range(8)]
    del garbage
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (True, False, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(skipped) * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert_same_weights(skipped, clean)
    train(clean, build_optimizer(config, default_param_groups(clean, config)), num_steps=2)
    assert_same_weights(skipped, clean, atol=1e-6)


def test_sgd_takes_a_parameter_whose_gradient_comes_late() -> None:
    early, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer(SGD(lr=1.0, momentum=0.5), [{"params": [early, late]}])
    early.grad = torch.ones(2)
    optimizer.step()
    late.grad = torch.ones(2)
    optimizer.step()
    assert early.tolist() == [-2.5, -2.5]
    assert late.tolist() == [-1.0, -1.0]


# --- muon

MUON = Muon(lr=0.02, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.9), adjust_lr="match_rms_adamw")


def test_muon_takes_hidden_matrices_only() -> None:
    groups = default_param_groups(make(), MUON)
    assert [(group["kind"], group["weight_decay"]) for group in groups] == [("muon", 0.1), ("adamw", 0.1), ("adamw", 0)]
    assert names_of(groups) == [
        ["hidden.weight"],
        ["embedding.weight", "conv.weight", "head.weight"],
        ["hidden.bias", "norm.weight", "norm.bias", "conv.bias"],
    ]


def test_a_head_that_is_not_the_last_linear_is_found_by_its_name() -> None:
    model = nn.Module()
    model.head, model.hidden = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), nn.Linear(3, 3)
    muon, decayed, _ = default_param_groups(model, MUON)
    assert muon["param_names"] == ["hidden.weight"]
    assert decayed["param_names"] == ["head.0.weight", "head.1.weight"]


def test_muon_equals_the_two_torch_classes() -> None:
    ours, theirs = make(), make()
    optimizer = build_optimizer(MUON, default_param_groups(ours, MUON))
    train(ours, optimizer)
    muon = torch.optim.Muon(
        [theirs.hidden.weight], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    others = [p for p in theirs.parameters() if p is not theirs.hidden.weight]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.02,
        betas=(0.8, 0.9),
    )
    train(theirs, muon, adamw)
    assert_same_weights(ours, theirs, atol=1e-6)
    assert set(optimizer.state) == set(ours.parameters())
    assert not skips_on_device(optimizer)


def test_muon_follows_the_lr_of_its_groups() -> None:
    model = make()
    optimizer = build_optimizer(MUON, default_param_groups(model, MUON))
    set_lr(optimizer, 0.0)
    before = copy.deepcopy(model)
    train(model, optimizer)
    assert_same_weights(model, before)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("way", ["load", "deepcopy"])
def test_muon_continues_from_its_state(way: str) -> None:
    whole, cut = make(), make()
    reference = build_optimizer(MUON, default_param_groups(whole, MUON))
    train(whole, reference, num_steps=4)
    first = build_optimizer(MUON, default_param_groups(cut, MUON))
    train(cut, first, num_steps=2)
    if way == "load":
        second = build_optimizer(MUON, default_param_groups(cut, MUON))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    else:
        cut, second = copy.deepcopy((cut, first))
    set_lr(second, 1.0)
    train(cut, second, num_steps=2)
    assert_same_weights(cut, whole)
    ours, theirs = (
        values(second, cut),
        values(reference, whole),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_muon_runs_a_closure_and_refuses_late_groups() -> None:
    model = make()
    optimizer = build_optimizer(MUON, default_param_groups(model, MUON))
    assert isinstance(optimizer, MuonWithAdamW)

    def closure() -> float:
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(loss_of(make()).item())
    with pytest.raises(ConfigError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


def test_muon_says_what_it_lacks() -> None:
    head_only = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 3))
    with pytest.raises(ConfigError, match=r"--optim\.name adamw"):
        build_optimizer(MUON, default_param_groups(head_only, MUON))
    with pytest.raises(ConfigError, match='"kind"'):
        build_optimizer(MUON, [{"params": list(head_only.parameters())}])


def test_muon_without_anything_for_adamw() -> None:
    matrix = nn.Parameter(torch.eye(3))
    optimizer = build_optimizer(Muon(lr=0.1), [{"params": [matrix], "kind": "muon"}])
    matrix.grad = torch.eye(3)
    optimizer.step()
    assert not torch.equal(matrix, torch.eye(3))


# --- state by name


def test_named_state_does_not_depend_on_the_order_of_groups() -> None:
    config = AdamW(lr=0.01, weight_decay=0.1)
    one, two = make(), make()
    first = build_optimizer(config, default_param_groups(one, config))
    second = build_optimizer(config, default_param_groups(two, config)[::-1])
    train(one, first)
    train(two, second)
    left, right = (
        values(first, one),
        values(second, two),
    )
    assert left.keys() == right.keys()
    assert len(left) == 3 * len(list(one.parameters()))
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert left["hidden.weight/exp_avg"] is first.state[one.hidden.weight]["exp_avg"]


def test_named_state_turns_numbers_into_tensors() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {"count": 3, "rate": 0.5, "nothing": None, "pair": [torch.ones(1), None]}
    state = values(optimizer, model)
    assert {name: (value.dtype, value.tolist()) for name, value in state.items()} == {
        "weight/count": (torch.int64, 3),
        "weight/rate": (torch.float64, 0.5),
        "weight/pair/0": (torch.float32, [1.0]),
    }
    with pytest.raises(ConfigError, match="not have"):
        values(optimizer, nn.Linear(2, 1))
    optimizer.state[model.weight] = {"text": "x"}
    with pytest.raises(TypeError, match="weight/text"):
        values(optimizer, model)
