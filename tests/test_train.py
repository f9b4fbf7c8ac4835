"""`train` and `load_run`: a run from Python, and the way back from its directory to its model."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from support.harness import run_ranks, run_recipe_cli
from support.tiny import BASE, CLASSES, RECIPE, TinyConfig, Vectors
from torch import nn

import distkit
from distkit import load_run, train
from distkit.config import CheckpointConfig
from distkit.errors import CheckpointError, ConfigError, TrainingError
from distkit.runtime.process import Runtime

TINY = Path(__file__).parent / "support" / "tiny.py"
SAVED = CheckpointConfig(save_every=5, keep_last=None)
pytestmark = pytest.mark.usefixtures("one_thread")


def state_of_process() -> dict[str, object]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "environment": dict(os.environ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "precision": torch.backends.cuda.matmul.fp32_precision,
    }


def test_many_runs_in_one_process_leave_nothing_behind(tmp_path: Path) -> None:
    config = replace(BASE, num_steps=4, checkpoint=SAVED)
    summaries, memory = [], []
    before, threads = state_of_process(), set(threading.enumerate())
    for number in range(20):
        summaries.append(train(RECIPE, replace(config, run_dir=tmp_path / str(number))))
        memory.append(psutil.Process().memory_info().rss)
        for thread in set(threading.enumerate()) - threads:
            thread.join(10)
    assert len({summary["state_digest"] for summary in summaries}) == 1
    assert state_of_process() == before
    assert set(threading.enumerate()) <= threads
    assert memory[-1] - memory[4] < 20 * 2**20


def test_train_raises_instead_of_exiting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="less than one global batch"):
        train(RECIPE, replace(BASE, global_batch_size=1_000, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()

    def failing(*_: object) -> None:
        raise TrainingError("no loss today")

    with pytest.raises(TrainingError, match="no loss today"):
        train(replace(RECIPE, compute_loss=failing), replace(BASE, run_dir=tmp_path / "run"))  # type: ignore[arg-type]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert train(RECIPE, replace(BASE, run_dir=tmp_path / "again"))["step"] == BASE.num_steps


def train_twice(folder: str) -> list[object]:
    close = Runtime.close

    def close_late(runtime: Runtime) -> None:
        time.sleep(runtime.rank == 0)
        close(runtime)

    config = replace(BASE, num_steps=4, run_dir=Path(folder) / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "close", close_late)
        return [train(RECIPE, replace(config, run_dir=Path(folder) / name))["state_digest"] for name in ("a", "b")]


@pytest.mark.distributed
def test_a_rank_may_begin_the_next_run_before_another_has_left_the_last(tmp_path: Path) -> None:
    digests = run_ranks(train_twice, 2, str(tmp_path))
    assert len({digest for both in digests for digest in both}) == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tests/support/tiny.py, started from the command line, with an average and all its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--ema-decay", "0.5", "--eval-every", "5", "--checkpoint.enabled", "--checkpoint.save-every", "5",
             "--checkpoint.keep-last", "None", "--run-dir", "run", "--batch-norm"]  # fmt: skip
    (ended,) = run_recipe_cli(flags, folder, recipe=TINY)
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 60).view(10, 6))


def test_a_run_directory_leads_back_to_its_model(finished: Path) -> None:
    from safetensors.torch import load_file

    config, model = load_run(finished)
    assert type(config).__name__ == "TinyConfig"
    assert (config.ema_decay, config.num_steps) == (0.5, 20)
    assert not model.training
    averaged = load_file(finished / "ema.safetensors")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in model.named_parameters())
    _, plain = load_run(finished, ema=False)
    weights = load_file(finished / "weights.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in plain.state_dict().items())
    assert not torch.equal(outputs(model), outputs(plain))
    _, at_the_end = load_run(finished, 20)
    assert torch.equal(outputs(at_the_end), outputs(model))
    (finished / "ema.safetensors").rename(finished / "elsewhere")
    _, of_checkpoint = load_run(finished)
    (finished / "elsewhere").rename(finished / "ema.safetensors")
    assert torch.equal(outputs(of_checkpoint), outputs(model))


def test_the_best_weights_are_those_of_the_best_evaluation(finished: Path) -> None:
    best = json.loads((finished / "summary.json").read_text())["best"]["step"]
    _, model = load_run(finished, "best")
    _, same = load_run(finished, int(best))
    assert torch.equal(outputs(model), outputs(same))


def test_what_is_not_there_is_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint of step 7"):
        load_run(finished, 7)
    with pytest.raises(ConfigError, match="not a run directory"):
        load_run(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    (shard,) = (damaged / "checkpoints" / "step-000000010").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="step-000000010"):
        load_run(damaged, 10)


def test_the_recipe_is_taken_from_where_it_was_and_a_change_is_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    recipe = tmp_path / "mine.py"
    recipe.write_text(TINY.read_text())
    source = run / "recipe" / "source.json"
    kept = json.loads(source.read_text())
    assert kept["recipe"] == "tiny"
    assert Path(kept["file"]) == TINY.resolve()
    assert (run / "recipe" / "tiny.py").read_text() == TINY.read_text()

    source.write_text(json.dumps({**kept, "file": str(recipe)}))
    load_run(run)
    assert "changed" not in capsys.readouterr().err
    recipe.write_text(TINY.read_text() + "\n# another line\n")
    load_run(run)
    assert f"{recipe} has changed since the run was started" in capsys.readouterr().err
    recipe.unlink()
    with pytest.raises(ConfigError, match=r"is no longer at .*mine.py") as caught:
        load_run(run)
    assert "if you trust that directory" in str(caught.value)
    source.write_text(json.dumps({**kept, "file": str(run / "recipe" / "tiny.py")}))
    with pytest.raises(ConfigError, match="is no longer at"):  # code in the run directory never runs unasked
        load_run(run)
    _, copy = load_run(run, recipe="copy")
    _, named = load_run(run, recipe=TINY)
    _, itself = load_run(run, recipe=RECIPE)
    assert torch.equal(outputs(copy), outputs(named))
    assert torch.equal(outputs(copy), outputs(itself))


def test_the_public_face() -> None:
    for name in distkit.__all__:
        assert getattr(distkit, name) is not None
    assert callable(distkit.main)
    assert distkit.TrainConfig in TinyConfig.__mro__
    with pytest.raises(ConfigError, match=r"main\(recipe\)"):
        RECIPE.main()


def test_a_model_may_ask_for_the_training_set(tmp_path: Path) -> None:
    def build_model(config: TinyConfig, train_set: Vectors) -> nn.Module:
        return nn.Sequential(nn.Linear(train_set.inputs.shape[1], 5), nn.Linear(5, int(train_set.labels.max()) + 1))

    recipe = replace(RECIPE, build_model=build_model)
    train(recipe, replace(BASE, run_dir=tmp_path / "run"))
    config, model = load_run(tmp_path / "run", recipe=recipe)
    assert config.num_steps == BASE.num_steps
    assert model[1].weight.shape == (CLASSES, 5)  # type: ignore[index]
