"""An optimizer, a schedule, an observer and a strategy each take one file and one row of a table, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import LAUNCHER_VARIABLES, ROOT

RECIPE = ROOT / "tests" / "support" / "tiny.py"


class Copy:
    """A copy of the package, to which a test adds a file and a row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "distkit", folder / "distkit", ignore=shutil.ignore_patterns("__pycache__"))

    def add(self, file: str, text: str, table: str, row: str, after: str, imports: str = "") -> None:
        """Write a file, and insert a row below the line that begins the table (`imports` above it)."""
        (self.folder / "distkit" / file).write_text(text)
        path = self.folder / "distkit" / table
        before = path.read_text()
        assert before.count(after) == 1, f"{table} has no table that begins with {after!r}"
        path.write_text(before.replace(after, f"{imports}{after}{row}"))

    def train(self, *flags: str) -> str:
        """Train 5 steps with it through the command line; what it prints."""
        env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        argv = ["--num-steps", "5", "--report-every", "1", "--run-dir", "run", *flags]
        done = subprocess.run(
            [sys.executable, str(RECIPE), *argv],
            cwd=self.folder,
            env={**env, "PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert self.read("summary")["step"] == 5
        return done.stdout

    def read(self, name: str) -> dict[str, object]:
        return json.loads((self.folder / "run" / f"{name}.json").read_text())  # type: ignore[no-any-return]

    def lines(self) -> list[dict[str, float]]:
        lines = map(json.loads, (self.folder / "run" / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["event"] == "train"]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_an_optimizer_is_a_file_and_a_row(copy: Copy) -> None:
    copy.add(
        "config/descent.py",
        '''"""Gradient descent, and nothing else."""

from dataclasses import dataclass

from distkit.config.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Descent(OptimConfig):
    """Gradient descent; on request, ascent."""

    name = "descent"
    torch_class = "torch.optim.SGD"
    maximize: bool = False
    """Ascend."""
''',
        table="config/optim.py",
        after="    for kind in (\n",
        row='        __import__("distkit.config.descent", fromlist=["Descent"]).Descent,\n',
    )
    copy.train("--optim.name", "descent", "--optim.maximize", "--optim.lr", "0.5")
    optim = copy.read("config")["optim"]
    assert isinstance(optim, dict)
    assert (optim["name"], optim["maximize"]) == ("descent", True)
    losses = [line["loss"] for line in copy.lines()]
    assert losses[-1] > losses[0]


def test_a_schedule_is_a_file_and_a_row(copy: Copy) -> None:
    copy.add(
        "config/halving.py",
        '''"""Half the learning rate at every step."""

from dataclasses import dataclass

from distkit.config.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class Halving(ScheduleConfig):
    """A power of one half."""

    name = "halving"

    def shape(self, span):
        return lambda step: 0.5**step
''',
        table="config/schedule.py",
        after="    for kind in (\n",
        row='        __import__("distkit.config.halving", fromlist=["Halving"]).Halving,\n',
    )
    copy.train("--schedule.name", "halving", "--optim.lr", "0.2")
    assert [line["lr"] for line in copy.lines()] == pytest.approx([0.2 * 0.5**step for step in range(5)])


def test_an_observer_is_a_file_and_a_row(copy: Copy) -> None:
    copy.add(
        "observers/names.py",
        '''"""Writes the names of events."""

from distkit.observers.base import Observer


def build(run_dir):
    return Names(run_dir / "names.txt")


class Names(Observer):
    def __init__(self, path):
        self.path = path

    def start(self, info, step):
        self.path.write_text("")

    def record(self, event):
        with self.path.open("a") as file:
            print(event["event"], event["step"], file=file)

    def close(self, status, message):
        with self.path.open("a") as file:
            print(status, file=file)
''',
        table="observers/__init__.py",
        after="TABLE: dict[str, str | None] = {\n",
        row='    "names": None,\n',
    )
    copy.train("--observe.also", "names")
    lines = (copy.folder / "run" / "names.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("train")] == [f"train {step}" for step in range(1, 6)]
    assert lines[-1] == "completed"


def test_a_strategy_is_a_file_and_a_row(copy: Copy) -> None:
    copy.add(
        "strategies/counting.py",
        '''"""Data parallel, and a count of the updates."""

from distkit.strategies.data_parallel import DataParallel


class Counting(DataParallel):
    count = 0

    def update(self, leave_out=None):
        self.count += 1
        print("update", self.count)
        super().update(leave_out)
''',
        table="config/strategy.py",
        after="STRATEGIES: dict[str, StrategyRow] = {\n",
        row='    "counting": StrategyRow(implementation="distkit.strategies.counting.Counting", ranks="one"),\n',
    )
    out = copy.train("--strategy", "counting")
    assert [line for line in out.splitlines() if line.startswith("update")] == [f"update {n}" for n in range(1, 6)]
    assert copy.read("config")["strategy"] == "counting"
