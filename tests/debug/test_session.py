"""Debug mode tells a newcomer what went wrong, for real recipes with one real mistake each."""

from pathlib import Path

import pytest
import torch
from support.harness import RECIPE, Ended, run_recipe_cli
from torch import nn

from distkit.debug.explain import summarize
from distkit.debug.watch import ModuleWatch, count_nonfinite, range_line, shape_line
from distkit.errors import NonFiniteError

DEBUG = ["--debug", "--data.source", "synthetic", "--global-batch-size", "16", "--num-threads", "2"]

#: How the recipe opens its data.
LOAD = "load_images(config.data, split, seed=config.seed, augmentation=augmentation, facts=facts_of(config))"


def debug(tmp_path: Path, *argv: str, change: tuple[str, str] | None = None, stdin: str = "") -> Ended:
    """The cifar10 recipe in debug mode, with one change to its text."""
    recipe = RECIPE
    if change is not None:
        recipe = tmp_path / "changed.py"
        text = RECIPE.read_text()
        assert change[0] in text
        recipe.write_text(text.replace(*change, 1))
    (ended,) = run_recipe_cli([*DEBUG, *argv], tmp_path, recipe=recipe, stdin=stdin)
    assert not (tmp_path / "runs").exists()
    return ended


def test_a_healthy_recipe(tmp_path: Path) -> None:
    ended = debug(tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for part in (
        "head.weight",
        "[10, 64]",
        "75,290 parameters in all",
        "bfloat16 [16, 10]",
        "from an untrained model: fine",
        "every parameter got a gradient",
        "step    3",
        "nothing wrong",
    ):
        assert part in ended.stdout, part


def test_a_nan_put_into_a_layer_is_named(tmp_path: Path) -> None:
    change = (
        "logits = model(images)",
        "model.stages[1][0].conv1.weight.data[0, 0, 0, 0] = float('nan')\n    logits = model(images)",
    )
    ended = debug(tmp_path, change=change)
    assert ended.returncode == 1
    assert "step 1: module stages.1.0.conv1, Conv2d(16, 32" in ended.stderr
    assert "stages.1.0.conv1" in ended.stderr
    assert "weight: float32 [32, 16, 3, 3], 1 of 4608 values not finite" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) < 10


def test_a_nan_between_modules_and_in_the_loss_and_in_the_batch_are_told_apart(tmp_path: Path) -> None:
    between = debug(tmp_path, change=("logits = model(images)", "logits = model(images * float('inf'))"))
    assert "between modules, in the recipe's compute_loss" in between.stderr
    loss = debug(tmp_path, change=("return LossOutput(loss,", "return LossOutput(loss / 0,"))
    assert "the model's output is finite, the loss computed from it is inf" in loss.stderr
    batch = debug(
        tmp_path,
        change=(
            f"    return {LOAD}",
            f"    images = {LOAD}\n"
            "    for device, pair in images._normalization.items():\n"
            "        images._normalization[device] = tuple(t * float('nan') for t in pair)\n    return images",
        ),
    )
    assert "the batch itself is not finite: [0]" in batch.stderr


def test_a_nan_in_backward_is_named(tmp_path: Path) -> None:
    change = ("loss = F.cross", "logits = logits + (logits * 0).abs().sqrt()\n    loss = F.cross")
    ended = debug(tmp_path, change=change)
    assert ended.returncode == 1
    assert "step 1: the gradient became NaN in backward" in ended.stderr
    assert "AbsBackward0" in ended.stderr
    assert "logits * 0" in ended.stderr


def test_an_unused_parameter_is_named(tmp_path: Path) -> None:
    change = (
        "recipe = Recipe(",
        "build_bare = build_model\n\n\ndef build_model(config):\n    model = build_bare(config)\n"
        "    model.forgotten = nn.Linear(3, 3)\n    return model\n\n\nrecipe = Recipe(",
    )
    ended = debug(tmp_path, change=change)
    assert ended.returncode == 0, ended.stderr
    assert "2 unused parameters, which the loss does not depend on: forgotten.weight, forgotten.bias" in ended.stdout
    assert "1 thing(s) to look at" in ended.stdout
    assert "nothing wrong" not in ended.stdout


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    ended = debug(tmp_path, change=("images, labels = batch\n", "images, labels = batch\n    labels = labels + 1\n"))
    assert ended.returncode == 1
    assert "while computing the loss, outside of the model" in ended.stderr
    assert "in compute_loss: loss = F.cross_entropy" in ended.stderr
    assert "the model has 10 classes, so labels must be in 0 to 9" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) < 10


