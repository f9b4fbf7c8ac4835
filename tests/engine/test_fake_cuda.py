"""A step on a GPU that is not there: no CPU tensor meets a device one, nothing waits, nothing is copied pageably (C5).

FakeTensorMode computes shapes and devices alone, and raises where a value is asked for or devices are mixed. Autograd's
engine needs a driver, so the backward is left out: gradients are put where it would put them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from support.harness import ROOT
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distkit.assemble import optimizer_builder
from distkit.config import AdamW, BatchSplit, Muon, TrainConfig, split_batch
from distkit.data import ImageDataset, SampleStream
from distkit.data.reading.fetchers import BatchMaker, InlineFetcher
from distkit.data.reading.loader import EvaluationLoader, Loader
from distkit.ema import Ema
from distkit.engine.evaluate import count_batches
from distkit.engine.guard import Guard
from distkit.engine.meter import Meter
from distkit.engine.run import Data, Run
from distkit.engine.train_step import train_step
from distkit.models.gpt import attend
from distkit.recipe import Recipe
from distkit.runtime import Topology
from distkit.runtime.process import Runtime
from distkit.strategies import build_strategy

sys.path.insert(0, str(ROOT / "recipes"))

import cifar10
import gpt

CUDA = torch.device("cuda", 0)
SAMPLES, STEPS = 64, 3
#: Its norm is measured, and the meter folds.
COMMON = {"num_epochs": None, "num_steps": STEPS, "global_batch_size": 8, "microbatch_size": 4, "report_every": 2,
          "max_grad_norm": 1.0, "ema_decay": 0.9, "compile": False, "eval_batch_size": None}  # fmt: skip


class Copies(TorchDispatchMode):
    """What is copied to the device from host memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        self.pageable: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        source = args[-1 if func is torch.ops.aten.copy_.default else 0] if copies else None
        to_device = copies and source.device.type == "cpu" and out.device.type == "cuda"
        if to_device and not any(source is pinned for pinned in self.pinned):
            self.pageable.append(f"{func} of {list(source.shape)}")
        return out


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    copies = Copies()

    def pin(tensor: Tensor) -> Tensor:
        copies.pinned.append(mode.from_tensor(tensor))
        return copies.pinned[-1]

    def fused_sgd(params: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], **settings: Any) -> None:
        assert {t.device for t in [*params, *gradients, *momenta]} == {CUDA}
        assert all(isinstance(value, float | bool | Tensor | None) for value in settings.values())

    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing; FakeTensorMode sets it where it sees no GPU
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # in place of the parameter: a fake one cannot be changed
    monkeypatch.setattr(nn.Module, "to", lambda module, *device, **layout: moved(module, **layout))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch, "_fused_sgd_", fused_sgd)  # it has no fake kernel
    with FakeTensorMode() as mode, copies:
        yield copies


class Windows:
    """What a token file gives."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return SAMPLES

    def to(self, device: torch.device) -> Windows:
        return self

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(len(indices), self.length, dtype=torch.int64, device=CUDA)
        return tokens, tokens


def images(config: cifar10.Config) -> ImageDataset:
    augmentation = cifar10.Augmentation(crop_padding=config.crop_padding, flip=config.flip, cutout=config.cutout)
    pixels = torch.zeros(SAMPLES, 3, 32, 32, dtype=torch.uint8, device=CUDA)
    labels = torch.zeros(SAMPLES, dtype=torch.int64, device=CUDA)
    names = tuple(map(str, range(10)))
    return ImageDataset(pixels, labels, class_names=names, source="nowhere", augmentation=augmentation)


def windows(config: gpt.Config) -> Windows:
    return Windows(config.context_length)


def stand_in_for_backward(run: Run, loss: Tensor) -> None:
    """The gradients' devices and layouts, without the engine of autograd."""
    scaled = run.strategy.scaler.scale(loss)
    assert scaled.device == CUDA
    assert scaled.requires_grad
    for parameter in run.strategy._parameters:
        parameter.grad = torch.empty_like(parameter)


