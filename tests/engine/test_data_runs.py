"""Whole runs over every kind of data: the same digest for any placement, one line that says where the data lie."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.harness import run_recipe_cli
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from torchvision.transforms import v2

from distkit import Recipe
from distkit.assemble import assemble
from distkit.config import AdamW, DataConfig, ObserveConfig, Placement, Split, TrainConfig
from distkit.data import IterableData, TensorSamples, TokenDataset
from distkit.data.packed.pack import pack
from distkit.data.sources import folder
from distkit.engine.fit import fit
from distkit.errors import ConfigError, DataError
from distkit.losses import LossOutput
from distkit.runtime import Topology
from distkit.runtime.process import start

BASE = TrainConfig(
    num_steps=6,
    global_batch_size=8,
    device="cpu",
    num_threads=1,
    observe=ObserveConfig(console=False),
    optim=AdamW(lr=1e-3),
)


def train(folder: Path, config: TrainConfig, dataset: object, model: nn.Module, loss: object) -> dict[str, object]:
    def build_dataset(_config: TrainConfig, split: Split) -> object:
        return dataset if split == "train" or not isinstance(dataset, IterableData) else None

    recipe = Recipe("data", TrainConfig, lambda _: model, build_dataset, loss, presets={"default": config})  # type: ignore[arg-type]
    config = replace(config, run_dir=folder)
    run = assemble(recipe, config, start(config, Topology()))
    return fit(run)


def image_tree(root: Path) -> Path:
    dice = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for label in range(10):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(dice.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.mark.slow
def test_folder_and_packed_give_the_same_run_in_every_placement(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "images")
    pack(str(tree), tmp_path / "packed")
    flags = ["--num-steps", "4", "--global-batch-size", "10", "--precision", "fp32", "--num-threads", "1"]
    digests = {}
    for source, root, placement in (
        ("folder", tree, "device"),
        ("folder", tree, "host"),
        ("packed", tmp_path / "packed", "auto"),
        ("packed", tmp_path / "packed", "device"),
    ):
        name = f"{source}-{placement}"
        argv = ["--data.source", source, "--data.root", str(root), "--data.placement", placement, "--run-dir", name]
        (ended,) = run_recipe_cli([*flags, *argv], tmp_path)
        assert ended.returncode == 0, ended.stderr
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        digests[name] = summary["state_digest"]
        assert summary["placement"].startswith("host" if placement in ("host", "auto") else "device")
    assert len(set(digests.values())) == 1, digests


def test_a_resume_on_images_that_were_replaced_is_refused(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "images")
    argv = ["--data.source", "folder", "--data.root", str(tree), "--global-batch-size", "10", "--run-dir", "run",
            "--precision", "fp32", "--num-threads", "1"]  # fmt: skip
    (ended,) = run_recipe_cli([*argv, "--num-steps", "2"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["data"] == folder(tree, "train").fingerprint
    path = tree / "train" / "class3" / "4.png"
    Image.open(path).rotate(180).save(path)
    (ended,) = run_recipe_cli([*argv, "--num-steps", "4"], tmp_path)
    assert ended.returncode == 2
    assert "was trained on different data" in ended.stderr


OTHER_DATA = """
import os
from distkit.config import TrainConfig
from distkit.data import synthetic
from distkit.losses import LossOutput
from distkit import Recipe, main
from torch import nn


def build_dataset(config, split):
    older = split == os.environ["OLDER"] and os.environ["RANK"] == "1"
    return synthetic(split, int(older), num_train=64, num_test=8)


def compute_loss(config, model, batch):
    return LossOutput(nn.functional.cross_entropy(model(batch[0]), batch[1]))


build_model = lambda config: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
preset = TrainConfig(num_steps=2, global_batch_size=8, device="cpu")
recipe = Recipe("other", TrainConfig, build_model, build_dataset, compute_loss, presets={"default": preset})
if __name__ == "__main__":
    main(recipe)
