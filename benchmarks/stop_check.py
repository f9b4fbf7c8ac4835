"""Microseconds a step that asking "shall the run stop?" costs, on two ranks over gloo.

The engine's step under DDP (Linear(16, 4), batch 8) is timed with and without the count and the look at a flag that
come before each step in `fit`. Every other step has them, so that noise hits both alike; a round is the difference of
the medians over 500 steps of each kind. The heartbeat's thread runs all the time.

Target: at most 10 µs a step.

    python benchmarks/stop_check.py --json benchmarks/results/stop_check.json --check
"""

from __future__ import annotations

import os
import statistics
import tempfile
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from time import perf_counter

import torch.multiprocessing as mp
from harness import conclude, median_of, parse_flags
from step_overhead import build_run

from distkit.engine.run import Run
from distkit.engine.train_step import train_step
from distkit.runtime import read_topology
from distkit.runtime.local_ranks import free_port, rank_environment

STEPS, WARMUP = 500, 500
TARGET_MICROSECONDS = 10.0
Rounds = list[tuple[float, float]]


def one_round(run: Run) -> tuple[float, float]:
    """Microseconds of a step with and without the check: medians."""
    heartbeat = run.runtime.heartbeat
    times: tuple[list[float], list[float]] = [], []
    for count in range(2 * STEPS):
        begin = perf_counter()
        if count % 2 == 0:
            heartbeat.next_unit()
        train_step(run)
        times[count % 2].append(perf_counter() - begin)
    return statistics.median(times[0]) * 1e6, statistics.median(times[1]) * 1e6


def call_alone(run: Run) -> float:
    """Nanoseconds of the check itself."""
    begin = perf_counter()
    for _ in range(100_000):
        run.runtime.heartbeat.next_unit()
    return (perf_counter() - begin) / 100_000 * 1e9


def rank(number: int, port: int, folder: str, rounds: int, answers: SimpleQueue[tuple[Rounds, float]]) -> None:
    """One of the two ranks."""
    os.environ.update(rank_environment(number, 2, port))
    run = build_run(Path(folder) / "run", read_topology(os.environ))
    for _ in range(WARMUP):
        train_step(run)
    values = [one_round(run) for _ in range(rounds)]
    if number == 0:
        answers.put((values, call_alone(run)))
    run.loader.close()
    run.runtime.close()


def main() -> None:
    flags = parse_flags(__doc__)
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (free_port(), folder, flags.rounds, answers), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    values, alone = answers.get()
    results = {
        "with": median_of([with_check for with_check, _ in values]),
        "without": median_of([without for _, without in values]),
        "added": median_of([with_check - without for with_check, without in values]),
    }
    added = results["added"]
    for name, measured in results.items():
        print(f"{name:8} {measured} µs a step")
    print(f"the call itself takes {alone:.0f} ns")
    conclude(flags, "stop_check", {**results, "call in ns": alone},
             {f"at most {TARGET_MICROSECONDS} µs a step": added.median <= TARGET_MICROSECONDS})  # fmt: skip


if __name__ == "__main__":
    main()
