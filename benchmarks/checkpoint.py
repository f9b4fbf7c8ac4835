"""Checkpoints: how fast 500 MB of state are saved and restored, and how long a step waits for it; 1 and 2 ranks.

Every arm leaves its bytes on the disk (fsync). The state is replicated, as under DDP: torch.save writes it on rank 0,
our ranks write a share each. The raw arms do what every checksummed checkpoint must at least do: write (or read) the
same bytes in blocks of 4 MiB and sha256 each block; the arm "disk" writes as many with neither copy nor hash, past the
page cache, which no save can beat. Files are in the page cache when they are read. Targets:

1. saving in the step's time: at least 1.5 x the bandwidth of torch.save, and 0.8 x the raw write with sha256
2. saving behind the steps: the step is held up for at most the copy into staging + 5 %
3. restoring (verify, then load): at most 1.3 x the raw read with sha256

    python benchmarks/checkpoint.py --json benchmarks/results/checkpoint.json --check
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from harness import Median, add_flags, conclude, median_of
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from distkit.checkpoint.format import step_name
from distkit.checkpoint.plan import piece_of
from distkit.checkpoint.read import load_tensors
from distkit.checkpoint.restore import open_verified
from distkit.checkpoint.saver import Saver, Snapshot
from distkit.checkpoint.staging import allocate
from distkit.config import CheckpointConfig, TrainConfig
from distkit.runtime import read_topology
from distkit.runtime.local_ranks import free_port, rank_environment
from distkit.runtime.process import Runtime, start

TENSORS, ROWS, COLUMNS = 40, 3_200, 1_000
MEGABYTES = TENSORS * ROWS * COLUMNS * 4 / 1e6
BLOCK = 2**22


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"model/layer{i:02d}": torch.randn(ROWS, COLUMNS, generator=generator) for i in range(TENSORS)}


class Arms:
    """One rank's arms; each returns seconds, and all ranks run each together."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.folder, self.runtime, self.state = folder, runtime, state()
        self.step = 0
        self.savers = {how: self._saver(how) for how in ("on", "off")}
        self.share = self._share()
        self.aligned = allocate(sum(map(len, self.share)) // BLOCK * BLOCK, runtime.device).fill_(1).numpy().data

    def snapshot(self, step: int) -> Snapshot:
        """The state, with the least that a run says of itself."""
        weights = [name.removeprefix("model/") for name in self.state]
        parts: dict[str, object] = {
            "progress": {"step": step},
            "trackers": {"last": None, "best": None},
            "clock": {"seconds": 1.0, "samples": step, "open_seconds": 0.0},
            "observers": {},
            "optimizer": {"class": "SGD", "groups": [{"param_names": weights}], "state": {}},
        }
        values = {"version": 1, "recipe": "benchmark", "step": step, "num_samples": 1, "parts": parts,
                  "config": {"seed": 0, "global_batch_size": 1}}  # fmt: skip
        return Snapshot(shared=self.state, own={}, values=values)

    def _saver(self, how: str) -> Saver:
        config = CheckpointConfig(asynchronous=how)  # type: ignore[arg-type]
        folder = self.folder / how
        if self.runtime.is_main_process:
            folder.mkdir()
        return Saver(folder, self.runtime, config, recipe="benchmark", strategy="ddp", clean=lambda step: None)

    def _share(self) -> list[memoryview]:
        """What this rank writes in the raw arm: a share of each tensor."""
        rank, world_size = self.runtime.rank, self.runtime.world_size
        rows = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
        return [tensor[rows].flatten().view(torch.uint8).numpy().data for tensor in self.state.values()]

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """All ranks begin together on a quiet disk, and what was written goes away."""
        self.step += 1
        self.runtime.gather(None)
        if self.runtime.is_main_process:
            os.sync()
        self.runtime.gather(None)
        yield
        self.runtime.gather(None)
        if self.runtime.is_main_process:
            for path in [*self.folder.glob("o*/step-*"), *self.folder.glob("other*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.runtime.gather(None)

    def save(self, how: str) -> tuple[float, float]:
        """Seconds until the checkpoint stands, and seconds that the step was held up."""
        with self.fresh():
            saver, begin = self.savers[how], perf_counter()
            outcomes = saver.save(self.step, self.snapshot(self.step))
            held = perf_counter() - begin
            outcomes += saver.finish()
            total = perf_counter() - begin
        assert [outcome.error for outcome in outcomes] == [None]
        return total, held

    def copy(self) -> float:
        """The copy into staging alone."""
        saver = self.savers["on"]
        value_of = partial(piece_of, self.state)
        with self.fresh():
            begin = perf_counter()
            for image, buffer in zip(saver._files.values(), saver._staging.buffers, strict=True):
                image.fill_(buffer, value_of)
            return perf_counter() - begin

    def torch_save(self) -> float:
        with self.fresh():
            begin = perf_counter()
            if self.runtime.is_main_process:
                with open(self.folder / "other.pt", "wb") as file:
                    torch.save(self.state, file)
                    file.flush()
                    os.fsync(file.fileno())
            self.runtime.gather(None)
            return perf_counter() - begin

    def raw_write(self) -> float:
        with self.fresh():
            begin = perf_counter()
            digest = hashlib.sha256()
            with open(self.folder / f"other-{self.runtime.rank}", "wb", buffering=0) as file:
                for view in self.share:
                    for at in range(0, len(view), BLOCK):
                        file.write(view[at : at + BLOCK])
                        digest.update(view[at : at + BLOCK])
                os.fsync(file.fileno())
            self.runtime.gather(digest.hexdigest())
            return perf_counter() - begin

    def disk(self) -> float:
        """What no save can be faster than: as many bytes past the page cache and an fsync, no copy and no hash."""
        with self.fresh():
            begin = perf_counter()
            flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0)
            descriptor = os.open(self.folder / f"other-{self.runtime.rank}", flags, 0o600)
            for at in range(0, len(self.aligned), BLOCK):
                os.write(descriptor, self.aligned[at : at + BLOCK])
            os.fsync(descriptor)
            os.close(descriptor)
            self.runtime.gather(None)
            return perf_counter() - begin

    def dcp_save(self) -> float:
        with self.fresh():
            begin = perf_counter()
            save(self.state, checkpoint_id=self.folder / "other-dcp", process_group=self.runtime.cpu_group)
            return perf_counter() - begin

    def dcp_async_save(self) -> tuple[float, float]:
        with self.fresh():
            begin = perf_counter()
            future = async_save(self.state, checkpoint_id=self.folder / "other-dcp",
                                    process_group=self.savers["on"]._side.cpu_group)  # fmt: skip
            held = perf_counter() - begin
            future.result()  # type: ignore[union-attr]  # a Future unless asked otherwise
            total = perf_counter() - begin
        return total, held

    def prepare_reading(self) -> Path:
        """A checkpoint that stays, in the page cache."""
        if self.runtime.is_main_process:
            (self.folder / "kept").mkdir()
        self.runtime.gather(None)
        saver = Saver(self.folder / "kept", self.runtime, CheckpointConfig(asynchronous="off"), recipe="benchmark",
                      strategy="ddp", clean=lambda step: None)  # fmt: skip
        saver.save(1, self.snapshot(1))
        return self.folder / "kept" / step_name(1)

    def restore(self, directory: Path, targets: dict[str, Tensor]) -> float:
        self.runtime.gather(None)
        begin = perf_counter()
        found = open_verified(directory, self.runtime)
        load_tensors(found.directory, found.manifest, targets)
        self.runtime.gather(None)
        return perf_counter() - begin

    def raw_read(self, directory: Path, buffer: bytearray) -> float:
        self.runtime.gather(None)
        begin = perf_counter()
        for path in sorted(directory.glob("shard-*")):
            digest = hashlib.sha256()
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(memoryview(buffer)[:count])
        self.runtime.gather(None)
        return perf_counter() - begin


def rounds(arms: Mapping[str, Callable[[], float | tuple[float, float]]], count: int) -> dict[str, list[list[float]]]:
    """Seconds of every arm, interleaved; the order changes from round to round alike on all ranks."""
    import random

    dice = random.Random(0)
    values: dict[str, list[list[float]]] = {name: [] for name in arms}
    for number in range(count + 1):
        for name in dice.sample(list(arms), len(arms)):
            measured = arms[name]()
            if number:  # the first round warms up: plans, buffers, caches
                values[name].append(list(measured) if isinstance(measured, tuple) else [measured])
    return values


def worker(folder: Path, count: int) -> None:
    """One rank: measure everything, rank 0 writes the slowest rank's seconds."""
    warnings.filterwarnings("ignore")  # of dcp, about options that have nothing to do with files
    config = TrainConfig(num_steps=1, device="cpu", num_threads=1)
    runtime = start(config, read_topology(os.environ))
    if not dist.is_initialized():  # dcp wants a group, also for one rank
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    arms = Arms(folder, runtime)
    values = rounds(
        {
            "save": lambda: arms.save("off"),
            "save_behind": lambda: arms.save("on"),
            "torch_save": arms.torch_save,
            "raw_write": arms.raw_write,
            "disk": arms.disk,
            "dcp_save": arms.dcp_save,
            "dcp_async_save": arms.dcp_async_save,
        },
        count,
    )
    values |= rounds({"copy": arms.copy, "held": lambda: arms.save("on")[1]}, 3 * count)
    directory = arms.prepare_reading()
    targets, buffer = {name: torch.empty_like(tensor) for name, tensor in arms.state.items()}, bytearray(BLOCK)
    values |= rounds({"restore": lambda: arms.restore(directory, targets),
                      "raw_read": lambda: arms.raw_read(directory, buffer)}, 2 * count)  # fmt: skip
    assert all(torch.equal(targets[name], tensor) for name, tensor in arms.state.items())
    every = runtime.gather(values)
    if runtime.is_main_process:
        slowest = {
            name: [[max(times) for times in zip(*(rank[name][i] for rank in every), strict=True)]
                   for i in range(len(values[name]))]
            for name in values
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(slowest))
    dist.destroy_process_group()


def measure(world_size: int, count: int, parent: Path) -> dict[str, list[list[float]]]:
    """Start the ranks and wait for them."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        command, port = [sys.executable, __file__, "--worker", folder, "--rounds", str(count)], free_port()
        ranks = [
            subprocess.Popen(command, env={**os.environ, **rank_environment(rank, world_size, port)})
            for rank in range(world_size)
        ]
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * world_size, codes
        values: dict[str, list[list[float]]] = json.loads((Path(folder) / "result.json").read_text())
        return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--rounds", type=int, default=11, help="measurements of each arm (default 11)")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (default: here)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker is not None:
        worker(flags.worker, flags.rounds)
        return
    results: dict[str, Median | float | str] = {"megabytes": round(MEGABYTES, 1)}
    targets: dict[str, bool] = {}
    for world_size in (1, 2):
        values = measure(world_size, flags.rounds, flags.folder)
        seconds = {name: statistics.median(first for first, *_ in measured) for name, measured in values.items()}
        print(f"\n{world_size} rank{'s' if world_size > 1 else ''}, {MEGABYTES:.0f} MB")
        for name, measured in values.items():
            totals = [first * 1e3 for first, *_ in measured]
            results[f"{name}_ms_{world_size}"] = median_of(totals)
            held = [rest[0] * 1e3 for _, *rest in measured if rest]
            if held and name != "save":
                results[f"{name}_held_ms_{world_size}"] = median_of(held)
            wait = f"   the step waits {statistics.median(held):7.1f} ms" if held and name != "save" else ""
            print(f"{name:16s} {median_of(totals)} ms  {MEGABYTES / statistics.median(totals):5.2f} GB/s{wait}")
        where = f"on {world_size} rank{'s' if world_size > 1 else ''}"
        ratio = seconds["torch_save"] / seconds["save"]
        targets[f"saving is {ratio:.2f} x torch.save (>= 1.5) {where}"] = ratio >= 1.5
        ratio = seconds["raw_write"] / seconds["save"]
        targets[f"saving is {ratio:.2f} x a raw write with sha256 (>= 0.8) {where}"] = ratio >= 0.8
        # neighbours in time are compared: the speed of memory drifts by more than what is asked for
        pairs = zip(values["held"], values["copy"], strict=True)
        ratio = statistics.median(held[0] / copy[0] for held, copy in pairs)
        targets[f"a step is held up for {ratio:.3f} x the copy (<= 1.05) {where}"] = ratio <= 1.05
        ratio = seconds["restore"] / seconds["raw_read"]
        targets[f"restoring takes {ratio:.2f} x a raw read with sha256 (<= 1.3) {where}"] = ratio <= 1.3
    conclude(flags, "checkpoint", results, targets)


if __name__ == "__main__":
    main()
