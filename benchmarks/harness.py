"""What every benchmark shares: flags, interleaved rounds, medians with an interval, result files."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Median:
    """Median of repeated measurements with a 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:9.1f}  [{self.low:.1f}, {self.high:.1f}]"


def median_of(values: Sequence[float], resamples: int = 2_000) -> Median:
    """Median and the 2.5 % and 97.5 % quantiles of the medians of resamples (percentile bootstrap, fixed seed)."""
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
    return Median(statistics.median(values), low, high, len(values))


def interleave(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every arm once a round, in another order each round, so that drift hits all alike."""
    dice = random.Random(0)
    values: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name in dice.sample(list(arms), len(arms)):
            values[name].append(arms[name]())
    return values


def parse_flags(doc: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """--json FILE, --check, --rounds N."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each arm (default 15)")
    return parser.parse_args(argv)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--json FILE and --check."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")


def launch(recipe: str, argv: Sequence[str], run_dir: Path) -> dict[str, Any]:
    """summary.json of `accelerate launch recipes/RECIPE.py ARGV`, as a user starts it.

    Raises:
        CalledProcessError: the run failed.
    """
    root = Path(__file__).resolve().parent.parent
    accelerate = shutil.which("accelerate", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert accelerate is not None, "accelerate is not installed"
    command = [accelerate, "launch", str(root / "recipes" / f"{recipe}.py"), *argv, "--run-dir", str(run_dir)]
    subprocess.run(command, check=True, cwd=run_dir.parent)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def conclude(
    flags: argparse.Namespace, name: str, results: Mapping[str, Median | float | str], targets: Mapping[str, bool]
) -> None:
    """Write the result file and judge the targets; leaves the process with 1 when --check is given and one fails."""
    for target, reached in targets.items():
        print(f"{'reached' if reached else 'MISSED '}  {target}")
    if flags.json is not None:
        record = {
            "benchmark": name,
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "versions": {package: metadata.version(package) for package in ("torch", "accelerate", "numpy")},
            "results": {key: asdict(value) if isinstance(value, Median) else value for key, value in results.items()},
            "targets": dict(targets),
        }
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps(record, indent=2) + "\n")
    if flags.check and not all(targets.values()):
        sys.exit(1)


def machine() -> str:
    """Processor or GPU, and the number of cores, in words."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, no GPU"
