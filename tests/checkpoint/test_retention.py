"""What stays, what goes, and that going leaves nothing that looks committed."""

import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.writing import default_state, write_checkpoint

from distkit.checkpoint import retention
from distkit.checkpoint.format import MANIFEST, step_name
from distkit.checkpoint.retention import (
    Retention,
    choose_removed,
    leftovers,
    list_checkpoints,
    put_aside,
    score_of,
    sweep,
)

counts = st.none() | st.integers(1, 6)
cases = st.fixed_dictionaries(
    {
        "steps": st.lists(st.integers(0, 60), unique=True, max_size=15),
        "scores": st.dictionaries(st.integers(0, 60), st.floats(allow_nan=True) | st.integers(0, 2), max_size=15),
        "retention": st.builds(Retention, counts, counts, counts),
        "protected": st.sets(st.integers(0, 60), max_size=3),
    }
)


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(folder, step, {"model/w": torch.ones(3)}, world_size=1)


@given(case=cases)
def test_what_must_stay_stays(case: dict[str, object]) -> None:
    steps, scores, keep, protected = case["steps"], case["scores"], case["retention"], case["protected"]
    removed = choose_removed(steps, scores, keep, protected)
    assert removed == sorted(set(removed) & set(steps))
    assert not set(removed) & protected
    kept = sorted(set(steps) - set(removed))
    if keep.keep_last is None or not steps:
        assert not removed
        return
    assert kept[-keep.keep_last :] == sorted(steps)[-keep.keep_last :]
    if keep.keep_every is not None:
        assert not [step for step in removed if step % keep.keep_every == 0]
    if keep.keep_best is not None:
        known = {step: scores[step] for step in steps if not math.isnan(scores.get(step, math.nan))}
        best_kept = sorted((known[step] for step in kept if step in known), reverse=True)[: keep.keep_best]
        assert best_kept == sorted(known.values(), reverse=True)[: keep.keep_best]


@given(case=cases)
def test_no_more_stay_than_was_asked_for(case: dict[str, object]) -> None:
    keep, protected = case["retention"], case["protected"]
    removed = choose_removed(**case)
    if keep.keep_last is not None and keep.keep_every is None:
        most = keep.keep_last + (keep.keep_best or 0) + len(protected)
        assert len(set(case["steps"]) - set(removed)) <= most


@given(case=cases)
def test_asking_again_removes_nothing_more(case: dict[str, object]) -> None:
    removed = choose_removed(**case)
    left = [step for step in case["steps"] if step not in removed]
    assert choose_removed(left, case["scores"], case["retention"], case["protected"]) == []


def test_of_two_that_are_equally_good_the_older_stays() -> None:
    assert choose_removed([1, 2, 3, 4], {1: 0.5, 2: 0.9, 3: 0.9}, Retention(1, 1, None), set()) == [1, 3]
    assert choose_removed(range(1, 8), {}, Retention(2, None, 3), {1}) == [2, 4, 5]


@pytest.mark.parametrize(
    ("last", "mode", "score"),
    [
        ({"step": 500.0, "loss": 0.25}, "min", -0.25),
        ({"step": 500.0, "loss": 0.25}, "max", 0.25),
        ({"step": 499.0, "loss": 0.25}, "max", None),
        ({"loss": 0.25}, "max", None),
        ({"step": 500.0, "top1": 0.25}, "max", None),
        ({"step": 500.0, "loss": math.nan}, "max", None),
        ({"step": 500.0, "loss": math.inf}, "min", None),
        ({"step": 500.0, "loss": "0.25"}, "min", None),
        (None, "min", None),
    ],
)
def test_score(last: object, mode: str, score: float | None) -> None:
    state = default_state(500, 1)
    state["parts"]["trackers"]["last"] = last
    assert score_of(state, "loss", mode) == score


@pytest.mark.parametrize("state", [{}, {"step": 1, "parts": None}, {"step": 1, "parts": {"trackers": []}}])
def test_a_state_of_another_form_has_no_score(state: dict[str, object]) -> None:
    assert score_of(state, "loss", "min") is None


def test_what_has_the_name_of_a_checkpoint_is_listed(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nowhere") == []
    save(tmp_path, 1000, 20, 300)
    (tmp_path / step_name(7)).mkdir()
    (tmp_path / step_name(8)).write_text("")
    for odd in (
        "step-7",
        "step-0000000300",
        ".tmp-step-000000009",
        ".trash-step-000000010",
        "damaged-1-step-000000011",
    ):
        shutil.copytree(tmp_path / step_name(20), tmp_path / odd)
    # also without a manifest: it was lost, and verification says so aloud
    (tmp_path / step_name(20) / MANIFEST).unlink()
    assert list_checkpoints(tmp_path) == [7, 8, 20, 300, 1000]
    assert list_checkpoints(tmp_path / step_name(8)) == []


def test_what_is_put_aside_keeps_its_files_and_counts_no_more(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path, 20)
        assert put_aside(tmp_path, 20) == f"damaged-{number}-{step_name(20)}"
        assert (tmp_path / f"damaged-{number}-{step_name(20)}" / MANIFEST).exists()
    assert list_checkpoints(tmp_path) == []


def test_removed_is_gone(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    retention.remove(tmp_path, 1)
    assert os.listdir(tmp_path) == [step_name(2)]
    with pytest.raises(FileNotFoundError):
        retention.remove(tmp_path, 1)


def test_a_kill_in_between_leaves_nothing_that_looks_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2)
    synced = []

    def killed(path: Path) -> None:
        assert synced == [tmp_path]
        (path / MANIFEST).read_bytes()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention, "sync_folder", synced.append)
        patch.setattr(retention.shutil, "rmtree", killed)
        for _ in range(2):  # the second time the name of the trash is taken
            synced.clear()
            with pytest.raises(KeyboardInterrupt):
                retention.remove(tmp_path, 1)
            save(tmp_path, 1)
        synced.clear()
        with pytest.raises(KeyboardInterrupt):
            retention.remove(tmp_path, 1)
    assert list_checkpoints(tmp_path) == [2]
    assert leftovers(tmp_path) == [f".trash-{step_name(1)}" + end for end in ("", "-1", "-2")]
    sweep(tmp_path)
    assert os.listdir(tmp_path) == [step_name(2)]


def test_a_symlink_is_never_followed(tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "checkpoints"
    save(precious, 5)
    save(folder, 6)
    (folder / ".tmp-step-000000001").symlink_to(precious)
    (folder / ".trash-step-000000002").symlink_to(precious / step_name(5))
    (folder / ".tmp-step-000000003").mkdir()
    (folder / ".tmp-step-000000003" / "inside").symlink_to(precious)
    (folder / ".tmp-step-000000004").write_text("a file")
    (folder / step_name(5)).symlink_to(precious / step_name(5))
    sweep(folder)
    assert sorted(os.listdir(folder)) == [".tmp-step-000000001", ".tmp-step-000000004", ".trash-step-000000002",
                                          step_name(5), step_name(6)]  # fmt: skip
    retention.remove(folder, 5)
    assert not os.path.lexists(folder / step_name(5))
    assert list_checkpoints(precious) == [5]


def test_sweeping_nowhere_is_nothing(tmp_path: Path) -> None:
    sweep(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / ".tmp-probe").mkdir()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".tmp-probe", "other"]
