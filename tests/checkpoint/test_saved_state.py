"""state.json: what a resume needs is checked by who verifies, and what any run saves passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.writing import default_state, rehash, reseal, write_checkpoint

from distkit.checkpoint.format import STATE
from distkit.checkpoint.saved_state import check_state
from distkit.checkpoint.verify import open_checkpoint, read_manifest, verify
from distkit.errors import CheckpointError
from distkit.json_files import JsonError

TENSORS = {
    "model/w": torch.zeros(3),
    "optimizer/w/step": torch.zeros(()),
    **{f"meter/{rank:05d}/{name}": torch.zeros(()) for rank in (0, 1) for name in ("loss", "weight", "samples")},
    **{f"rng/{rank:05d}/torch": torch.zeros(4, dtype=torch.uint8) for rank in (0, 1)},
}
GOLDEN = Path(__file__).parents[1] / "golden_checkpoints"
SKIP = {"step": 3, "ranks": [0], "first": 16, "last": 23, "why": "NaN", "rolled_back": False}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, 7, TENSORS)


def refusal(directory: Path, change: Callable[[Any], object]) -> str:
    """What is said of the state of `directory` after `change`."""
    checkpoint = open_checkpoint(directory)
    state = copy.deepcopy(dict(checkpoint.state))
    change(state)
    with pytest.raises(JsonError) as caught:
        check_state(state, checkpoint.manifest)
    message = caught.value.of(STATE)
    assert message.startswith("state.json")
    assert len(message) < 300
    return message


def test_checkpoints_of_every_version_pass() -> None:
    for directory in (GOLDEN / "step-000000010", GOLDEN / "sharded" / "step-000000010"):
        assert open_checkpoint(directory).manifest == verify(directory)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.update(version=2), "written by a newer distkit"),
        (lambda state: state.update(version=True), "has version True"),
        (lambda state: state.pop("recipe"), "has no recipe"),
        (lambda state: state.update(recipe="other"), "is for recipe 'other', the manifest says 'tiny'"),
        (lambda state: state.update(step=8), "is for step 8"),
        (lambda state: state.update(num_samples=-1), "num_samples: -1 is not a count"),
        (lambda state: state.update(data=7), "data: 7 is not text"),
        (lambda state: state.update(aliases={"a": None}), "aliases.a: null is not text"),
        (lambda state: state.update(config=[]), "config: [] is not an object"),
        (lambda state: state["config"].update(seed="0"), 'config.seed: "0" is not a count'),
        (lambda state: state["config"].update(optim=None), "config.optim: null is not an object"),
        (lambda state: state.update(ranks=[{}]), "is not of 2 ranks"),
        (lambda state: state["ranks"].__setitem__(1, {"data": {"next": -1}}), "ranks.1.data.next"),
        (lambda state: state["parts"]["progress"].update(step=6), "is not for step 7"),
        (lambda state: state["parts"]["trackers"].update(last={"loss": 1.0}), "parts.trackers.last of step None"),
        (lambda state: state["parts"]["trackers"].update(best={"step": 8.0}), "parts.trackers.best of step 8.0"),
        (lambda state: state["parts"]["trackers"].update(best={"step": 2.5}), "parts.trackers.best of step 2.5"),
        (lambda state: state["parts"]["trackers"].update(last={"step": 7, "loss": "x"}), 'last.loss: "x" is not'),
        (lambda state: state["parts"]["clock"].update(seconds=math.nan), "parts.clock.seconds: NaN is not"),
        (lambda state: state["parts"]["clock"].update(samples=-8), "parts.clock.samples: -8 is not"),
        (lambda state: state["parts"].update(skips={"skips": [SKIP | {"ranks": 0}]}), "skips.skips.0.ranks: 0"),
        (lambda state: state["parts"].update(plateau={"factor": 1.0}), "parts.plateau: has no num_bad"),
        (lambda state: state["parts"]["observers"].update(wandb_run_id=5), "parts.observers.wandb_run_id"),
        (lambda state: state["parts"]["optimizer"].update({"class": "a b"}), "parts.optimizer.class"),
        (lambda state: state["parts"]["optimizer"].update(groups=[]), "an optimizer of 'w', which is no weight"),
        (lambda state: state["parts"]["optimizer"]["groups"][0].update(amsgrad="x"), "groups.0.amsgrad"),
        (lambda state: state["parts"]["optimizer"]["state"].update(w={}), "optimizer's tensors: optimizer/w/step"),
        (lambda state: state["parts"]["optimizer"]["state"]["w"].update(step={"tensor": 1}), "describes the optimizer"),
        (lambda state: state["parts"]["optimizer"]["state"]["w"].update(x={"number": "abc"}), "describes the"),
        (lambda state: state["parts"]["optimizer"]["state"]["w"].update(x={"sparse": {"shape": [1]}}), "no coalesced"),
        (lambda state: state["parts"].update(extra=[]), "parts.extra: [] is not an object"),
    ],
)
def test_what_a_resume_could_not_use_is_named(directory: Path, change: Callable[[Any], object], says: str) -> None:
    assert says in refusal(directory, change)


@pytest.mark.timeout(20)
def test_a_late_step_is_compared_and_not_counted_to(tmp_path: Path) -> None:
    step = 10**15
    state = default_state(step, 2)
    state["parts"]["trackers"] = {"last": {"step": float(step)}, "best": {"step": step - 1}}
    assert open_checkpoint(write_checkpoint(tmp_path, step, TENSORS, state=state)).manifest.step == step


def test_what_runs_save_passes(tmp_path: Path) -> None:
    state = default_state(7, 2)
    state["parts"]["trackers"] = {"last": {"step": 7.0, "loss": "nan", "top1": "-inf"}, "best": {"step": 4, "loss": 1}}
    state["parts"] |= {
        "plateau": {"factor": 0.5, "num_bad": 2, "best": -math.inf},
        "skips": {"skips": [SKIP | {"of_a_later_version": 1}]},
        "extra": {"": [math.inf]},
        "of_a_later_version": None,
    }
    state["ranks"] = [{"data": {"next": 3, "loader": {"any": [None]}}}, {}]
    forms = {"a": {"number": "float64:7ff8000000000001"}, "b": {"number": True}, "c": {"none": True},
             "d": {"list": [{"number": 2}]}}  # fmt: skip
    state["parts"]["optimizer"] = {
        "class": "LBFGS",
        "groups": [{"param_names": ["w"], "lr": 0.1, "betas": [0.9, 0.99], "foreach": None, "kind": 3}],
        "state": {"w": {**forms, "step": {"tensor": True}}},
    }
    directory = write_checkpoint(tmp_path, 7, TENSORS, state=state)
    assert open_checkpoint(directory).parts()["plateau"]["num_bad"] == 2


@pytest.mark.parametrize("name", ["rng/00002/torch", "meter/00000/loss", "meter/1/loss", "rng/x"])
def test_tensors_of_ranks_that_were_not_there(name: str, tmp_path: Path) -> None:
    tensors = {**TENSORS, name: torch.zeros(2)}
    directory = write_checkpoint(tmp_path, 7, tensors)
    verify(directory)
    with pytest.raises(CheckpointError, match=f"is of 2 ranks, and the manifest has a tensor {name}"):
        open_checkpoint(directory)


def test_a_rank_without_its_sums(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "meter/00001/weight"}
    with pytest.raises(CheckpointError, match="differ in the sums of rank 1: weight"):
        open_checkpoint(write_checkpoint(tmp_path, 7, tensors))


def test_a_claim_of_many_ranks(directory: Path) -> None:
    for world_size in (0, 100_000, 2**62):
        reseal(directory, lambda manifest, size=world_size: manifest.update(world_size=size))
        with pytest.raises(CheckpointError, match="is not a number of ranks"):
            read_manifest(directory)


@pytest.mark.parametrize("text", ["[]", "NaN", "", "[" * 10**5, '{"version": ' + "1" * 5001 + "}", "{}"])
def test_what_is_no_state(text: str, directory: Path) -> None:
    (directory / STATE).write_text(text)
    rehash(directory, STATE)
    verify(directory)  # its bytes are those that the manifest names
    with pytest.raises(CheckpointError, match=r"state\.json"):
        open_checkpoint(directory)
