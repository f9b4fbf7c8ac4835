"""Milliseconds that the batch before the first step costs, beyond reading it; recipes cifar10 (quick) and gpt (tiny).

Every measurement is a process of its own, as kernels are made ready in the first forward, whoever does it first. Arms:
the batch before the first step and the first step, without the time that reading the batch takes; and the first step
alone.

Target: less than 50 ms.

    python benchmarks/probe.py --json benchmarks/results/probe.json --check
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from harness import Median, conclude, interleave, median_of, parse_flags

ROOT = Path(__file__).resolve().parent.parent
TARGET_MILLISECONDS = 50.0
FLAGS = {"cifar10": ["--preset", "quick", "--data.source", "synthetic"], "gpt": ["--preset", "tiny"]}
T = TypeVar("T")


def measure(arm: str, name: str, flags: list[str]) -> float:
    """Milliseconds in this process."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from distkit import assemble as assembling
    from distkit.cli.parse import parse
    from distkit.engine.fit import opened
    from distkit.engine.probe import probe as real
    from distkit.engine.run import Run
    from distkit.engine.train_step import train_step
    from distkit.runtime import Topology
    from distkit.runtime.process import start

    recipe = __import__(name).recipe
    seconds = {"probe": 0.0, "reading": 0.0}

    def timed(what: str, function: Callable[..., T], *arguments: object) -> T:
        begin = perf_counter()
        result = function(*arguments)
        seconds[what] += perf_counter() - begin
        return result

    def probe(run: Run) -> None:
        if arm == "with":
            assert run.test_loader is not None
            for loader in (run.loader, run.test_loader):
                loader.first = partial(timed, "reading", loader.first)  # type: ignore[method-assign]
            timed("probe", real, run)

    vars(assembling)["probe"] = probe
    config = parse(recipe.config, recipe.presets, flags, name, "")
    run = assembling.assemble(recipe, config, start(config, Topology()))
    with opened(run):
        timed("probe", train_step, run)
        loss = run.meter.reduce().loss
    assert loss > 0
    return (seconds["probe"] - seconds["reading"]) * 1e3


def in_a_process(arm: str, name: str, folder: Path) -> float:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        flags = [*FLAGS[name], "--run-dir", f"{run_dir}/run", "--observe.no-console"]
        flags += ["--text", str(folder / "text.txt"), "--data.root", str(folder)] if name == "gpt" else []
        done = subprocess.run([sys.executable, __file__, "--worker", arm, name, *flags], cwd=folder, text=True,
                              stdout=subprocess.PIPE, check=True)  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    flags = parse_flags(__doc__)
    results: dict[str, Median | float] = {}
    targets: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dice = random.Random(0)
        (folder / "text.txt").write_text("".join(dice.choices("abcdefghijklmnopqrstuvwxyz \n", k=200_000)))
        for recipe in FLAGS:
            values = interleave({arm: partial(in_a_process, arm, recipe, folder) for arm in ("with", "without")},
                                flags.rounds)  # fmt: skip
            for arm, times in values.items():
                results[f"{recipe}, first step {arm}"] = median_of(times)
            added = median_of([a - b for a, b in zip(values["with"], values["without"], strict=True)])
            results[f"{recipe}, added"] = added
            print(f"{recipe:8s} adds {added} ms to a first step of {median_of(values['without'])} ms")
            targets[f"less than {TARGET_MILLISECONDS:g} ms before the first step of {recipe}"] = (
                added.median < TARGET_MILLISECONDS
            )
    conclude(flags, "probe", results, targets)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4:])))
    else:
        main()
