"""Every optimizer's state, taken as tensors and JSON, put into a new one: training goes on to the bit (C3)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from support.harness import run_ranks
from torch import Tensor, nn
from torch.optim import Optimizer

from distkit.config import OPTIMIZERS, OptimConfig
from distkit.errors import CheckpointError, ConfigError
from distkit.optim import (
    MuonWithAdamW,
    OptimizerState,
    build_optimizer,
    default_param_groups,
    named_parameters,
)
from distkit.optim.state import decode_number, encode_number

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*[Ss]parse.*:UserWarning")]


class Net(nn.Module):
    """A channels_last convolution, a name with "/", tied weights, and gradients that never come, or come late."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 1), padding=(1, 0)).to(memory_format=torch.channels_last)
        self.blocks = nn.ModuleDict({"a/b": nn.Linear(4, 4), "step": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 5, bias=False)
        self.embedding = nn.Embedding(5, 4)
        self.embedding.weight = self.head.weight
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.late = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        dtype = self.scale.dtype
        images = torch.randn(6, 3, 5, 5, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(5, (6,), generator=generator)
        x = self.conv(images).mean(dim=(2, 3)) + self.embedding(labels.flip(0))
        x = torch.tanh(self.blocks["step"](torch.tanh(self.blocks["a/b"](x)))) * self.scale
        if step >= 7:
            x = x + self.late(x)
        return nn.functional.cross_entropy(self.head(x).float(), labels)


class Contiguous(Net):
    """For LBFGS, which takes no other layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.to(memory_format=torch.contiguous_format)


class Rows(nn.Module):
    """Nothing but rows with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(9, 3, sparse=True)
        self.bag = nn.EmbeddingBag(5, 3, sparse=True, mode="sum")

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        first, second = (torch.randint(n, (4, 2), generator=generator) for n in (9, 5))
        return (self.rows(first).sum(dim=1) - self.bag(second)).pow(2).sum()


Model = Net | Rows


@dataclass
class Case:
    config: OptimConfig
    model: type[Model] = Net
    force: dict[str, object] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def build(self, seed: int) -> tuple[Model, Optimizer]:
        torch.manual_seed(seed)
        model = self.model().to(self.dtype)
        optimizer = build_optimizer(self.config, default_param_groups(model, self.config))
        for group in optimizer.param_groups:
            group.update(self.force)
        return model, optimizer


def config(name: str, **options: object) -> OptimConfig:
    return OPTIMIZERS[name](**{"lr": 0.05, **options})  # type: ignore[arg-type]


SINGLE, FOREACH = {"fused": None, "foreach": False}, {"fused": None, "foreach": True}
CASES = {name: Case(config(name)) for name in OPTIMIZERS} | {
    "sgd momentum": Case(config("sgd", momentum=0.9, nesterov=True, weight_decay=0.1)),
    "sgd momentum foreach": Case(config("sgd", momentum=0.9), force=FOREACH),
    "sgd dampening": Case(config("sgd", momentum=0.9, dampening=0.5)),
    "sgd sparse": Case(config("sgd"), Rows),
    "sgd sparse momentum": Case(config("sgd", momentum=0.9), Rows),
    "adam amsgrad": Case(config("adam", amsgrad=True, weight_decay=0.1)),
    "adam amsgrad single": Case(config("adam", amsgrad=True), force=SINGLE),
    "adam amsgrad foreach": Case(config("adam", amsgrad=True), force=FOREACH),
    "adamw bf16": Case(config("adamw"), dtype=torch.bfloat16),
    "adamw float64 single": Case(config("adamw"), force=SINGLE, dtype=torch.float64),
    "adamw foreach": Case(config("adamw"), force=FOREACH),
    "nadam foreach": Case(config("nadam"), force={"foreach": True}),
    "radam foreach": Case(config("radam"), force={"foreach": True}),
    "rmsprop everything": Case(config("rmsprop", momentum=0.5, centered=True)),
    "rprop foreach": Case(config("rprop"), force={"foreach": True}),
    "asgd averaging": Case(config("asgd", t0=2.0)),
    "asgd foreach": Case(config("asgd", t0=2.0), force={"foreach": True}),
    "adagrad single": Case(config("adagrad", lr_decay=0.1), force=SINGLE),
    "adagrad sparse": Case(config("adagrad"), Rows),
    "adafactor bf16": Case(config("adafactor"), dtype=torch.bfloat16),
    "adafactor foreach": Case(config("adafactor"), force={"foreach": True}),
    "sparse_adam": Case(config("sparse_adam"), Rows),
    "lbfgs": Case(config("lbfgs", max_iter=6), Contiguous),
    "lbfgs line search": Case(config("lbfgs", line_search="strong_wolfe", max_iter=4, history_size=3), Contiguous),
    "lbfgs short memory": Case(config("lbfgs", max_iter=3, history_size=2), Contiguous),
    "muon bf16": Case(config("muon"), dtype=torch.bfloat16),
}


def train(model: Model, optimizer: Optimizer, steps: range) -> None:
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = model.loss(step)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()


def state_of(optimizer: Optimizer, model: nn.Module) -> OptimizerState:
    facts = next(row for row in OPTIMIZERS.values() if row.torch_class.endswith(f".{type(optimizer).__name__}"))
    return OptimizerState(optimizer, named_parameters(model), facts)


Saved = tuple[dict[str, object], dict[str, Tensor]]


def save(optimizer: Optimizer, model: Model) -> Saved:
    """As a checkpoint would hold it: strict JSON, and contiguous copies."""
    text = json.dumps(state_of(optimizer, model).structure(), allow_nan=False)
    tensors = {name: t.detach().clone().contiguous() for name, t in state_of(optimizer, model).tensors().items()}
    return json.loads(text), tensors


def put_back(optimizer: Optimizer, model: Model, saved: Saved) -> None:
    structure, tensors = saved
    assert state_of(optimizer, model).compare(structure) == []
    before = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    new = state_of(optimizer, model).allocate(
        structure, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    )
    assert {parameter: dict(state) for parameter, state in optimizer.state.items()} == before
    assert new.keys() == tensors.keys()
    for name, tensor in tensors.items():
        new[name].copy_(tensor)
    state_of(optimizer, model).install(structure, new)


def copy_weights(source: Model, target: Model) -> None:
    with torch.no_grad():
        for own, other in zip(target.parameters(), source.parameters(), strict=True):
            own.copy_(other)


def parts(value: object) -> Iterator[object]:
    """`value` in pieces that == compares, layout and bits included."""
    if isinstance(value, Tensor) and value.is_sparse:
        yield ("sparse", tuple(value.shape), value.is_coalesced())
        yield value._indices().tolist()  # its rows lie in a larger buffer, of any size
        yield from parts(value._values())
    elif isinstance(value, Tensor):
        yield (value.dtype, value.device, tuple(value.shape), value.stride(), value.requires_grad)
        yield value.detach().clone().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, list):
        yield "list"
        for inner in value:
            yield from parts(inner)
    else:
        yield (type(value), struct.pack(">d", value) if isinstance(value, float) else value)


def everything(model: Model, optimizer: Optimizer) -> dict[str, list[object]]:
    found = {name: list(parts(parameter)) for name, parameter in model.named_parameters()}
    for name, parameter in named_parameters(model).items():
        if parameter in optimizer.state:
            found[f"{name} has"] = list(optimizer.state[parameter])
            found |= {f"{name}/{k}": list(parts(v)) for k, v in optimizer.state[parameter].items()}
    return found


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_to_the_bit(name: str) -> None:
    case = CASES[name]
    model, optimizer = case.build(seed=0)
    train(model, optimizer, range(5))
    saved = save(optimizer, model)
    again, fresh = case.build(seed=1)
    copy_weights(model, again)
    put_back(fresh, again, saved)
    assert everything(again, fresh) == everything(model, optimizer)
    digested = state_of(fresh, again).all_values()
    assert digested.keys() == state_of(optimizer, model).all_values().keys()
    train(model, optimizer, range(5, 10))
    train(again, fresh, range(5, 10))
    assert everything(again, fresh) == everything(model, optimizer)


def test_every_optimizer_has_a_case() -> None:
    assert {case.config.name for case in CASES.values()} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", CASES)
def test_no_two_tensors_of_a_state_share_memory(name: str) -> None:
    model, optimizer = CASES[name].build(seed=0)
    train(model, optimizer, range(3))
    tensors = state_of(optimizer, model).tensors()
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    assert len(set(places)) == len(places)


def test_before_the_first_step_and_twice() -> None:
    for name in ("adagrad", "sgd momentum", "adam"):
        model, optimizer = CASES[name].build(seed=0)
        saved = save(optimizer, model)
        again, fresh = CASES[name].build(seed=1)
        copy_weights(model, again)
        train(again, fresh, range(2))  # what is there is replaced
        copy_weights(model, again)
        put_back(fresh, again, saved)
        put_back(fresh, again, saved)
        train(model, optimizer, range(3))
        train(again, fresh, range(3))
        assert everything(again, fresh) == everything(model, optimizer)


def test_muon_and_adamw_share_what_was_installed() -> None:
    model, optimizer = CASES["muon"].build(seed=0)
    train(model, optimizer, range(2))
    again, fresh = CASES["muon"].build(seed=1)
    assert isinstance(fresh, MuonWithAdamW)
    state = fresh.state
    put_back(fresh, again, save(optimizer, model))
    assert all(part.state is fresh.state is state for part in fresh._parts)
    assert len(fresh.state) == len(optimizer.state) > 0


# --- the form


def test_structure_says_what_there_is() -> None:
    model, optimizer = CASES["lbfgs line search"].build(seed=0)
    train(model, optimizer, range(2))
    structure = json.loads(json.dumps(state_of(optimizer, model).structure(), allow_nan=False))
    assert structure["class"] == "LBFGS"
    (group,) = structure["groups"]
    assert group["param_names"][:3] == ["unused", "scale", "conv.weight"]
    assert "blocks.a/b.weight" in group["param_names"]
    assert (group["lr"], group["history_size"], group["line_search_fn"]) == (0.05, 3, "strong_wolfe")
    state = structure["state"]["unused"]
    assert state["n_iter"] == {"number": optimizer.state[model.unused]["n_iter"]}  # type: ignore[union-attr]
    assert state["prev_loss"]["number"] == optimizer.state[model.unused]["prev_loss"]  # type: ignore[union-attr]
    assert state["d"] == {"tensor": True}
    assert {"none": True} in state["al"]["list"] or {"tensor": True} in state["al"]["list"]


def test_structure_keeps_hyperparameters_for_people() -> None:
    model, optimizer = CASES["adamw"].build(seed=0)
    group = state_of(optimizer, model).structure()["groups"][0]  # type: ignore[index]
    assert group["betas"] == [0.9, 0.999]
    assert group["fused"] is True
    assert "params" not in group


def test_tensors_are_the_live_ones() -> None:
    model, optimizer = CASES["adam"].build(seed=0)
    train(model, optimizer, range(1))
    tensors = state_of(optimizer, model).tensors()
    weight = model.blocks["a/b"].weight  # type: ignore[union-attr]
    assert tensors["blocks.a/b.weight/exp_avg"] is optimizer.state[weight]["exp_avg"]
    assert "unused/exp_avg" not in tensors
    assert [name for name in tensors if name.startswith("embedding")] == []  # tied to head.weight
    assert state_of(optimizer, model).all_values().keys() == tensors.keys()


@pytest.mark.parametrize(
    "number", [0, -3, 2**70, True, 0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, -math.nan]
)
def test_numbers_survive_json_exactly(number: float) -> None:
    back = decode_number(json.loads(json.dumps(encode_number(number), allow_nan=False)))
    assert type(back) is type(number)
    assert struct.pack(">d", back) == struct.pack(">d", number)
    assert back == number or math.isnan(number)


def test_lists_and_none() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters())
    value = {"mixed": [torch.ones(3), None, -math.nan, [7, torch.zeros(())]], "nothing": None, "empty": []}
    optimizer.state[model.weight] = value
    saved = save(optimizer, model)  # type: ignore[arg-type]
    assert list(saved[1]) == ["weight/mixed/0", "weight/mixed/3/1"]
    fresh = torch.optim.SGD(model.parameters())
    put_back(fresh, model, saved)  # type: ignore[arg-type]
    assert [list(parts(v)) for v in fresh.state[model.weight].values()] == [list(parts(v)) for v in value.values()]


