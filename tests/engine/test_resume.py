"""Exact resume: saved, built anew, restored, trained on: the same bits as without (C3)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.harness import run_ranks
from support.tiny import BASE, TinyConfig, build_run
from torch import Tensor, nn

from distkit.assemble import assemble
from distkit.checkpoint.format import step_name
from distkit.checkpoint.restore import VerifiedCheckpoint
from distkit.checkpoint.retention import list_checkpoints
from distkit.config import LBFGS, AdamW, CheckpointConfig, Plateau, ResumeConfig
from distkit.engine.fit import fit
from distkit.engine.run import Run
from distkit.engine.state import snapshot
from distkit.errors import CheckpointError, ConfigError
from distkit.losses import LossOutput
from distkit.runtime import Topology
from distkit.runtime.process import start

SAVING = CheckpointConfig(save_every=7, keep_last=None, keep_best=None)
FULL = replace(
    BASE, dropout=0.2, noise=0.1, batch_norm=True, weighted=True, ema_decay=0.9, eval_every=6, microbatch_size=2,
    max_grad_norm=0.5, checkpoint=SAVING,
)  # fmt: skip
TIMED = {"samples_per_second", "data_wait_seconds", "seconds", "train_seconds", "mfu"}


def lines(run_dir: Path) -> list[dict[str, object]]:
    """train and eval events without times."""
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in event.items() if k not in TIMED} for event in events if event["event"] in ("train", "eval")
    ]


def train(folder: Path, config: TinyConfig) -> Run:
    run = build_run(folder, config)
    try:
        fit(run)
    finally:
        run.directory.release()
    return run


def stop_at(folder: Path, config: TinyConfig, step: int) -> None:
    """A run that dies in the step after `step`."""
    run = build_run(folder, config)
    compute_loss = run.compute_loss

    def dying(model: object, batch: object) -> object:
        if run.progress.step == step:
            raise KeyboardInterrupt
        return compute_loss(model, batch)

    run = replace(run, compute_loss=dying)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(run)
    finally:
        run.directory.release()


def everything(run: Run) -> dict[str, torch.Tensor]:
    taken = snapshot(run)
    return {**taken.shared, **taken.own}


def assert_same(first: Run, second: Run) -> None:
    one, other = everything(first), everything(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert lines(first.directory.path) == lines(second.directory.path)


CONFIGS = {
    "all at once": FULL,
    "behind": replace(FULL, checkpoint=replace(SAVING, asynchronous="on")),
    "in the step": replace(FULL, checkpoint=replace(SAVING, asynchronous="off")),
    "fp16": replace(FULL, precision="fp16", optim=AdamW(lr=0.01)),
    "plateau": replace(FULL, eval_every=2,
                       schedule=Plateau(patience=0, threshold=0.5, gamma=0.5)),
    "lbfgs": replace(BASE, optim=LBFGS(lr=0.1), checkpoint=SAVING),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("step", [3, 9, 17])
def test_a_run_that_died_ends_as_the_one_that_did_not(name: str, step: int, tmp_path: Path) -> None:
    config = CONFIGS[name]
    straight = train(tmp_path / "straight", config)
    stop_at(tmp_path / "killed", config, step)
    resumed = build_run(tmp_path / "killed", config)
    assert (resumed.resume.checkpoint.manifest.step if resumed.resume.checkpoint else 0) == step // 7 * 7
    fit(resumed)
    resumed.directory.release()
    assert_same(straight, resumed)
    summaries = [json.loads((r.directory.path / "summary.json").read_text()) for r in (straight, resumed)]
    assert summaries[0]["state_digest"] == summaries[1]["state_digest"]
    assert json.loads((resumed.directory.path / "status.json").read_text())["attempt"] == 2


def trajectory(folder: str, config: TinyConfig, die_at: int | None) -> tuple[list[dict[str, object]], str]:
    """On every rank: train (or die), return the metric lines and the digest."""
    from distkit.checkpoint.digest import state_digest

    run = build_run(Path(folder), config)
    if die_at is not None:
        while run.progress.step < die_at:
            from distkit.engine.train_step import train_step

            train_step(run)
    summary = fit(run)
    digest = state_digest(run.learned_tensors())
    run.directory.release()
    run.runtime.close()
    assert summary["state_digest"] == digest
    return (lines(Path(folder) / "run") if int(os.environ.get("RANK", "0")) == 0 else []), digest


def saved_then_killed(folder: str, config: TinyConfig, step: int) -> str:
    """On every rank: train `step` steps, save, and leave; the digest at that moment."""
    from distkit.checkpoint.digest import state_digest
    from distkit.engine.fit import opened, report, report_evaluation
    from distkit.engine.save import report_saves, save
    from distkit.engine.train_step import due, train_step

    run = build_run(Path(folder), config)
    with opened(run):
        while run.progress.step < step:
            train_step(run)
            if due(config.report_every, run.progress.step, run.num_steps):
                report(run)
            if due(config.eval_every, run.progress.step, run.num_steps):
                report_evaluation(run)
        save(run)
        report_saves(run, wait=True)
    digest = state_digest(run.learned_tensors())
    run.directory.release()
    run.runtime.close()
    return digest


def digest_when_restored(folder: str, config: TinyConfig) -> str:
    from distkit.checkpoint.digest import state_digest
    from distkit.engine.resume import restore

    run = build_run(Path(folder), config)
    assert run.resume.checkpoint is not None
    restore(run, run.resume.checkpoint)
    digest = state_digest(run.learned_tensors())
    run.directory.release()
    run.runtime.close()
    return digest


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_another_world_size_reads_the_same_samples_and_loses_alike(world_size: int, tmp_path: Path) -> None:
    config = replace(BASE, global_batch_size=24, noise=0.1, ema_decay=0.9, weighted=True, checkpoint=SAVING,
                     eval_every=10, optim=AdamW(lr=0.02))  # fmt: skip
    straight = run_ranks(trajectory, 4, str(tmp_path / "straight"), config, None)[0][0]
    saved = run_ranks(saved_then_killed, 4, str(tmp_path / "moved"), config, 12)
    assert len(set(saved)) == 1
    restored = run_ranks(digest_when_restored, world_size, str(tmp_path / "moved"), config)
    assert set(restored) == set(saved)
    moved = run_ranks(trajectory, world_size, str(tmp_path / "moved"), config, None)[0][0]
    assert [line["step"] for line in moved] == [line["step"] for line in straight]
    for one, other in zip(straight, moved, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["samples"] == other["samples"]
    text = (tmp_path / "moved" / "run" / "metrics.jsonl").read_text()
    assert f"saved on 4 ranks, resumed on {world_size}" in text


@pytest.mark.distributed
def test_three_ranks_resume_to_the_bit(tmp_path: Path) -> None:
    config = replace(FULL, global_batch_size=24, microbatch_size=4)
    straight = run_ranks(trajectory, 3, str(tmp_path / "straight"), config, None)
    run_ranks(saved_then_killed, 3, str(tmp_path / "killed"), config, 7)
    resumed = run_ranks(trajectory, 3, str(tmp_path / "killed"), config, None)
    assert [digest for _, digest in straight] == [digest for _, digest in resumed]


def test_a_finished_run_says_so_and_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path, FULL)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = build_run(tmp_path, FULL)
    again.directory.release()
    assert again.finished
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before.keys() - after.keys() <= {tmp_path / "run" / "lease.json"}
    assert all(before[path] == after[path] for path in after if path.name != "lease.json")


def test_more_steps_go_on_with_a_finished_run(tmp_path: Path) -> None:
    train(tmp_path, FULL)
    longer = build_run(tmp_path, replace(FULL, num_steps=30))
    assert not longer.finished
    fit(longer)
    longer.directory.release()
    assert longer.progress.step == 30
    text = (longer.directory.path / "metrics.jsonl").read_text()
    assert "num_steps 20 -> 30" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed 0"),
        ({"global_batch_size": 16}, "global_batch_size 8"),
        ({"batch_norm": False}, "unexpected in the checkpoint: ema/1."),
        ({"ema_decay": None}, "unexpected in the checkpoint: ema/"),
        ({"precision": "fp16"}, "missing in the checkpoint: scaler/"),
        ({"optim": AdamW(lr=0.1)}, "AdamW"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change: dict[str, object], named: str, tmp_path: Path) -> None:
    stop_at(tmp_path, FULL, 9)
    config_before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="checkpoint") as caught:
        build_run(tmp_path, replace(FULL, **change))
    assert named in str(caught.value)
    assert str(caught.value).count("\n") < 9
    assert (tmp_path / "run" / "config.json").read_bytes() == config_before
    fit(build_run(tmp_path, FULL))  # nothing of it was changed, and no lease is left


def test_never_refuses_a_directory_with_a_run(tmp_path: Path) -> None:
    train(tmp_path, FULL)
    with pytest.raises(ConfigError, match="already holds a run"):
        build_run(tmp_path, replace(FULL, resume=ResumeConfig(source="never")))


@pytest.mark.parametrize("form", ["run", "checkpoints", "step"])
def test_begin_from_another_run(form: str, tmp_path: Path) -> None:
    straight = train(tmp_path / "first", FULL)
    folder = tmp_path / "first" / "run"
    source = {"run": folder, "checkpoints": folder / "checkpoints", "step": folder / "checkpoints" / step_name(7)}[form]
    config = replace(FULL, resume=ResumeConfig(source=str(source)))
    stop_at(tmp_path / "second", config, 20 if form != "step" else 15) if form == "step" else None
    second = build_run(tmp_path / "second", config)
    assert second.resume.checkpoint is not None
    # its own checkpoints go before the source, so that the same command goes on after a kill
    assert second.resume.checkpoint.manifest.step == (14 if form == "step" else 20)
    fit(second)
    second.directory.release()
    assert all(torch.equal(t, everything(straight)[n]) for n, t in everything(second).items() if "rng" not in n)


@pytest.mark.parametrize("source", ["nowhere", "runs/none/step-000000500"])
def test_a_source_without_checkpoints_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        build_run(tmp_path, replace(FULL, resume=ResumeConfig(source=str(tmp_path / source))))
    assert list(tmp_path.iterdir()) == []


def test_weights_only_takes_what_fits_and_starts_at_step_0(tmp_path: Path) -> None:
    first = train(tmp_path / "first", FULL)
    source = str(tmp_path / "first" / "run")
    config = replace(FULL, batch_norm=False, seed=5, optim=AdamW(lr=0.01),
                     resume=ResumeConfig(source=source, weights_only=True))  # fmt: skip
    second = build_run(tmp_path / "second", config)
    from distkit.engine.resume import restore

    assert second.resume.checkpoint is not None
    restore(second, second.resume.checkpoint)
    assert second.progress.step == 0
    assert torch.equal(second.model_tensors()["0.weight"], first.model_tensors()["0.weight"])
    assert second.ema is not None
    assert torch.equal(second.ema.shadow["0.weight"], first.model_tensors()["0.weight"])
    second.directory.release()


def test_falls_back_loudly_and_puts_the_damaged_one_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = train(tmp_path / "straight", FULL)
    stop_at(tmp_path / "killed", FULL, 17)
    folder = tmp_path / "killed" / "run" / "checkpoints"
    shard = next((folder / step_name(14)).glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    resumed = build_run(tmp_path / "killed", FULL)
    assert resumed.resume.checkpoint is not None
    assert resumed.resume.checkpoint.manifest.step == 7
    assert "step 14 failed verification" in capsys.readouterr().err
    assert list_checkpoints(folder) == [7]
    assert [path.name for path in folder.glob("damaged-*")] == ["damaged-1-step-000000014"]
    fit(resumed)
    resumed.directory.release()
    assert_same(straight, resumed)


def test_refuses_to_start_anew_when_nothing_verifies(tmp_path: Path) -> None:
    stop_at(tmp_path, FULL, 17)
    for shard in (tmp_path / "run" / "checkpoints").rglob("shard-*"):
        os.truncate(shard, 100)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        build_run(tmp_path, FULL)


def test_keeps_the_last_the_best_and_milestones(tmp_path: Path) -> None:
    config = replace(
        FULL, eval_every=2, checkpoint=CheckpointConfig(save_every=3, keep_last=2, keep_best=1, keep_every=6)
    )
    run = train(tmp_path, config)
    steps = list_checkpoints(run.directory.checkpoints)
    assert run.trackers.best is not None
    assert steps == sorted({18, 20, 6, 12, int(run.trackers.best["step"])} | {18})


def test_another_kind_of_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(tmp_path, FULL, 9)

    class Place:
        def state_dict(self) -> dict[str, object]:
            return {}

    from distkit.engine import resume

    check = resume.check_fits

    def with_a_place(run: Run, found: VerifiedCheckpoint) -> None:
        check(replace(run, data_state=Place()), found)  # type: ignore[arg-type]

    monkeypatch.setattr(resume, "check_fits", with_a_place)
    with pytest.raises(ConfigError, match="a different kind of data"):
        build_run(tmp_path, FULL)


def test_a_checkpoint_that_lost_its_manifest_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_at(tmp_path, FULL, 17)
    folder = tmp_path / "run" / "checkpoints"
    (folder / step_name(14) / "MANIFEST.json").unlink()
    run = build_run(tmp_path, FULL)
    run.directory.release()
    assert run.resume.checkpoint is not None
    assert run.resume.checkpoint.manifest.step == 7
    assert "missing file MANIFEST.json" in capsys.readouterr().err
    assert (folder / "damaged-1-step-000000014").is_dir()


def test_a_completed_run_without_checkpoints_is_not_begun_again(tmp_path: Path) -> None:
    without = replace(FULL, checkpoint=CheckpointConfig(enabled=False))
    train(tmp_path, without)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = build_run(tmp_path, without)
    again.directory.release()
    assert again.finished
    with pytest.raises(ConfigError, match="no checkpoint to continue from"):
        build_run(tmp_path, replace(without, num_steps=30))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_checkpoints_without_a_configuration_are_a_run_all_the_same(tmp_path: Path) -> None:
    train(tmp_path, FULL)
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ConfigError, match="already holds a run"):
        build_run(tmp_path, replace(FULL, resume=ResumeConfig(source="never")))


def test_a_completed_run_whose_checkpoints_are_damaged_is_still_finished(tmp_path: Path) -> None:
    train(tmp_path, FULL)
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/MANIFEST.json"):
        manifest.write_text("{")
    again = build_run(tmp_path, FULL)
    again.directory.release()
    assert again.finished
    with pytest.raises(ConfigError, match="no checkpoint to continue from"):
        build_run(tmp_path, replace(FULL, num_steps=30))


def test_a_run_that_saved_nothing_begins_again_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_at(tmp_path, FULL, 3)
    run = build_run(tmp_path, FULL)
    run.directory.release()
    assert run.resume.checkpoint is None
    assert "has saved nothing: starting again at step 0" in capsys.readouterr().err


def test_a_run_is_not_rolled_back_to_its_own_older_checkpoint(tmp_path: Path) -> None:
    stop_at(tmp_path, FULL, 17)
    older = tmp_path / "run" / "checkpoints" / step_name(7)
    with pytest.raises(ConfigError, match="continues from step 14"):
        build_run(tmp_path, replace(FULL, resume=ResumeConfig(source=str(older))))


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    stop_at(tmp_path, FULL, 17)
    with pytest.raises(ConfigError, match="beyond the end of this run"):
        build_run(tmp_path, replace(FULL, num_steps=10))


@pytest.mark.parametrize("change", [
    lambda state: state.update(config=3),
    lambda state: state["parts"].pop("optimizer"),
    lambda state: state["parts"]["optimizer"].update(groups=3),
    lambda state: state["parts"].pop("trackers"),
    lambda state: state["parts"]["trackers"].pop("best"),
    lambda state: state["parts"]["progress"].update(step=3),
    lambda state: state.update(step=3),
    lambda state: state.update(ranks=[]),
])  # fmt: skip
def test_a_malformed_state_is_named_in_one_line(change: Callable[[Any], object], tmp_path: Path) -> None:
    from support.writing import rehash

    stop_at(tmp_path, FULL, 9)
    directory = tmp_path / "run" / "checkpoints" / step_name(7)
    state = json.loads((directory / "state.json").read_text())
    change(state)
    (directory / "state.json").write_text(json.dumps(state))
    rehash(directory, "state.json")
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        fit(build_run(tmp_path, FULL))
    assert str(directory) in str(caught.value)
    assert str(caught.value).count("\n") < 9


def test_an_old_checkpoint_that_cannot_be_read_keeps_no_other(tmp_path: Path) -> None:
    config = replace(FULL, checkpoint=CheckpointConfig(save_every=4, keep_last=1, keep_best=1))
    stop_at(tmp_path, config, 9)
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / step_name(8), folder / step_name(4), dirs_exist_ok=True)
    (folder / step_name(4) / "state.json").write_text("garbage")
    train(tmp_path, config)
    assert step_name(4) not in {path.name for path in folder.iterdir()}


class Broken(RuntimeError):
    """What the recipe's author has got wrong in evaluations."""