def test_labels_out_of_range_in_the_data_are_named(tmp_path: Path) -> None:
    ended = debug(tmp_path, change=("num_classes=facts.num_classes, norm", "num_classes=7, norm"))
    assert ended.returncode == 1
    assert "to 9; the model has 7 classes, so labels must be in 0 to 6" in ended.stderr


def test_a_wrong_input_shape_is_named(tmp_path: Path) -> None:
    ended = debug(tmp_path, change=("logits = model(images)", "logits = model(images[:, :1])"))
    assert ended.returncode == 1
    assert "in module stem.0, Conv2d(3, 16" in ended.stderr
    assert "float32 [16, 1, 32, 32]" in ended.stderr
    assert "batch [0]: float32 [16, 3, 32, 32]" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) < 10


def test_a_broken_data_set_is_not_blamed_on_the_loss(tmp_path: Path) -> None:
    change = (
        f"    return {LOAD}",
        f"    images = {LOAD}\n    type(images).fetch = lambda self, indices: 1 / 0\n    return images",
    )
    ended = debug(tmp_path, change=change)
    assert ended.returncode == 1
    assert "ZeroDivisionError while reading the batch" in ended.stderr
    assert "1 / 0" in ended.stderr


def test_sums_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    ended = debug(tmp_path, change=("topk_correct(logits, labels, ks))", "{'n': 3})"))
    assert ended.returncode == 2
    assert "sums['n'] must be a tensor without dims" in ended.stderr
    assert "int 3" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch 2.11 warns all the same
def test_sparse_gradients_can_be_debugged() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.tensor([1.0, float("inf")]), (3,),
                                     check_invariants=True)  # fmt: skip
    assert count_nonfinite(sparse) == 1
    assert "1 of 2 values not finite" in range_line(sparse)


def test_a_strange_first_loss_is_told(tmp_path: Path) -> None:
    ended = debug(tmp_path, change=("loss = F.cross_entropy(", "loss = 128 * F.cross_entropy("))
    assert ended.returncode == 0
    assert "WARNING: first loss" in ended.stdout


@pytest.mark.slow
def test_overfitting_one_batch(tmp_path: Path) -> None:
    ended = debug(tmp_path, "--debug.overfit-batches", "1", "--global-batch-size", "8")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "overfit test passed" in ended.stdout
    stuck = debug(tmp_path, "--debug.overfit-batches", "1", "--global-batch-size", "2", "--optim.lr", "1e-9")
    assert stuck.returncode == 1
    assert "did not memorize 1 batch(es)" in stuck.stderr


def test_pdb_opens_at_the_exception(tmp_path: Path) -> None:
    change = ("logits = model(images)", "answer = 42\n    logits = model(images[:, :1])")
    ended = debug(tmp_path, "--debug.pdb", change=change, stdin="up\nup\nup\nup\nup\nup\nup\nup\np 'frame'\nq\n")
    assert ended.returncode == 1
    assert "(Pdb)" in ended.stdout
    assert "'frame'" in ended.stdout


def test_debug_turns_compile_off_and_blocks_launches(tmp_path: Path) -> None:
    change = (
        "images, labels = batch\n",
        "images, labels = batch\n    import os\n"
        "    print('blocking', os.environ['CUDA_LAUNCH_BLOCKING'], 'compiled', config.compile)\n",
    )
    ended = debug(tmp_path, "--compile", change=change)
    assert ended.returncode == 0, ended.stderr
    assert "blocking 1 compiled False" in ended.stdout


class Between(nn.Module):
    """Makes an infinity between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) / 0)  # type: ignore[no-any-return]


def test_watch_names_the_place_between_modules() -> None:
    model = Between()
    with ModuleWatch(model, step=4), pytest.raises(NonFiniteError) as caught:
        model(torch.ones(1, 2))
    message = str(caught.value)
    assert "step 4" in message
    assert "in the model, Between after first" in message
    assert "input of second" in message
    assert not model.first._forward_hooks


def test_lines_about_tensors() -> None:
    assert range_line(torch.tensor([3, 9])) == "int64 [2], 3 to 9"
    assert range_line(torch.tensor([1.0, float("nan")])) == "float32 [2], 1 of 2 values not finite"
    assert shape_line((torch.ones(2, 3), {"a": torch.ones(1, dtype=torch.bfloat16)})) == "float32 [2, 3], bfloat16 [1]"
    assert shape_line("text") == "no tensor"
    assert count_nonfinite(torch.tensor([1, 2])) == 0
    lines = summarize({"x": torch.ones(2), "y": (torch.tensor([1, 4]),)})
    assert lines["['x']"] == ("float32 [2], 1 to 1", None)
    assert lines["['y'][0]"] == ("int64 [2], 1 to 4", (1, 4))