def test_what_has_no_form_is_refused() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {"text": "x"}
    with pytest.raises(TypeError, match="weight/text"):
        state_of(optimizer, model).structure()
    elsewhere = torch.optim.SGD(nn.Linear(2, 1).parameters())
    state = state_of(elsewhere, model)
    for look in (state.structure, lambda: state.compare({"class": "SGD", "groups": [], "state": {}})):
        with pytest.raises(ConfigError, match="not have"):
            look()


# --- where tensors go


@pytest.mark.parametrize("flag", [None, "fused", "capturable"])
def test_step_counters_stay_on_the_host_unless_a_kernel_reads_them(flag: str | None) -> None:
    model, optimizer = CASES["adam"].build(seed=0)
    train(model, optimizer, range(1))
    structure, tensors = save(optimizer, model)
    there = Net().to("meta")
    fresh = torch.optim.Adam(default_param_groups(there, config("adam")))
    for group in fresh.param_groups:
        group.update({} if flag is None else {flag: True})
    forms = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    new = state_of(fresh, there).allocate(structure, forms)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in new.items()} == forms
    # scale has no dims either, but its moments go with it
    assert new["scale/step"].device.type == ("cpu" if flag is None else "meta")
    assert new["scale/exp_avg"].device.type == new["conv.weight/exp_avg"].device.type == "meta"
    assert new["conv.weight/exp_avg"].is_contiguous(memory_format=torch.channels_last)


