"""GPT-2 small on one GPU: tokens a second and MFU, through the engine and in a loop by hand.

Both arms train the preset 124m of recipes/gpt.py: bf16 autocast, torch.compile, AdamW (fused), clipping at 1.0, steps
of 524,288 tokens in microbatches of 16 windows, on random tokens from a memory-mapped file. They start from the same
weights and see the same batches; the first steps, which compile, are not measured, and their losses must agree. Then
the arms take turns. MFU is model FLOPs (6 a parameter and 12 x layers x channels x context a token) over the data
sheet's dense bf16 peak.

Target: the engine trains at least 0.98 x the tokens a second of the loop by hand.

    python benchmarks/gpu/gpt.py --check          # writes benchmarks/results/gpu_gpt.json

Without a GPU it ends with 2. `--smoke` goes the same way with a tiny model on the CPU, judges and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from harness import Median, add_flags, conclude, interleave, median_of  # noqa: E402

from distkit.assemble import assemble  # noqa: E402
from distkit.config import AdamW, CheckpointConfig, ObserveConfig, TrainConfig  # noqa: E402
from distkit.data import SampleStream  # noqa: E402
from distkit.engine.fit import opened, report, settle_utilization  # noqa: E402
from distkit.engine.flops import (  # noqa: E402
    Outline,
    device_name,
    find_peak,
)
from distkit.engine.run import Run  # noqa: E402
from distkit.engine.train_step import due, train_step  # noqa: E402
from distkit.load import module_of, read_recipe  # noqa: E402
from distkit.runtime import Topology  # noqa: E402
from distkit.runtime.process import start  # noqa: E402

if TYPE_CHECKING:
    from types import ModuleType

TARGET = 0.98
RESULT = ROOT / "benchmarks" / "results" / "gpu_gpt.json"
Arm = Callable[[int], float]


def configure(recipe: ModuleType, folder: Path, *, smoke: bool, peak_tflops: float | None) -> TrainConfig:
    """The preset on random tokens, without evaluations and checkpoints."""
    preset = recipe.PRESETS["tiny" if smoke else "124m"]
    vocab_size, windows = (65, 400) if smoke else (50_304, 4_000)
    tokens = np.random.default_rng(0).integers(vocab_size, size=windows * preset.context_length, dtype=np.uint16)
    (folder / "tokens.bin").write_bytes(tokens.tobytes())
    config: TrainConfig = replace(
        preset,
        tokens=folder / "tokens.bin",
        vocab_size=vocab_size,
        run_dir=folder / "run",
        num_epochs=None,
        num_steps=preset.num_steps,
        report_every=2 if smoke else 10,
        eval_every=None,
        peak_tflops=peak_tflops,
        observe=ObserveConfig(console=False),
        checkpoint=CheckpointConfig(enabled=False),
    )
    if smoke:  # what compiles in seconds, and two microbatches a step
        small = {"device": "cpu", "num_threads": 1, "microbatch_size": 4, "context_length": 32, "dim": 32}
        config = replace(config, compile=True, compile_backend="eager", max_grad_norm=1.0, **small)  # type: ignore[arg-type]
    return config


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def engine(run: Run) -> Arm:
    """The body of `fit`; seconds a step."""

    def steps(count: int) -> float:
        last = run.progress.step + count
        begin = perf_counter()
        while run.progress.step < last:
            train_step(run)
            if due(run.config.report_every, run.progress.step, run.num_steps):
                report(run)
        wait(run.runtime.device)
        return (perf_counter() - begin) / count

    return steps


class ByHand:
    """The loop that a careful person writes for one GPU."""

    def __init__(self, recipe: ModuleType, run: Run) -> None:
        self.config, self.split, self.device = run.config, run.split, run.runtime.device
        self.module: nn.Module = recipe.build_model(run.config)
        self.module.load_state_dict(run.strategy.module.state_dict())
        self.module.to(self.device).train()
        self.model: Callable[..., tuple[Tensor, Tensor]] = torch.compile(
            self.module, backend=run.config.compile_backend
        )
        matrices = [p for p in self.module.parameters() if p.ndim >= 2]
        others = [p for p in self.module.parameters() if p.ndim < 2]
        optim = run.config.optim
        assert isinstance(optim, AdamW)
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            *([{"params": others, "weight_decay": 0.0}] if others else []),
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True,
                                           weight_decay=optim.weight_decay)  # fmt: skip
        self.schedule = run.schedule
        self.data = recipe.build_dataset(run.config, "train")
        self.stream = SampleStream(run.config.seed, len(self.data), self.split.global_batch_size)
        self.step, self.losses = 0, torch.zeros((), device=self.device)

    def batch(self, step: int, accum_index: int) -> tuple[Tensor, Tensor]:
        size = self.split.microbatch_size
        rows = torch.from_numpy(self.stream.global_batch(step)[accum_index * size : (accum_index + 1) * size])
        tokens, targets = self.data.fetch(rows)
        if self.device.type == "cuda":
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        return tokens.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def steps(self, count: int) -> float:
        accum_steps = self.split.accum_steps
        begin = perf_counter()
        for step in range(self.step, self.step + count):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.optim.lr * self.schedule(step)
            self.optimizer.zero_grad()
            for accum_index in range(accum_steps):
                batch = self.batch(step, accum_index)
                with self.autocast():
                    loss, _ = self.model(*batch)
                (loss / accum_steps).backward()  # type: ignore[no-untyped-call]
                self.losses += loss.detach() / accum_steps
            if self.config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
            if (step + 1) % self.config.report_every == 0:
                self.losses.item()
        wait(self.device)
        self.step += count
        return (perf_counter() - begin) / count


def flops_per_token(recipe: ModuleType, config: TrainConfig) -> float:
    """Forward and backward, counted on a copy without memory."""
    outline = Outline(recipe.build_model(config).train())
    length: int = config.context_length  # type: ignore[attr-defined]  # the recipe's
    tokens = torch.zeros(1, length, dtype=torch.int64)
    return outline.count(partial(recipe.compute_loss, config), outline.batch((tokens, tokens))) / length


def loss_of(run: Run, arm: Arm, count: int) -> float:
    """Mean loss of the first `count` steps, of which the first ones compile; nothing is reported yet."""
    arm(count)
    means = run.meter.reduce()
    settle_utilization(run)  # once, and at the first report otherwise
    return means.loss


def measure(flags: argparse.Namespace, folder: Path) -> tuple[dict[str, Median | float | str], dict[str, bool]]:
    recipe = module_of(read_recipe(ROOT / "recipes" / "gpt.py"))
    config = configure(recipe, folder, smoke=flags.smoke, peak_tflops=flags.peak_tflops)
    warmup, count = (1, 2) if flags.smoke else (5, 5)
    run: Run = assemble(recipe.recipe, config, start(config, Topology()))
    hand = ByHand(recipe, run)
    with opened(run):
        mine, theirs = loss_of(run, engine(run), warmup), 0.0
        hand.steps(warmup)
        theirs = hand.losses.item() / warmup
        assert abs(mine - theirs) < 0.02, f"the arms compute something else: {mine} and {theirs}"
        print(f"both arms begin with a loss of {mine:.3f} (by hand {theirs:.3f}) over {warmup} steps")
        arms: dict[str, Callable[[], float]] = {
            "engine": lambda: engine(run)(count),
            "by hand": lambda: hand.steps(count),
        }
        values = interleave(arms, flags.rounds)
    run.directory.release()
    step_tokens = run.split.global_batch_size * config.context_length  # type: ignore[attr-defined]
    flops, peak = flops_per_token(recipe, config), find_peak(config, run.runtime)
    results: dict[str, Median | float | str] = {
        "device": device_name(run.runtime.device),
        "flops_per_token": flops,
        "parameters": float(run.strategy.num_parameters),
        "tokens_per_step": float(step_tokens),
    }
    for name, seconds in values.items():
        speed = median_of([step_tokens / second for second in seconds])
        results[f"{name} tokens/s"] = speed
        line = f"{name:8s} {speed} tokens/s"
        if peak is not None:
            results[f"{name} mfu"] = speed.median * flops / peak
            line += f"   mfu {results[f'{name} mfu']:.4f} of {peak / 1e12:g} TFLOP/s"
        print(line)
    if peak is None:
        print(f"the peak of {results['device']} is not known: with --peak-tflops there is an mfu")
    pairs = zip(values["by hand"], values["engine"], strict=True)
    ratio = statistics.median(theirs / mine for theirs, mine in pairs)
    results["engine / by hand"] = ratio
    return results, {f"the engine is {ratio:.3f} x the loop by hand (>= {TARGET})": ratio >= TARGET}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each arm (default 9)")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 TFLOP/s of a device that is not in the table")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if not flags.smoke and not torch.cuda.is_available():
        print("benchmarks/gpu/gpt.py needs a GPU that torch can use: torch.cuda.is_available() is False",
              file=sys.stderr)  # fmt: skip
        return 2
    with tempfile.TemporaryDirectory() as folder:
        results, targets = measure(flags, Path(folder))
    if flags.smoke:
        print("smoke: a tiny model on the CPU, which says nothing about speed")
        return 0
    flags.json = flags.json or RESULT
    conclude(flags, "gpu_gpt", results, targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