def test_an_evaluation_that_fails_at_the_end_loses_nothing(tmp_path: Path) -> None:
    config = replace(FULL, eval_every=None, checkpoint=CheckpointConfig(), run_dir=tmp_path / "run")
    broken = [False]

    def compute_loss(config: TinyConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        if broken[0] and not torch.is_grad_enabled():
            raise Broken
        return tiny.compute_loss(config, model, batch)

    recipe = replace(tiny.RECIPE, compute_loss=compute_loss)
    run = assemble(recipe, config, start(config, Topology()))
    broken[0] = True
    with pytest.raises(Broken):
        fit(run)
    run.directory.release()
    broken[0] = False
    again = assemble(recipe, config, start(config, Topology()))
    assert again.resume.own_step == config.num_steps
    last = fit(again)["last"]
    assert isinstance(last, dict)
    assert last["step"] == config.num_steps
    straight = build_run(tmp_path / "straight", replace(config, run_dir=None))
    fit(straight)
    assert_same(straight, again)


def test_a_resume_with_another_best_metric_says_so(tmp_path: Path) -> None:
    schedule = Plateau(metric="correct", metric_mode="max")
    config = replace(FULL, num_steps=8, eval_every=4, checkpoint=CheckpointConfig(save_every=4), schedule=schedule,
                     run_dir=tmp_path / "run")  # fmt: skip
    run = assemble(tiny.RECIPE, config, start(config, Topology()))
    fit(run)
    run.directory.release()
    more = replace(config, num_steps=12, schedule=Plateau(metric="loss"))
    again = assemble(replace(tiny.RECIPE, best=("loss", "min")), more, start(more, Topology()))
    best = fit(again)["best"]
    assert isinstance(best, dict)
    assert best["step"] == 12
    events = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    notes = [line["message"] for line in events if line["event"] == "note"]
    assert any("chosen by loss (min), and was by correct (max)" in note for note in notes)
    assert any("follows loss, and followed correct (max)" in note for note in notes)
