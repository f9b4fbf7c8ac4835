"""The benchmarks run alone and reach their targets here too."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from harness import ROOT, SHARED_DATA

CIFAR = SHARED_DATA / "cifar10-jpeg.tar.xz"


def run_benchmark(name: str, *flags: str) -> str:
    script = ROOT / "benchmarks" / name
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, timeout=580, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_engine_is_as_fast_as_a_loop_by_hand(tmp_path: Path) -> None:
    out = run_benchmark("step_overhead.py", "--check", "--rounds", "5", "--json", str(tmp_path / "r.json"))
    assert "all arms end with equal weights" in out
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["results"]["engine"]["median"] > 0


@pytest.mark.slow
def test_the_data_path_runs_at_memory_speed(tmp_path: Path) -> None:
    out = run_benchmark("data.py", "--rounds", "3", "--json", str(tmp_path / "r.json"))
    assert "distkit's pixels are PIL's for the same draws" in out
    targets = json.loads((tmp_path / "r.json").read_text())["targets"]
    # two processes on one core are judged by `--check` on a quiet machine
    assert all(reached for target, reached in targets.items() if "workers" not in target), out


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 (JPEG) is not at hand")
def test_the_quick_preset_learns_real_images(tmp_path: Path) -> None:
    with tarfile.open(CIFAR) as archive:
        archive.extractall(tmp_path / "cifar", filter="data")
    # how long it takes depends on what else the machine does; `--check` judges that too
    out = run_benchmark("cifar10_quick.py", "--root", str(tmp_path / "cifar"))
    assert "reached  test accuracy >= 72 %" in out
