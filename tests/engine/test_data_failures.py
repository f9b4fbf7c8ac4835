"""Real failures of the data path in real runs: a named cause in seconds, and no process left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from support.harness import ROOT, run_recipe_cli

RECIPE = '''
"""An ImageFolder read by worker processes."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2
import torch

from distkit.config import DataConfig, ObserveConfig, TrainConfig
from distkit.losses import LossOutput
from distkit.entry import main
from distkit import Recipe, main


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Workers."""

    size: int = 16
    """Side of a sample in pixels."""


def build_dataset(config, split):
    if split == "test":
        return None
    change = [v2.PILToTensor(), v2.RandomResizedCrop(config.size), v2.ToDtype(torch.float32, scale=True)]
    return ImageFolder(str(config.data.root), v2.Compose(change), loader=read)


def read(path):
    if path.endswith(os.environ.get("VICTIM", "nothing")) and torch.utils.data.get_worker_info():
        os._exit(7)
    return default_loader(path)


def build_model(config):
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 4))


def compute_loss(config, model, batch):
    return LossOutput(F.cross_entropy(model(batch[0]), batch[1]))


config = Config(num_steps=100_000, global_batch_size=8, device="cpu", num_threads=1, data=DataConfig(num_workers=2))
recipe = Recipe("workers", Config, build_model, build_dataset, compute_loss, presets={"default": config})

if __name__ == "__main__":
    main(recipe)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dice = np.random.default_rng(0)
    for number in range(40):
        place = tmp_path / "images" / f"class{number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = dice.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02d}.jpg", quality=95)
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path


def command(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "recipe.py", "--data.root", "images", "--run-dir", "run", *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_a_truncated_file_is_named(folder: Path) -> None:
    victim = folder / "images" / "class1" / "05.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    (ended,) = run_recipe_cli(["--data.root", "images", "--run-dir", "run"], folder, recipe=folder / "recipe.py")
    assert ended.returncode == 2
    assert "class1/05.jpg" in ended.stderr
    assert "truncated" in ended.stderr.lower()
    assert "--data.on-corrupt skip" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) < 10


def test_a_truncated_file_is_skipped_on_wish(folder: Path) -> None:
    victim = folder / "images" / "class1" / "05.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    flags = ["--data.root", "images", "--data.on-corrupt", "skip", "--num-steps", "12"]
    digests = set()
    for name, workers in (("a", "1"), ("b", "3")):
        argv = [*flags, "--run-dir", name, "--data.num-workers", workers]
        (ended,) = run_recipe_cli(argv, folder, recipe=folder / "recipe.py")
        assert ended.returncode == 0, ended.stderr
        assert "05.jpg" in ended.stderr
        digests.add((folder / name / "summary.json").read_text().split('"state_digest"')[1].split(",")[0])
    assert len(digests) == 1


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_worker_that_exits_is_named_with_its_sample(ranks: int, folder: Path) -> None:
    flags = ["--data.root", "images", "--run-dir", "run", "--data.num-workers", "1"]
    env = {"VICTIM": "17.jpg"}
    ended = run_recipe_cli(flags, folder, recipe=folder / "recipe.py", world_size=ranks, env=env)
    said = "".join(each.stderr for each in ended)
    assert [each.returncode for each in ended] == [1] * ranks
    assert "Traceback" not in said, said
    words = r"a data worker died: worker 0 of 1 \(process \d+\) ended with exit code 7 while it read sample \d+ "
    assert re.search(words + r"\(images/class1/17\.jpg\)", said), said
    cause = json.loads((folder / "run" / "status.json").read_text())["cause"]
    assert "images/class1/17.jpg" in cause["what_happened"]
    assert "os._exit" in cause["what_to_do"]


@pytest.mark.slow
def test_a_killed_worker_ends_the_run(folder: Path) -> None:
    run = subprocess.Popen(command(folder), cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        main = psutil.Process(run.pid)
        deadline = time.monotonic() + 60
        lines = folder / "run" / "metrics.jsonl"
        while time.monotonic() < deadline and not (lines.exists() and '"train"' in lines.read_text()):
            time.sleep(0.2)
        family = main.children(recursive=True)
        os.kill(family[0].pid, signal.SIGKILL)
        _, error = run.communicate(timeout=30)
        assert run.returncode == 1
        assert re.search(r"a data worker died: worker \d of 2 \(process \d+\) was killed by SIGKILL", error)
        assert "Traceback" not in error
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    finally:
        if run.poll() is None:
            run.kill()
            run.communicate()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting a small /dev/shm needs root")
def test_a_full_dev_shm_is_named(folder: Path) -> None:
    script = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    flags = ["--size", "224", "--global-batch-size", "16"]
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command(folder, *flags)],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 1, run.stderr
    assert "/dev/shm is full" in run.stderr
    assert "--data.num-workers" in run.stderr
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    assert not left
