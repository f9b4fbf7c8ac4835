"""Memory: what each strategy holds on a rank, and the engine's peak against the same model in a loop by hand.

A GPT of 5 M parameters, AdamW, fp32, two microbatches a step. Held are parameters, gradients and optimizer state of
one rank, taken from the live tensors: bytes of the storages that these lie in, each storage once (ZeRO's fp32 masters
are the weights themselves). They are looked at twice: between the two microbatches, and before the update. With p bytes
of parameters on n ranks arithmetic expects

    strategy     between microbatches      before the update
    single, ddp  p + p + 2 p               p + p + 2 p
    fsdp         p / n + p + 2 p / n       (p + p + 2 p) / n    whole gradients add up, and are exchanged once
    zero1        p + p + 2 p / n           p + (p + 2 p) / n    the same; then only a rank's own part is kept
    zero2        p + (p + 2 p) / n         p + (p + 2 p) / n    each backward exchanges
    zero3        (p + p + 2 p) / n         (p + p + 2 p) / n    each backward exchanges

What a backend keeps beside them to communicate is none of the three, and not counted: `all tensors` is every tensor
that Python can reach, with the data, activations that are still alive, and such buffers. (Those of DeepSpeed have up to
50 M elements, which for a model as small as this one is all of it.)

The peak is that of a whole run, from the building of the data and the model to the end, without evaluation and
checkpoints; microbatch, optimizer and order of the batches are the same in both arms. On the CPU it is exact: the
largest sum of all that torch's CPU allocator has given out and not got back, C++ temporaries included, as torch's
profiler records it; VmHWM of processes of their own, less the resident memory before the run, stands beside it. On
GPUs it is torch.cuda.max_memory_allocated. Of several rounds the lowest peak counts, in both arms: a thread of DDP
lets go of its first buckets sooner or later. The highest is in the result file.

Targets on 2 ranks, as shares of ddp before the update: fsdp and zero3 hold at most 0.55 then; zero1 0.75 and zero2
0.625 where each holds most, within 2 %. The engine's peak is at most 1.0 x the loop by hand, on one rank and with ddp
on 2. Ratios of peaks are rounded to four digits after the point: between two reports the engine keeps some 0-dim
tensors more.

    python benchmarks/memory.py --json benchmarks/results/memory.json --check
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from harness import Median, add_flags, conclude
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from distkit.assemble import assemble
from distkit.checkpoint.digest import state_digest
from distkit.config import AdamW, CheckpointConfig, Constant, ObserveConfig, Split, StrategyName, TrainConfig
from distkit.data import SampleStream
from distkit.engine.fit import fit
from distkit.engine.run import Run
from distkit.losses import LossOutput, chunked_cross_entropy
from distkit.models import GPT, GPTConfig
from distkit.recipe import Recipe
from distkit.runtime import read_topology
from distkit.runtime.local_ranks import free_port, rank_environment
from distkit.runtime.process import start
from distkit.runtime.seeding import derive_seed, seeded
from distkit.tensors.shards import local_part

SHAPE = GPTConfig(vocab_size=4_096, context_length=64, num_layers=5, num_heads=4, dim=256)
BATCH, STEPS, REPORT_EVERY, SEED = 8, 12, 5, 0
#: torch's profiler, about its start and stop.
QUIET = {"KINETO_LOG_LEVEL": "99"}
STRATEGIES: tuple[StrategyName, ...] = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
MOMENTS = ("between microbatches", "before the update")
#: Shares of ddp's bytes on 2 ranks at these moments, by the arithmetic above.
EXPECTED = {
    "single": (1.0, 1.0),
    "ddp": (1.0, 1.0),
    "fsdp": (0.625, 0.5),
    "zero1": (0.75, 0.625),
    "zero2": (0.625, 0.625),
    "zero3": (0.5, 0.5),
}


class Tokens:
    """Random tokens, [256, 65]: a window and the token after it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.windows = torch.randint(SHAPE.vocab_size, (256, SHAPE.context_length + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.windows)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        windows = self.windows[indices]
        return windows[:, :-1], windows[:, 1:]


def build_model(config: TrainConfig) -> GPT:
    return GPT(SHAPE, chunked_cross_entropy)


def build_dataset(config: TrainConfig, split: Split) -> Tokens | None:
    return Tokens() if split == "train" else None


def compute_loss(config: TrainConfig, model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
    return LossOutput(model(*batch)[0])


def config_for(
    run_dir: Path, strategy: StrategyName, world_size: int, microbatch_size: int | None = None
) -> TrainConfig:
    return TrainConfig(
        num_steps=STEPS,
        microbatch_size=microbatch_size,
        global_batch_size=BATCH * world_size,
        strategy=strategy,
        device="cuda" if torch.cuda.device_count() >= world_size else "cpu",
        num_threads=1,
        run_dir=run_dir,
        report_every=REPORT_EVERY,
        observe=ObserveConfig(console=False),
        checkpoint=CheckpointConfig(enabled=False),
        optim=AdamW(lr=1e-3, weight_decay=0.0),
        schedule=Constant(),
    )


def build_run(config: TrainConfig) -> Run:
    recipe = Recipe("memory", TrainConfig, build_model, build_dataset, compute_loss, presets={"default": config})
    return assemble(recipe, config, start(config, read_topology(os.environ)))


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages that they lie in, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held(run: Run) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state on this rank, now."""
    gc.collect()
    strategy = run.strategy
    parameters = [local_part(tensor) for tensor in strategy.model_tensors().values()]
    state = [
        local_part(value)
        for values in strategy.optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    # the flat fp32 weights that ZeRO updates: storages of the parameters, where they alias them
    updated = [local_part(p) for group in strategy.optimizer.param_groups for p in group["params"]]
    updated += [partition.flat for partition in strategy.zero.partitions] if hasattr(strategy, "zero") else []
    gradients = [*strategy.gradients(), *(p.grad for p in strategy.module.parameters()), *(p.grad for p in updated)]
    gradients += unfinished_gradients(run)
    local = [local_part(gradient) for gradient in gradients if gradient is not None]
    found = {
        "parameters": nbytes([*parameters, *updated]),
        "gradients": nbytes(local),
        "optimizer state": nbytes(state),
        "together": nbytes([*parameters, *updated, *local, *state]),
    }
    reached = [local_part(t) for t in gc.get_objects() if isinstance(t, Tensor) and type(t).__name__ != "FakeTensor"]
    return found | {"all tensors": nbytes([*reached, *parameters, *local, *state])}


def unfinished_gradients(run: Run) -> list[Tensor | None]:
    """Those that FSDP (whole) and ZeRO 2 (a rank's own part) add up from microbatch to microbatch."""
    module = run.strategy.module
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
    cut = [parameter for group in groups if group is not None for parameter in group.fsdp_params]
    found: list[Tensor | None] = [parameter.unsharded_accumulated_grad for parameter in cut]
    found += [parameter._unsharded_param.grad for parameter in cut if hasattr(parameter, "_unsharded_param")]
    zero = getattr(getattr(run.strategy, "engine", None), "optimizer", None)
    for gradients in getattr(zero, "all_grad_tensors", {}).values():
        found += gradients or []
    return found


def measure_held(folder: Path, strategy: StrategyName, world_size: int) -> dict[str, dict[str, int]]:
    """`held` at the two moments of the last step, when the optimizer has its state."""
    run = build_run(config_for(folder / "run", strategy, world_size, microbatch_size=BATCH // 2))
    found: dict[str, dict[str, int]] = {}
    backward, update = run.strategy.backward, run.strategy.update

    def after_backward(loss: Tensor) -> None:
        backward(loss)
        if run.progress.step == STEPS - 1 and not found:
            found[MOMENTS[0]] = held(run)

    def before_update(leave_out: Tensor | None = None) -> None:
        if run.progress.step == STEPS - 1:
            found[MOMENTS[1]] = held(run)
        update(leave_out)

    run.strategy.backward, run.strategy.update = after_backward, before_update  # type: ignore[method-assign]
    fit(run)
    run.runtime.close()
    return found


def engine(folder: Path, world_size: int) -> str:
    """A whole run; the digest of its weights."""
    run = build_run(config_for(folder / "run", "single" if world_size == 1 else "ddp", world_size))
    fit(run)
    digest = state_digest(run.model_tensors())
    run.runtime.close()
    return digest


def by_hand(folder: Path, world_size: int) -> str:
    """The loop that a careful person writes; the digest of its weights."""
    del folder
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cuda", rank) if torch.cuda.device_count() >= world_size else torch.device("cpu")
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    data = Tokens()
    data.windows = data.windows.to(device)
    with seeded(derive_seed(SEED, "init")):
        module = GPT(SHAPE, chunked_cross_entropy).to(device)
    model = DistributedDataParallel(module, gradient_as_bucket_view=True) if world_size > 1 else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    stream = SampleStream(SEED, len(data), BATCH * world_size)
    total = torch.zeros((), device=device)
    for step in range(STEPS):
        rows = torch.from_numpy(stream.global_batch(step))[rank * BATCH : (rank + 1) * BATCH]
        batch = data.fetch(rows)
        optimizer.zero_grad()
        loss, _ = model(*batch)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        if step % REPORT_EVERY == REPORT_EVERY - 1:
            total.item()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    digest = state_digest(tensors)
    if world_size > 1:
        dist.destroy_process_group()
    return digest


ARMS: dict[str, Callable[[Path, int], str]] = {"engine": engine, "by hand": by_hand}


def measure_peak(arm: Callable[[Path, int], str], folder: Path, world_size: int) -> dict[str, float | str]:
    """Peak bytes of torch's allocator over a whole run, from nothing."""
    if torch.cuda.device_count() >= world_size:
        digest = arm(folder, world_size)
        return {"peak": torch.cuda.max_memory_allocated(), "digest": digest}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        digest = arm(folder, world_size)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return {"peak": peak, "digest": digest}


def measure_resident(arm: Callable[[Path, int], str], folder: Path, world_size: int) -> dict[str, float | str]:
    """Peak of this process's resident memory over that before the run."""
    before = _status("VmRSS")
    digest = arm(folder, world_size)
    return {"resident": _status("VmHWM") - before, "digest": digest}


def _status(name: str) -> int:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def worker(what: str, name: str, folder: Path, world_size: int) -> None:
    """One rank: measure and leave the result in FOLDER."""
    warnings.filterwarnings("ignore")
    if what == "held":
        found: object = measure_held(folder, name, world_size)
    else:
        found = {"peak": measure_peak, "resident": measure_resident}[what](ARMS[name], folder, world_size)
    (folder / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    # a gloo group whose peers have gone may abort in its destructor
    sys.stdout.flush()
    os._exit(0)


def measure(what: str, name: str, world_size: int) -> list[str]:
    """Start the ranks in processes of their own; what each found, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        command, port = [sys.executable, __file__, "--worker", what, name, folder, str(world_size)], free_port()
        ranks = [
            subprocess.Popen(command, env={**os.environ, **QUIET, **rank_environment(rank, world_size, port)})
            for rank in range(world_size)
        ]
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * world_size, (what, name, codes)
        return [(Path(folder) / f"rank-{rank}.json").read_text() for rank in range(world_size)]


def compare_strategies(results: dict[str, Median | float | str], targets: dict[str, bool]) -> None:
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in GPT(SHAPE, chunked_cross_entropy).parameters())
    results["parameter_bytes"] = weights
    largest: dict[str, dict[str, dict[str, int]]] = {}
    for name in STRATEGIES:
        ranks = [json.loads(text) for text in measure("held", name, 1 if name == "single" else 2)]
        largest[name] = {m: {key: max(rank[m][key] for rank in ranks) for key in ranks[0][m]} for m in MOMENTS}
    ddp = largest["ddp"][MOMENTS[1]]["together"]
    shares = {name: [found[m]["together"] / ddp for m in MOMENTS] for name, found in largest.items()}
    print(f"bytes of one rank, {weights / 4:,.0f} parameters, AdamW, fp32")
    for place, moment in enumerate(MOMENTS):
        print(f"{moment:21s}{'parameters':>13s}{'gradients':>13s}{'state':>13s}{'together':>13s}{'x ddp':>8s}"
              f"{'expected':>10s}{'all tensors':>14s}")  # fmt: skip
        for name in STRATEGIES:
            found, share, expected = largest[name][moment], shares[name][place], EXPECTED[name][place]
            row = "".join(f"{found[key]:13,.0f}" for key in ("parameters", "gradients", "optimizer state", "together"))
            print(f"  {name:19s}{row}{share:8.3f}{expected:10.3f}{found['all tensors']:14,.0f}")
            at = f"{name}, {moment}"
            results |= {f"{at}: {key}": value for key, value in found.items()}
            results |= {f"{at}: share of ddp": round(share, 4), f"{at}: expected share": expected}
    for name in ("fsdp", "zero3"):
        share = shares[name][1]
        targets[f"{name} holds {share:.3f} x ddp before the update (<= 0.55)"] = share <= 0.55
    for name, place in (("zero1", 0), ("zero2", 0)):
        share, expected = shares[name][place], EXPECTED[name][place]
        near = abs(share / expected - 1) <= 0.02
        targets[f"{name} holds {share:.3f} x ddp {MOMENTS[place]} ({expected} by arithmetic, +- 2 %)"] = near


def compare_peaks(results: dict[str, Median | float | str], targets: dict[str, bool], rounds: int) -> None:
    for world_size in (1, 2):
        where = "on 1 rank" if world_size == 1 else "with ddp on 2 ranks"
        exact: dict[str, list[int]] = {name: [] for name in ARMS}
        resident: dict[str, list[int]] = {name: [] for name in ARMS}
        digests = set()
        for _ in range(rounds):
            for name in ARMS:
                for what, values in (("peak", exact), ("resident", resident)):
                    ranks = [json.loads(text) for text in measure(what, name, world_size)]
                    values[name].append(max(rank[what] for rank in ranks))
                    digests |= {rank["digest"] for rank in ranks}
        assert len(digests) == 1, f"the arms end with other weights {where}"
        # in either arm a thread of DDP may let go of its first buckets late, where a neighbour has the core
        peaks = {name: min(values) for name, values in exact.items()}
        ratio = peaks["engine"] / peaks["by hand"]
        medians = {name: statistics.median(values) for name, values in resident.items()}
        print(f"\npeak {where}; both arms end with the same weights, to the bit")
        for name in ARMS:
            results[f"{name}, {world_size} ranks: peak bytes"] = peaks[name]
            results[f"{name}, {world_size} ranks: highest peak bytes"] = max(exact[name])
            results[f"{name}, {world_size} ranks: resident bytes"] = medians[name]
            print(f"  {name:10s}{peaks[name]:14,.0f} bytes of tensors{medians[name] / 1e6:10.1f} MB resident")
        results[f"engine / by hand, {world_size} ranks: peak"] = round(ratio, 7)
        results[f"engine / by hand, {world_size} ranks: resident"] = round(medians["engine"] / medians["by hand"], 3)
        print(f"  {'ratio':10s}{ratio:14.7f}{'':16s}{medians['engine'] / medians['by hand']:10.3f}")
        targets[f"the engine's peak is {ratio:.4f} x the loop by hand (<= 1.0000) {where}"] = round(ratio, 4) <= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each peak (default 3)")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker is not None:
        what, name, folder, world_size = flags.worker
        worker(what, name, Path(folder), int(world_size))
        return
    results: dict[str, Median | float | str] = {}
    targets: dict[str, bool] = {}
    compare_strategies(results, targets)
    compare_peaks(results, targets, flags.rounds)
    conclude(flags, "memory", results, targets)


if __name__ == "__main__":
    main()