def test_asgd_keeps_its_numbers_with_the_parameter() -> None:
    model, optimizer = CASES["asgd"].build(seed=0)
    train(model, optimizer, range(1))
    structure, tensors = save(optimizer, model)
    there = Net().to("meta")
    fresh = torch.optim.ASGD(there.parameters())
    new = state_of(fresh, there).allocate(structure, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    assert {tensor.device.type for tensor in new.values()} == {"meta"}


def test_fused_sgd_goes_on_from_one_that_was_not() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, optimizer, range(5))
    assert model.late.weight not in optimizer.state
    again, fresh = Case(config("sgd", momentum=0.9)).build(seed=1)
    copy_weights(model, again)
    put_back(fresh, again, save(optimizer, model))
    train(model, optimizer, range(5, 9))
    train(again, fresh, range(5, 9))  # from step 7 on there is a parameter more
    for own, other in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, other)


def _sharded(name: str) -> tuple[nn.Module, Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    settings = config(name, momentum=0.9) if name == "sgd" else config(name)
    return model, build_optimizer(settings, default_param_groups(model, settings))


def _sharded_steps(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).pow(2).sum().backward()
        optimizer.step()


def sharded_round_trip(name: str) -> list[str]:
    """On each of two ranks: what differs from the optimizer that was never interrupted."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    model, optimizer = _sharded(name)
    _sharded_steps(model, optimizer, range(2))
    structure, tensors = state_of(optimizer, model).structure(), state_of(optimizer, model).tensors()
    again, fresh = _sharded(name)
    with torch.no_grad():
        for own, other in zip(again.parameters(), model.parameters(), strict=True):
            own.copy_(other)
    forms = {path: (t.dtype, tuple(t.shape)) for path, t in tensors.items()}
    new = state_of(fresh, again).allocate(structure, forms)
    wrong = [path for path, tensor in tensors.items() if _layout(tensor) != _layout(new[path])]
    for path, tensor in tensors.items():
        new[path].copy_(tensor)
    state_of(fresh, again).install(structure, new)
    _sharded_steps(model, optimizer, range(2, 4))
    _sharded_steps(again, fresh, range(2, 4))
    left, right = state_of(optimizer, model).tensors(), state_of(fresh, again).tensors()
    left |= {f"model {n}": p.detach() for n, p in model.named_parameters()}
    right |= {f"model {n}": p.detach() for n, p in again.named_parameters()}
    local = lambda tensor: tensor.to_local() if isinstance(tensor, DTensor) else tensor  # noqa: E731
    wrong += [path for path, tensor in left.items() if not torch.equal(local(tensor), local(right[path]))]
    dist.destroy_process_group()
    return wrong


def _layout(tensor: Tensor) -> object:
    return (type(tensor), getattr(tensor, "placements", None), getattr(tensor, "device_mesh", None), tensor.stride())


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["adamw", "sgd", "asgd"])
def test_sharded_state_is_laid_out_like_its_parameter(name: str) -> None:
    assert run_ranks(sharded_round_trip, 2, name) == [[], []]


# --- what does not fit


def saved_with(name: str) -> dict[str, object]:
    model, optimizer = CASES[name].build(seed=0)
    train(model, optimizer, range(1))
    return save(optimizer, model)[0]


@pytest.mark.parametrize(
    ("saved", "here", "line"),
    [
        ("sgd", "adamw", "optimizer: SGD in the checkpoint, AdamW here"),
        ("adam", "adam amsgrad", "amsgrad False in the checkpoint, True here: blocks.a/b.bias, blocks.a/b.weight"),
        ("sgd momentum", "sgd", "momentum True in the checkpoint, False here"),
        ("rmsprop", "rmsprop everything", "centered False in the checkpoint, True here"),
        ("lbfgs", "lbfgs short memory", "history_size 100 in the checkpoint, 2 here"),
    ],
)
def test_another_form_of_state_is_named(saved: str, here: str, line: str) -> None:
    model, optimizer = CASES[here].build(seed=0)
    lines = state_of(optimizer, model).compare(saved_with(saved))
    assert any(line in found for found in lines)
    assert len(lines) <= 2


def test_other_parameters_are_named() -> None:
    model, optimizer = CASES["adam"].build(seed=0)
    structure = save(optimizer, model)[0]
    frozen = Net()
    frozen.conv.requires_grad_(False)
    frozen.more = nn.Linear(2, 2)
    here = build_optimizer(config("adam"), default_param_groups(frozen, config("adam")))
    assert state_of(here, frozen).compare(structure) == [
        "optimizer: not updated in the checkpoint, but here: more.bias, more.weight",
        "optimizer: updated in the checkpoint, but not here: conv.bias, conv.weight",
    ]


def test_many_names_are_cut_short() -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(9)])
    optimizer = torch.optim.SGD(model.parameters())
    (line,) = state_of(optimizer, model).compare({"class": "SGD", "groups": [], "state": {}})
    assert line.endswith("0, 1, 2, 3, 4 and 4 more")


def test_a_muon_matrix_that_went_to_adamw_is_named() -> None:
    structure = saved_with("muon")
    model = Net()
    groups = default_param_groups(model, config("muon"))
    moved = groups[0]["param_names"].index("blocks.step.weight")
    for key in ("params", "param_names"):
        groups[1][key].append(groups[0][key].pop(moved))
    lines = state_of(build_optimizer(config("muon"), groups), model).compare(structure)
    assert lines == ["optimizer: kind muon in the checkpoint, adamw here: blocks.step.weight"]


def test_lbfgs_needs_its_parameters_in_order() -> None:
    structure = saved_with("lbfgs")
    model = Net()
    (group,) = default_param_groups(model, config("lbfgs"))
    turned = torch.optim.LBFGS(group["params"][::-1])
    (line,) = state_of(turned, model).compare(structure)
    assert "another order" in line


def test_learning_rates_and_the_order_of_groups_may_change() -> None:
    structure = saved_with("adam")
    model = Net()
    groups = default_param_groups(model, config("adam"))
    optimizer = build_optimizer(config("adam", lr=3.0, betas=(0.1, 0.2)), groups[::-1])
    assert state_of(optimizer, model).compare(structure) == []
    assert state_of(optimizer, model).compare({}) == ["optimizer: the checkpoint has no state of one"]


def test_structure_and_tensors_must_name_the_same() -> None:
    model, optimizer = CASES["adam"].build(seed=0)
    train(model, optimizer, range(1))
    structure, tensors = save(optimizer, model)
    forms = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    again, fresh = CASES["adam"].build(seed=1)
    one_less = {name: form for name, form in forms.items() if name != "scale/exp_avg"}
    for wrong in (one_less, forms | {"scale/other": forms["scale/step"]}):
        with pytest.raises(CheckpointError, match="scale/"):
            state_of(fresh, again).allocate(structure, wrong)
    with pytest.raises(CheckpointError, match="not updated here"):
        state_of(fresh, nn.Linear(1, 1)).allocate(structure, forms)
    with pytest.raises(KeyError):
        state_of(fresh, again).install(structure, {})
    with pytest.raises(ValueError, match=r"scale/x has a form"):
        state_of(fresh, again).install({"state": {"scale": {"x": {"pickle": "…"}}}}, {})
    assert len(fresh.state) == 0
