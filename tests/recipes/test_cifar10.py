"""The image recipe on other data than CIFAR-10: the model has the data's classes and channels, also afterwards."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from support.harness import RECIPE, Ended, run_recipe_cli
from support.image_trees import make_tree, save_image

from distkit import load_run
from distkit.commands import run

SHORT = ["--preset", "quick", "--precision", "fp32", "--num-epochs", "None", "--num-steps", "2", "--num-threads", "1",
         "--global-batch-size", "4", "--eval-batch-size", "8"]  # fmt: skip
FOLDER = ["--data.source", "folder", "--data.root", "images"]


def train(tmp_path, *argv, world_size=1) -> list[Ended]:
    return run_recipe_cli([*SHORT, "--run-dir", "run", *argv], tmp_path, world_size=world_size)


def succeeds(tmp_path, *argv, world_size=1) -> str:
    ended = train(tmp_path, *argv, world_size=world_size)
    for each in ended:
        assert each.returncode == 0, each.stdout + each.stderr
    return ended[0].stdout


def notes(tmp_path):
    events = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    return [event["message"] for event in events if event["event"] == "note"]


@pytest.mark.parametrize("num_classes", [3, 12])
def test_the_head_has_as_many_outputs_as_the_data_has_classes(tmp_path, num_classes):
    names = [f"class {i:02}" for i in range(num_classes)]
    make_tree(tmp_path / "images", names)
    out = succeeds(tmp_path, *FOLDER)
    assert f"{num_classes} classes, from folder images" in out
    assert ("top5" in out) == (num_classes > 5)
    assert sum("normalised with CIFAR-10's mean and std" in note for note in notes(tmp_path)) == 1
    shutil.rmtree(tmp_path / "images")
    config, model = load_run(tmp_path / "run", recipe=RECIPE)  # without its data
    assert model.head.out_features == config.num_classes == num_classes
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, num_classes)


def test_grey_images_get_a_stem_of_one_channel_in_any_model(tmp_path):
    make_tree(tmp_path / "images", ("a", "b"), mode="L")
    assert "1x32x32" in succeeds(tmp_path, *FOLDER, "--model", "fastnet")
    config, model = load_run(tmp_path / "run", recipe=RECIPE)
    assert config.channels == model.whiten.in_channels == 1
    shutil.rmtree(tmp_path / "run")
    assert "3x32x32" in succeeds(tmp_path, *FOLDER, "--data.color", "rgb", "--model", "resnet18")
    assert load_run(tmp_path / "run", recipe=RECIPE)[1].stem[0].in_channels == 3


@pytest.mark.distributed
def test_two_ranks_have_the_head_of_the_data_too(tmp_path):
    make_tree(tmp_path / "images", ("a", "b", "c"))
    assert "3 classes" in succeeds(tmp_path, *FOLDER, world_size=2)


def test_the_untrained_loss_in_debug_mode_is_that_of_the_data(tmp_path):
    make_tree(tmp_path / "images", ("a", "b", "c"))
    (ended,) = run_recipe_cli([*FOLDER, "--debug", "--global-batch-size", "4", "--num-threads", "1"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "expected about 1.0986 from an untrained model: fine" in ended.stdout
    assert "note" in ended.stdout


def test_a_resume_on_other_classes_is_refused_before_anything_changes(tmp_path):
    make_tree(tmp_path / "images", ("a", "b", "c"))
    succeeds(tmp_path, *FOLDER)
    save_image(tmp_path / "images" / "train" / "d" / "0.png")
    save_image(tmp_path / "images" / "test" / "d" / "0.png")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    (ended,) = train(tmp_path, *FOLDER, "--num-steps", "4")
    assert ended.returncode == 2
    assert "was trained on different data" in ended.stderr
    assert "num_classes 3 -> 4" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_configuration_for_other_classes_is_refused_with_advice_that_works(tmp_path):
    make_tree(tmp_path / "images", ("a", "b", "c"))
    succeeds(tmp_path, *FOLDER)
    make_tree(tmp_path / "others", ("a", "b"))
    config = ["--config", "run/config.json", "--run-dir", "run2", "--data.root", "others"]
    (ended,) = run_recipe_cli(config, tmp_path)
    assert ended.returncode == 2
    assert "expected: 3 classes and 3 channels" in ended.stderr
    assert "got:      2 classes and 3 channels" in ended.stderr
    assert not (tmp_path / "run2").exists()
    advice = re.search(r"type:     (.*)", ended.stderr)[1].split()
    (ended,) = run_recipe_cli([*config, *advice], tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_what_distkit_data_stats_prints_can_be_typed(tmp_path, capsys):
    make_tree(tmp_path / "images", ("a", "b"), mode="L")
    for mode in ("rgb", "grey"):
        assert run(["data", "stats", str(tmp_path / "images"), "--color", mode]) == 0
        advice = re.search(r"type: (.*)", capsys.readouterr().out)[1].split()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        succeeds(tmp_path, *FOLDER, "--data.color", mode, *advice)
        config, _ = load_run(tmp_path / "run", recipe=RECIPE)
        assert len(config.data.mean) == len(config.data.std) == (3 if mode == "rgb" else 1)
        assert not notes(tmp_path)


def test_a_class_without_test_images(tmp_path):
    make_tree(tmp_path / "images", ("a", "b", "c"))
    shutil.rmtree(tmp_path / "images" / "test" / "c")
    (ended,) = train(tmp_path, *FOLDER)
    assert ended.returncode == 2
    assert not (tmp_path / "run").exists()
    advice = re.search(r"type:     (--\S+)", ended.stderr)[1]
    succeeds(tmp_path, *FOLDER, advice)
    assert "images/test: no image of c" in notes(tmp_path)
    assert load_run(tmp_path / "run", recipe=RECIPE)[1].head.out_features == 3


def test_packed_images_say_their_classes(tmp_path):
    make_tree(tmp_path / "images", ("a", "b"), mode="L")
    assert run(["data", "pack", str(tmp_path / "images"), str(tmp_path / "packed")]) == 0
    succeeds(tmp_path, "--data.source", "packed", "--data.root", "packed")
    config, model = load_run(tmp_path / "run", recipe=RECIPE)
    assert (config.num_classes, config.channels, model.head.out_features) == (2, 1, 2)