"""


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_rank_with_other_data_than_the_others_is_named(tmp_path: Path, split: str) -> None:
    (tmp_path / "other.py").write_text(OTHER_DATA)
    ended = run_recipe_cli(["--run-dir", "run"], tmp_path, recipe=tmp_path / "other.py", world_size=2,
                           env={"OLDER": split})  # fmt: skip
    assert [one.returncode for one in ended] == [2, 2]
    assert "rank 1 has different data from rank 0" in ended[0].stderr
    assert len(ended[0].stderr.splitlines()) < 10
    assert not ended[1].stderr
    assert not (tmp_path / "run").exists()
    ended = run_recipe_cli(["--run-dir", "run"], tmp_path, recipe=tmp_path / "other.py", world_size=2,
                           env={"OLDER": "none"})  # fmt: skip
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr


def test_a_packed_folder_that_is_not_there_says_what_to_type(tmp_path: Path) -> None:
    (ended,) = run_recipe_cli(["--data.source", "packed", "--data.root", "nowhere"], tmp_path)
    assert ended.returncode == 2
    assert "distkit data pack FOLDER nowhere" in ended.stderr


class Random:
    """A map-style set with a random torchvision transform, as PIL images."""

    change = v2.Compose([v2.RandomCrop(8), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = np.random.RandomState(index).randint(0, 256, (12, 12, 3), dtype=np.uint8)
        return self.change(Image.fromarray(pixels)), index % 10


def image_loss(_config: TrainConfig, model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
    return LossOutput(F.cross_entropy(model(batch[0].float() / 255), batch[1]))


def test_random_transforms_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    digests = set()
    for num_workers in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        config = replace(BASE, data=DataConfig(num_workers=num_workers))
        folder = tmp_path / str(num_workers)
        summary = train(folder, config, TensorSamples(Random()), model, image_loss)
        digests.add(summary["state_digest"])
        assert summary["placement"] == f"workers (map-style data set, {num_workers} processes)"
    assert len(digests) == 1


@pytest.mark.parametrize("placement", ["auto", "device"])
def test_token_files_train(tmp_path: Path, placement: Placement) -> None:
    tokens = np.tile(np.arange(50, dtype=np.uint16), 40)
    tokens.tofile(tmp_path / "tokens.bin")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))

    def loss(_config: TrainConfig, model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
        return LossOutput(F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()))

    config = replace(BASE, num_steps=60, optim=AdamW(lr=0.05), data=DataConfig(placement=placement))
    dataset = TokenDataset(tmp_path / "tokens.bin", 16, vocab_size=50)
    summary = train(tmp_path / "run", config, dataset, model, loss)
    assert summary["last"]["loss"] < 0.5  # type: ignore[index]
    assert str(summary["placement"]).startswith("host (memory-mapped" if placement == "auto" else "device")


class Counting(IterableDataset[tuple[Tensor, int]]):
    """Every world_size-th number."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for number in range(self.rank, 40, self.world_size):
            yield torch.full((192,), number / 40), number % 10


@pytest.mark.parametrize("placement", ["auto", "workers"])
def test_iterable_data_train_and_say_what_they_cannot(tmp_path: Path, placement: Placement) -> None:
    pytest.importorskip("torchdata", reason="the extra streaming is not installed")
    config = replace(BASE, data=DataConfig(num_workers=1, placement=placement))
    data = IterableData(build=Counting, samples_per_epoch=40)
    summary = train(tmp_path / "run", config, data, nn.Linear(192, 10), image_loss)
    assert "the world size may not change" in str(summary["train_data"])
    assert "iterable" in str(summary["placement"])
    assert summary["test_data"] == "none"


def test_iterable_data_cannot_lie_on_the_device(tmp_path: Path) -> None:
    config = replace(BASE, data=DataConfig(placement="device"))
    data = IterableData(build=Counting, samples_per_epoch=40)
    with pytest.raises(ConfigError, match=r"--data\.placement workers"):
        train(tmp_path / "run", config, data, nn.Linear(192, 10), image_loss)
    assert not (tmp_path / "run").exists()


@dataclass
class Few:
    count: int

    def __len__(self) -> int:
        return self.count

    def fetch(self, indices: Tensor) -> Tensor:
        return indices


@pytest.mark.parametrize(("count", "says"), [(0, "empty"), (5, "--global-batch-size 5")])
def test_sets_that_are_too_small_are_refused(tmp_path: Path, count: int, says: str) -> None:
    with pytest.raises(DataError, match=says):
        train(tmp_path / "run", BASE, Few(count), nn.Linear(1, 1), image_loss)
    assert not (tmp_path / "run").exists()
