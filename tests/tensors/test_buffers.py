"""Models whose state is more than parameters of one form: resumed to the bit, or refused before the first step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import BASE, CLASSES, FEATURES, TinyConfig, build_dataset, compute_loss
from torch import Tensor, nn

from distkit.assemble import assemble
from distkit.config import CheckpointConfig
from distkit.engine.fit import fit
from distkit.engine.run import Run
from distkit.errors import CheckpointError, ConfigError
from distkit.recipe import Recipe
from distkit.runtime import Topology
from distkit.runtime.process import start
from distkit.tensors.buffers import buffer_specs, extra_states

SAVING = replace(BASE, checkpoint=CheckpointConfig(save_every=7, keep_best=None), ema_decay=0.9)


class Net(nn.Module):
    """A linear layer; its subclasses have something odd."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Cache(Net):
    """A cache that is made at the first forward, and another that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("made", None, persistent=False)
        self.register_buffer("grown", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.made is None:
            self.made = torch.linspace(1, 2, CLASSES)
        if len(self.grown) < CLASSES:
            self.grown = torch.ones(CLASSES)
        return self.linear(x) * self.made * self.grown


class Counts(Net):
    """Python numbers and a tensor that lie outside of parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self.steps = {"train": 0}

    def get_extra_state(self) -> dict[str, int]:
        return dict(self.steps)

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = dict(state)

    def forward(self, x: Tensor) -> Tensor:
        self.steps["train"] += self.training
        return self.seen(self.linear(x)) * (1 + self.steps["train"] / 100)


class Seen(nn.Module):
    """Its extra state is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(1)

    def get_extra_state(self) -> Tensor:
        return self.scale

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = state

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale = self.scale * 0.99
        return x * self.scale


class Replaced(Net):
    """A buffer that is another tensor after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count = self.count + 1
        return self.linear(x) * (1 + self.count / 100)


class Views(Net):
    """Buffers that share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("all", torch.arange(10.0))
        self.register_buffer("some", self.all[2:5])


class Grows(Net):
    """A buffer of the state dict that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.bank = torch.zeros(len(self.bank) + 1)
        return self.linear(x)


def build(folder: Path, model: type[nn.Module], config: TinyConfig = SAVING) -> Run:
    recipe = Recipe("odd", TinyConfig, lambda _: model(), build_dataset, compute_loss, presets={"default": BASE})
    config = replace(config, run_dir=folder)
    return assemble(recipe, config, start(config, Topology()))


def train(folder: Path, model: type[nn.Module], die_at: int | None = None, config: TinyConfig = SAVING) -> Run:
    run = build(folder, model, config)
    loss = run.compute_loss

    def dying(module: nn.Module, batch: object) -> object:
        if run.progress.step == die_at:
            raise KeyboardInterrupt
        return loss(module, batch)

    run = replace(run, compute_loss=dying)
    try:
        fit(run)
    except KeyboardInterrupt:
        assert die_at is not None
    finally:
        run.directory.release()
    return run


def events(run: Path, kind: str) -> list[dict[str, object]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("model", [Cache, Counts, Replaced, Views])
def test_it_is_resumed_to_the_bit(model: type[nn.Module], tmp_path: Path) -> None:
    train(tmp_path / "straight", model)
    train(tmp_path / "killed", model, die_at=16)
    resumed = train(tmp_path / "killed", model)
    assert resumed.resume.checkpoint is not None
    assert resumed.resume.checkpoint.manifest.step == 14
    for name in ("weights.safetensors", "ema.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("straight", "killed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    losses = [[event["loss"] for event in events(tmp_path / run, "train")] for run in ("straight", "killed")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_a_cache_of_another_form_is_told(tmp_path: Path) -> None:
    train(tmp_path, Cache, die_at=16)
    train(tmp_path, Cache)
    notes = [str(event["message"]) for event in events(tmp_path, "note")]
    assert any("model/grown, model/made" in note and "persistent=False" in note for note in notes)


def test_extra_states_go_on(tmp_path: Path) -> None:
    train(tmp_path, Counts, die_at=16)
    resumed = train(tmp_path, Counts)
    states = extra_states(resumed.strategy.module)
    assert states[""] == {"train": 20}
    assert states["seen"].item() == pytest.approx(0.99**20)
    weights = load_file(tmp_path / "weights.safetensors")
    assert torch.equal(weights["seen._extra_state"], states["seen"])


def test_a_model_without_the_extra_states_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    train(tmp_path, Counts, die_at=16)
    with pytest.raises(ConfigError, match=r"extra states .* of other modules: , seen"):
        build(tmp_path, Net)


def test_the_average_follows_a_buffer_that_is_replaced(tmp_path: Path) -> None:
    run = train(tmp_path, Replaced)
    expected = torch.zeros(1)
    for step in range(20):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = expected.lerp(torch.tensor([step + 1.0]), 1 - decay)
    assert run.ema is not None
    torch.testing.assert_close(run.ema.shadow["count"], expected)
    assert run.strategy.module.count.item() == 20


def test_a_buffer_that_changes_its_form_ends_the_run_at_the_first_save(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"buffer bank is float32 \[8\] at step 7 and was float32 \[1\]"
    ) as caught:
        train(tmp_path, Grows, config=replace(SAVING, ema_decay=None))
    assert caught.value.on_all_ranks
    assert "persistent=False" in str(caught.value)
    train(tmp_path / "unsaved", Grows, config=replace(BASE, checkpoint=CheckpointConfig(enabled=False)))


def odd(kind: str) -> type[nn.Module]:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            values = {
                "complex128": lambda: torch.zeros(3, dtype=torch.complex128),
                "expanded": lambda: torch.zeros(1).expand(10),
                "sparse": lambda: torch.eye(3).to_sparse(),
                "a\nname": lambda: torch.zeros(3),
            }
            if kind in values:
                self.register_buffer(kind, values[kind]())

        def get_extra_state(self) -> object:
            if kind == "tensor":
                return torch.zeros(3, dtype=torch.complex128)
            return {1, 2} if kind == "set" else {1: "not text"} if kind == "dict" else None

    return Odd


@pytest.mark.parametrize("kind", ["complex128", "expanded", "sparse", "a\nname", "set", "dict", "tensor"])
def test_what_no_checkpoint_can_hold_is_refused_before_the_first_step(kind: str, tmp_path: Path) -> None:
    says = "get_extra_state of the model" if kind in ("set", "dict") else "which a checkpoint cannot|printed|expanded"
    with pytest.raises(ConfigError, match=says):
        build(tmp_path / "run", odd(kind), replace(SAVING, ema_decay=None))
    assert not (tmp_path / "run").exists()
    run = build(tmp_path / "run", odd(kind), replace(BASE, ema_decay=None))
    run.directory.release()


def test_forms_are_those_of_persistent_buffers() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), Cache())
    assert buffer_specs(model) == {
        "0.running_mean": ("float32", (3,)),
        "0.running_var": ("float32", (3,)),
        "0.num_batches_tracked": ("int64", ()),
    }
