"""Microseconds a step: what a training loop costs beside forward, backward and update.

Arms: a loop by hand, the engine (with a report every 50 steps), raw Accelerate, Lightning Fabric (where installed).
All train Linear(16, 4) with batch 8, momentum SGD and a cosine schedule with warmup, on the same batches from the same
weights; the batches are gathered from a tensor in memory, by each arm in its own way. First the arms are checked to
end with equal weights. One thread.

Target: the engine adds at most 15 µs to the loop by hand.

    python benchmarks/step_overhead.py --json benchmarks/results/step_overhead.json --check
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from harness import Median, conclude, interleave, median_of, parse_flags
from torch import Tensor, nn

from distkit.assemble import assemble
from distkit.config import SGD, CheckpointConfig, Cosine, ObserveConfig, Split, TrainConfig
from distkit.data import SampleStream
from distkit.engine.fit import opened, report
from distkit.engine.run import Run
from distkit.engine.save import save, save_due
from distkit.engine.train_step import due, train_step
from distkit.losses import LossOutput
from distkit.recipe import Recipe
from distkit.runtime import Topology, faults
from distkit.runtime.process import start

STEPS, SAMPLES, BATCH, SEED = 1_000, 4_096, 8, 0
TARGET_MICROSECONDS = 15.0
Arm = Callable[[int], float]


@dataclass(frozen=True)
class Vectors:
    """Random vectors with the label of the largest of four projections."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs.index_select(0, indices), self.labels.index_select(0, indices)


def build_vectors() -> Vectors:
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(SAMPLES, 16, generator=generator)
    return Vectors(inputs, (inputs @ torch.randn(16, 4, generator=generator)).argmax(1))


def compute_loss(config: TrainConfig, model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
    return LossOutput(F.cross_entropy(model(batch[0]), batch[1]))


def build_dataset(config: TrainConfig, split: Split) -> Vectors | None:
    return build_vectors() if split == "train" else None


def config_for(run_dir: Path) -> TrainConfig:
    return TrainConfig(
        num_steps=1_000_000,
        global_batch_size=BATCH,
        num_threads=1,
        device="cpu",
        run_dir=run_dir,
        observe=ObserveConfig(console=False),
        checkpoint=CheckpointConfig(enabled=False),  # no other arm saves anything
        optim=SGD(lr=0.1, momentum=0.9),
        schedule=Cosine(warmup_steps=100),
    )


def build_run(run_dir: Path, topology: Topology | None = None) -> Run:
    recipe = Recipe("overhead", TrainConfig, lambda _: nn.Linear(16, 4), build_dataset, compute_loss,
                    presets={"default": config_for(run_dir)})  # fmt: skip
    config = config_for(run_dir)
    return assemble(recipe, config, start(config, topology or Topology()))


@dataclass
class Ingredients:
    """What the arms other than the engine start from: the same weights, batches and schedule."""

    model: nn.Module
    data: Vectors
    indices: Tensor
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rows = self.indices[step % len(self.indices)]
        return self.data.inputs[rows], self.data.labels[rows]


def ingredients(run: Run) -> Ingredients:
    model = nn.Linear(16, 4)
    model.load_state_dict(run.strategy.module.state_dict())
    stream = SampleStream(SEED, SAMPLES, BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    multiplier = run.config.schedule.build(num_steps=run.num_steps, steps_per_epoch=run.steps_per_epoch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
    indices = torch.from_numpy(stream.indices(0, 20 * STEPS * BATCH)).view(-1, BATCH)
    return Ingredients(model, build_vectors(), indices, optimizer, scheduler)


def by_hand(parts: Ingredients) -> Arm:
    """The loop that a careful person writes."""
    model, optimizer, scheduler = parts.model, parts.optimizer, parts.scheduler
    done = 0

    def steps(count: int) -> float:
        nonlocal done
        total = torch.zeros(())
        begin = perf_counter()
        for step in range(done, done + count):
            inputs, labels = parts.batch(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            total += loss.detach()
            if step % 50 == 49:
                total.item()
        done += count
        return (perf_counter() - begin) / count * 1e6

    return steps


def engine(run: Run) -> Arm:
    """The body of `fit`."""

    def steps(count: int) -> float:
        last = run.progress.step + count
        begin = perf_counter()
        while run.progress.step < last:
            run.runtime.heartbeat.next_unit()
            train_step(run)
            if faults.armed:
                raise AssertionError("a fault is set")
            if due(run.config.report_every, run.progress.step, run.num_steps):
                report(run)
            if due(run.eval_every, run.progress.step, run.num_steps):
                raise AssertionError("nothing to evaluate")
            if save_due(run):
                save(run)
        return (perf_counter() - begin) / count * 1e6

    return steps


def raw_accelerate(parts: Ingredients) -> Arm:
    """Everything prepared, inside `accumulate`, as Accelerate's examples do."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, scheduler = accelerator.prepare(parts.model, parts.optimizer, parts.scheduler)
    done = 0

    def steps(count: int) -> float:
        nonlocal done
        total = torch.zeros(())
        begin = perf_counter()
        for step in range(done, done + count):
            inputs, labels = parts.batch(step)
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total += loss.detach()
            if step % 50 == 49:
                total.item()
        done += count
        return (perf_counter() - begin) / count * 1e6

    return steps


def fabric(parts: Ingredients) -> Arm:
    """Lightning Fabric's loop."""
    from lightning_fabric import Fabric

    lightning = Fabric(accelerator="cpu", devices=1)
    model, optimizer = lightning.setup(parts.model, parts.optimizer)
    done = 0

    def steps(count: int) -> float:
        nonlocal done
        total = torch.zeros(())
        begin = perf_counter()
        for step in range(done, done + count):
            inputs, labels = parts.batch(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            lightning.backward(loss)
            optimizer.step()
            parts.scheduler.step()
            total += loss.detach()
            if step % 50 == 49:
                total.item()
        done += count
        return (perf_counter() - begin) / count * 1e6

    return steps


def check_equal(run: Run, parts: dict[str, Ingredients]) -> None:
    for name, part in parts.items():
        for mine, other in zip(run.strategy.module.parameters(), part.model.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=f"{name} computes something else")
    print(f"all arms end with equal weights after {STEPS} steps")


def main() -> None:
    flags = parse_flags(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(Path(folder) / "run")
        makers = {"by hand": by_hand, "accelerate": raw_accelerate}
        if importlib.util.find_spec("lightning_fabric") is not None:
            makers["fabric"] = fabric
        parts = {name: ingredients(run) for name in makers}
        arms: dict[str, Arm] = {name: make(parts[name]) for name, make in makers.items()}
        arms["engine"] = engine(run)
        with opened(run):
            for arm in arms.values():
                arm(STEPS)
            check_equal(run, parts)
            values = interleave({name: partial(arm, STEPS) for name, arm in arms.items()}, flags.rounds)
    results: dict[str, Median | float] = {name: median_of(value) for name, value in values.items()}
    for name, value in results.items():
        print(f"{name:12s} {value} µs/step")
    added = median_of([mine - hand for mine, hand in zip(values["engine"], values["by hand"], strict=True)])
    results["engine - by hand"] = added
    print(f"{'added':12s} {added} µs/step by the engine")
    conclude(flags, "step_overhead", results, {"the engine adds at most 15 µs": added.median <= TARGET_MICROSECONDS})


if __name__ == "__main__":
    main()