def moved(model: nn.Module, memory_format: torch.memory_format = torch.preserve_format) -> nn.Module:
    """nn.Module.to, with fake tensors, which cannot be moved in place."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                kept = torch.preserve_format if tensor.ndim != 4 else memory_format
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
                fake = torch.empty_like(fake, memory_format=kept)
                parameter = isinstance(tensor, nn.Parameter)
                held[name] = nn.Parameter(fake, tensor.requires_grad) if parameter else fake
    return model


def fake_run(recipe: Recipe[Any], config: TrainConfig, model: nn.Module, dataset: Any) -> Run:
    """What `assemble` would make, of fake parts."""
    runtime = Runtime(topology=Topology(), device=CUDA)
    split: BatchSplit = split_batch(config, 1)
    strategy = build_strategy(config, runtime)
    strategy.prepare(model.train(), optimizer_builder(recipe, config, []))
    fetcher = InlineFetcher(BatchMaker(dataset, config.seed, CUDA, config.channels_last))
    run = Run(
        recipe=recipe.name,
        config=config,
        runtime=runtime,
        split=split,
        num_steps=STEPS,
        data=Data(train_set=dataset, test_set=None, fingerprint=None),
        strategy=strategy,
        loader=Loader(fetcher, SampleStream(config.seed, SAMPLES, split.global_batch_size), split, 0),
        test_loader=EvaluationLoader(fetcher, SAMPLES),
        compute_loss=partial(recipe.compute_loss, config),
        schedule=config.schedule.build(num_steps=STEPS, steps_per_epoch=8.0),
        directory=cast(Any, None),
        meter=Meter(runtime, copies=strategy.reuses_outputs, drops_bad=config.on_nan != "raise"),
        guard=Guard(strategy, runtime) if config.on_nan != "raise" else None,
        ema=Ema(strategy.module, 0.9, strategy.model_tensors()),
    )
    strategy.backward = partial(stand_in_for_backward, run)  # type: ignore[method-assign]
    return run


CIFAR = {"model": "resnet8", "channels_last": True, "cutout": 8}
GPT = {"vocab_size": 65, "tokens": ROOT, "text": ROOT, "context_length": 16, "dim": 32, "num_layers": 2}
RUNS: dict[str, tuple[Recipe[Any], Callable[[Any], Any], dict[str, Any]]] = {
    "cifar10 bf16 sgd": (cifar10.recipe, images, {"precision": "bf16", **CIFAR}),
    "cifar10 fp16 adamw": (cifar10.recipe, images, {"precision": "fp16", "optim": AdamW(), **CIFAR}),
    "cifar10 skip": (cifar10.recipe, images, {"precision": "bf16", "on_nan": "skip", "optim": AdamW(), **CIFAR}),
    "gpt fp16 skip": (gpt.recipe, windows, {"precision": "fp16", "on_nan": "skip", **GPT}),
    "fastnet": (cifar10.recipe, images, {"precision": "bf16", "label_smoothing": 0.2, **CIFAR, "model": "fastnet"}),
    "gpt bf16": (gpt.recipe, windows, {"precision": "bf16", **GPT}),
    "gpt fp16": (gpt.recipe, windows, {"precision": "fp16", **GPT, "max_grad_norm": None, "max_grad_value": 0.5}),
    "gpt muon": (gpt.recipe, windows, {"precision": "fp32", **GPT, "optim": Muon(lr=0.02)}),
    "gpt with dropout": (gpt.recipe, windows, {"precision": "bf16", **GPT, "dropout": 0.1}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_needs_nothing_from_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, data_of, changes = RUNS[name]
    config = replace(next(iter(recipe.presets.values())), **{**COMMON, **changes})
    model = recipe.build_model(config)
    with fake_gpu(monkeypatch) as copies:
        run = fake_run(recipe, config, model, data_of(config))
        before = len(copies.pageable)
        for _ in range(STEPS):
            train_step(run)
        run.meter._fold()
        # constants may come to the device once
        assert len(copies.pageable) - before <= 2, copies.pageable[before:]
        late = len(copies.pageable)
        train_step(run)
        assert not copies.pageable[late:]
        assert {t.device for t in run.meter.state_tensors().values() if t.ndim == 0} <= {CUDA, torch.device("cpu")}
        assert run.meter.grad_norm is not None
        assert run.meter.grad_norm.device == CUDA


def test_deterministic_attention_on_a_gpu_leaves_the_mode_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: set[int] = set()

    class Modes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            modes.add(torch.get_deterministic_debug_mode())
            return func(*args, **(kwargs or {}))

    before = torch.get_deterministic_debug_mode()
    try:
        with fake_gpu(monkeypatch):
            q = torch.empty(2, 2, 16, 64, device=CUDA, dtype=torch.bfloat16)
            # 2 refuses kernels that add up in any order
            for told, inside in ((0, 0), (1, 2)):
                torch.set_deterministic_debug_mode(told)
                modes.clear()
                with Modes():
                    attend(q, q, q, 0.0)
                assert modes == {inside}
                assert torch.get_deterministic_debug_mode() == told
    finally:
        torch.set_deterministic_debug_mode(before)


@pytest.mark.parametrize("name", ["cifar10 bf16 sgd", "gpt bf16"])
def test_an_evaluation_needs_nothing_from_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, data_of, changes = RUNS[name]
    config = replace(next(iter(recipe.presets.values())), **{**COMMON, **changes})
    model = recipe.build_model(config)
    with fake_gpu(monkeypatch) as copies, torch.no_grad():
        run = fake_run(recipe, config, model, data_of(config))
        run.strategy.module.eval()
        assert run.test_loader is not None
        assert run.ema is not None
        meter = Meter(run.runtime)
        with run.strategy.evaluating(), run.ema.applied():
            count_batches(run, run.test_loader, meter)
        meter._fold()
        assert meter._samples == SAMPLES
        assert len(copies.pageable) <= 2, copies.pageable


def test_what_these_tests_would_see(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch) as copies:
        x = torch.ones(3, device=CUDA)
        with pytest.raises(DataDependentOutputException):
            bool(x.sum() > 0)
        with pytest.raises(Exception, match="device"):
            x + torch.ones(3)
        torch.ones(3).to(CUDA, non_blocking=True)
        assert len(copies.pageable) == 1
        torch.ones(3).pin_memory().to(CUDA, non_blocking=True)
        assert len(copies.pageable) == 1
