"""--on-nan: NaN or infinity on one rank is one decision of all, named, and a resume repeats it to the bit (C6, C3)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.harness import ROOT, Ended, run_ranks, run_recipe_cli
from support.planted import BASE, RECIPE, PlantedConfig, sample_at, steps_with
from support.strategy_runs import STRATEGIES, CountReads
from support.writing import rehash
from torch import Tensor

from distkit.assemble import assemble
from distkit.commands import run as distkit
from distkit.config import OPTIMIZERS, AdamW, CheckpointConfig, DDPConfig, FSDPConfig, OptimConfig, RMSprop
from distkit.engine.fit import fit
from distkit.engine.ledger import Ledger, Skip
from distkit.engine.run import Run
from distkit.engine.state import saved_tensors
from distkit.engine.train_step import train_step
from distkit.errors import NonFiniteError
from distkit.runtime import read_topology
from distkit.runtime.process import start

PLANTED = Path(__file__).parents[1] / "support" / "planted.py"
#: Offsets 4 to 7 of a global batch of 8 are rank 1's, of two.
BAD_LOSS, BAD_GRADIENT = sample_at(10, 5), sample_at(5, 6)
SAVING = CheckpointConfig(save_every=4, asynchronous="off")


def build(folder: Path | str, config: PlantedConfig) -> Run:
    config = replace(config, run_dir=Path(folder) / "run")
    return assemble(RECIPE, config, start(config, read_topology(os.environ)))


def train(folder: Path | str, config: PlantedConfig) -> tuple[str, list[tuple[int, tuple[int, ...], str]]]:
    """Train here; the digest or the error, and the ledger."""
    run = build(folder, config)
    try:
        ended = str(fit(run)["state_digest"])
    except NonFiniteError as error:
        ended = str(error)
    run.runtime.close()
    run.directory.release()
    return ended, [(skip.step, skip.ranks, skip.why) for skip in run.ledger.skips]


def command_line(folder: Path, flags: Sequence[str], fault: str = "", world_size: int = 2) -> list[Ended]:
    argv = ["--run-dir", str(folder / "run"), "--checkpoint.enabled", "--checkpoint.save-every", "4", *flags]
    env = {"DISTKIT_FAULT": fault} if fault else {}
    return run_recipe_cli(argv, folder, recipe=PLANTED, world_size=world_size, env=env)


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def status(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "run" / "status.json").read_text()))


@pytest.mark.distributed
@pytest.mark.parametrize("report_every", ["3", "10"])
def test_raise_names_the_rank_and_the_step(tmp_path: Path, report_every: str) -> None:
    flags = ["--bad-loss", str(BAD_LOSS), "--report-every", report_every]
    ended = command_line(tmp_path, flags)
    assert [rank.returncode for rank in ended] == [1, 1]
    last = ended[0].stderr.splitlines()[-1]
    assert "the loss of rank 1 became nan in step 10 (samples 72 to 79 of epoch 0)" in last
    assert f"the last good checkpoint is {tmp_path}/run/checkpoints/step-000000008" in last
    assert ended[1].stderr == ""
    cause = status(tmp_path)["cause"]
    assert isinstance(cause, dict)
    assert cause["what_happened"] == "the loss of rank 1 became nan in step 10 (samples 72 to 79 of epoch 0)"
    assert "--on-nan skip" in cause["what_to_do"]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", [pytest.param(*p.values, marks=[*p.marks, pytest.mark.slow])
                                      if isinstance(p, type(pytest.param(0))) else p for p in STRATEGIES])  # fmt: skip
def test_every_strategy_leaves_the_same_steps_out_and_names_the_rank(strategy: str, tmp_path: Path) -> None:
    config = replace(BASE, strategy=strategy, bad_loss=(BAD_LOSS,), bad_gradient=(BAD_GRADIENT,), checkpoint=SAVING,
                     ema_decay=0.9, optim=AdamW(lr=0.01), max_grad_norm=1.0)  # fmt: skip
    skipped = run_ranks(train, 2, str(tmp_path / "skip"), replace(config, on_nan="skip"))
    expected = [
        (5, (1,), "the gradients of rank 1 became nan in step 5 (samples 32 to 39 of epoch 0)"),
        (10, (1,), "the loss of rank 1 became nan in step 10 (samples 72 to 79 of epoch 0)"),
        (15, (0,), "the gradients of rank 0 became nan in step 15 (samples 16 to 23 of epoch 1)"),
    ]
    assert [ledger for _, ledger in skipped] == [expected, expected]
    told = events(tmp_path / "skip", "skip")
    assert [(line["step"], line["rank"], line["message"]) for line in told] == [(s, r[0], w) for s, r, w in expected]
    # without dropout and BatchNorm, going back and passing the steps over is the same as leaving their updates out
    back = run_ranks(train, 2, str(tmp_path / "back"), replace(config, on_nan="rollback"))
    assert back == skipped


#: Ranks, and what is not as in the test above: exchanges of another form, optimizers that wait for the decision.
WAYS: dict[str, tuple[int, dict[str, object]]] = {
    "accumulation, static graph": (2, {"microbatch_size": 1, "ddp": DDPConfig(static_graph=True)}),
    "bf16 gradients": (2, {"strategy": "ddp", "ddp": DDPConfig(bf16_gradients=True)}),
    "compiled": (2, {"compile": True, "compile_backend": "eager"}),
    "four ranks": (4, {"strategy": "ddp"}),
    "replicas of shards": (4, {"strategy": "fsdp", "fsdp": FSDPConfig(replicas=2)}),
    "offloaded": (2, {"strategy": "fsdp", "fsdp": FSDPConfig(cpu_offload=True), "microbatch_size": 2}),
    "waiting": (2, {"strategy": "fsdp", "optim": RMSprop(lr=0.01), "weighted": True}),
    "fp16": (2, {"precision": "fp16"}),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_exchange_and_to_update(way: str, tmp_path: Path) -> None:
    world_size, changes = WAYS[way]
    config = replace(BASE, bad_loss=(BAD_LOSS,), bad_gradient=(BAD_GRADIENT,), checkpoint=SAVING, ema_decay=0.9,
                     optim=AdamW(lr=0.01))  # fmt: skip
    config = replace(config, **changes)  # type: ignore[arg-type]
    skipped = run_ranks(train, world_size, str(tmp_path / "skip"), replace(config, on_nan="skip"))
    back = run_ranks(train, world_size, str(tmp_path / "back"), replace(config, on_nan="rollback"))
    assert back == skipped
    digest, ledger = skipped[0]
    assert len(digest) == 64, digest
    # fp16's scaler has its own way with gradients
    assert [step for step, _, _ in ledger] == ([10] if way == "fp16" else [5, 10, 15])
    assert all(len(ranks) == 1 for _, ranks, _ in ledger)


ON_DEVICE = {"sgd", "adam", "adamw", "adagrad"}


def optimizer(name: str) -> OptimConfig:
    kind = OPTIMIZERS[name]
    return kind(momentum=0.9, lr=0.01) if name == "sgd" else kind(lr=0.01)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", [n for n, kind in OPTIMIZERS.items() if kind.takes_dense and not kind.needs_closure])
def test_a_step_that_is_left_out_moves_nothing(name: str, tmp_path: Path) -> None:
    config = replace(BASE, on_nan="skip", bad_loss=(BAD_LOSS,), batch_norm=True, ema_decay=0.9, max_grad_norm=1.0,
                     microbatch_size=4, optim=optimizer(name))  # fmt: skip
    run = build(tmp_path, config)
    run.strategy.module.train()
    before: dict[str, Tensor] = {}
    for step in range(1, 12):
        before = {n: tensor.clone() for n, tensor in saved_tensors(run).items()}
        train_step(run)
        after = saved_tensors(run)
        same = {n for n in before if torch.equal(before[n], after[n])}
        assert (same == set(before)) == (step == 10), (step, set(before) - same)
    assert ("waits for the device" in run.facts["on_nan"]) == (name not in ON_DEVICE)
    assert any("running_mean" in n for n in before)
    assert any(n.startswith("ema/") for n in before)


@pytest.mark.parametrize("changes", [{}, {"precision": "fp16", "optim": AdamW(lr=0.01)}], ids=["fp32", "fp16"])
def test_the_decision_never_waits_for_the_device(changes: dict[str, object], tmp_path: Path) -> None:
    config = replace(BASE, on_nan="skip", bad_loss=(BAD_LOSS,), batch_norm=True, ema_decay=0.9, **changes)  # type: ignore[arg-type]
    run = build(tmp_path, config)
    run.strategy.module.train()
    train_step(run)
    with CountReads() as count:
        for _ in range(10):
            train_step(run)
    assert count.reads == 0
    assert [step for step, _ in run.guard.read()] == [10]  # type: ignore[union-attr]
    assert all(tensor.isfinite().all() for tensor in saved_tensors(run).values())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("how", ["skip", "rollback"])
@pytest.mark.parametrize("kill_at", ["12", "17"])
def test_a_resume_across_a_skip_is_exact(
    how: str, kill_at: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    # killed between saves; both bad samples come before the kill, and again after it
    folder = tmp_path / "trial"
    flags = ["--on-nan", how, "--bad-loss", str(BAD_LOSS), "--bad-gradient", str(BAD_GRADIENT), "--dropout", "0.3",
             "--noise", "0.1", "--ema-decay", "0.9", "--batch-norm", "--eval-every", "7", "--checkpoint.enabled",
             "--microbatch-size", "2", "--checkpoint.save-every", "4"]  # fmt: skip
    argv = ["verify-resume", str(PLANTED), "--nproc", "2", "--steps", "30", "--kill-at", kill_at]
    code = distkit([*argv, "--folder", str(folder), "--", *flags])
    assert code == 0, capsys.readouterr().err
    bad = steps_with((BAD_LOSS, BAD_GRADIENT), 30)
    for name in ("straight", "resumed"):
        state = json.loads((folder / name / "checkpoints" / "step-000000030" / "state.json").read_text())
        assert [skip["step"] for skip in state["parts"]["skips"]["skips"]] == bad
        lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if line["event"] == "skip"] == bad
    assert distkit(["show", str(folder / "resumed")]) == 0
    assert capsys.readouterr().out.count("skipped step") == len(bad)


@pytest.mark.distributed
def test_more_skips_than_allowed_end_the_run(tmp_path: Path) -> None:
    flags = ["--on-nan", "skip", "--max-skips", "1", "--bad-loss", str(BAD_LOSS), "--num-steps", "30"]
    ended = command_line(tmp_path, flags, world_size=1)[0]
    assert ended.returncode == 1
    again = steps_with((BAD_LOSS,), 30)[1]
    last = ended.stderr.splitlines()[-1]
    assert f"the loss became nan in step {again}" in last
    assert "after 1 that was left out (--max-skips 1)" in last
    # the same command with a higher limit continues
    assert command_line(tmp_path, [*flags[:3], "3", *flags[4:]], world_size=1)[0].returncode == 0
    assert [line["step"] for line in events(tmp_path, "skip")] == steps_with((BAD_LOSS,), 30)


@pytest.mark.distributed
def test_rollback_without_anything_saved_ends_the_run(tmp_path: Path) -> None:
    ended, ledger = train(tmp_path, replace(BASE, on_nan="rollback", bad_loss=(sample_at(2, 0),), checkpoint=SAVING))
    assert "the loss became nan in step 2" in ended
    assert "there is no checkpoint from before" in ended
    assert ledger == []


@pytest.mark.distributed
def test_a_stop_before_the_rollback_saves_nothing_bad(tmp_path: Path) -> None:
    flags = ["--on-nan", "rollback", "--bad-loss", str(sample_at(11, 5)), "--report-every", "20", "--dropout", "0.2"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    slow = "data:0:12:slow,"  # or the run is over before the signal is heard of
    ended = command_line(stopped, [*flags, "--checkpoint.save-every", "10"], fault=f"{slow}data:0:12:term")
    assert [rank.returncode for rank in ended] == [75, 75], ended[0].stderr
    assert status(stopped)["state"] == "preempted"
    assert "not saved, the loss of rank 1 became nan in step 11" in str(status(stopped)["reason"])
    digests = []
    for folder in (stopped, straight):
        assert command_line(folder, [*flags, "--checkpoint.save-every", "10"])[0].returncode == 0
        digests.append(json.loads((folder / "run" / "summary.json").read_text())["state_digest"])
    assert digests[0] == digests[1]


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", ["on", "off"])
def test_weights_that_are_not_finite_are_never_saved(asynchronous: str, tmp_path: Path) -> None:
    flags = ["--explode-at", "12", "--report-every", "20", "--checkpoint.async", asynchronous]
    ended = command_line(tmp_path, flags)
    assert [rank.returncode for rank in ended] == [1, 1]
    last = ended[0].stderr.splitlines()[-1]
    assert f"the last good checkpoint is {tmp_path}/run/checkpoints/step-000000008" in last
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000000004", "step-000000008"]
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    assert "NaN or infinite" in str(events(tmp_path, "checkpoint")[-1]["error"])


@pytest.mark.distributed
def test_the_final_weights_are_finite_or_not_written(tmp_path: Path) -> None:
    config = replace(BASE, explode_at=20, report_every=20, checkpoint=CheckpointConfig(enabled=False))
    ended, _ = train(tmp_path, config)
    assert "model/0.weight is not finite after step 20" in ended
    assert not (tmp_path / "run" / "weights.safetensors").exists()


@pytest.mark.distributed
def test_rollback_leaves_out_the_step_that_lost_the_weights(tmp_path: Path) -> None:
    config = replace(BASE, explode_at=11, checkpoint=SAVING)
    for folder, changes in (("report", {}), ("save", {"num_steps": 11, "report_every": 11})):
        ended, ledger = train(tmp_path / folder, replace(config, on_nan="rollback", **changes))  # type: ignore[arg-type]
        assert [step for step, _, _ in ledger] == [11], ended
        assert "NaN or infinite in step 11 (samples 80 to 87 of epoch 0)" in ledger[0][2]
    ended, ledger = train(tmp_path / "skip", replace(config, on_nan="skip"))
    assert "model/0.weight is not finite after step 11" in ended
    assert ledger == []


@pytest.mark.distributed
def test_a_nan_in_an_evaluation_is_named_with_its_rank(tmp_path: Path) -> None:
    flags = ["--bad-test", "30", "--eval-every", "10", "--eval-batch-size", "4"]
    assert [rank.returncode for rank in command_line(tmp_path, flags)] == [0, 0]
    lines = events(tmp_path, "eval")
    assert [line["nonfinite_ranks"] for line in lines] == ["1", "1"]
    assert [line["nonfinite"] for line in lines] == [["loss"], ["loss"]]
    notes = [str(note["message"]) for note in events(tmp_path, "note")]
    assert "not finite in this evaluation: loss of rank 1 is nan (samples 30 to 33 of the test set)" in notes


def test_the_ledger_survives_its_state() -> None:
    ledger = Ledger()
    first = Skip(step=3, ranks=(1,), first=16, last=23, why="because", rolled_back=False)
    ledger.add([first, replace(first, step=9, ranks=(), rolled_back=True)])
    other = Ledger()
    other.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert other == ledger
    assert other.passed_over == {9}
    assert 3 in other
    assert 4 not in other


def test_a_checkpoint_without_a_ledger_has_an_empty_one(tmp_path: Path) -> None:
    config = replace(BASE, checkpoint=SAVING, num_steps=8)
    train(tmp_path, config)
    directory = tmp_path / "run" / "checkpoints" / "step-000000008"
    state = json.loads((directory / "state.json").read_text())
    assert state["parts"].pop("skips") == {"skips": []}
    (directory / "state.json").write_text(json.dumps(state))
    rehash(directory, "state.json")
    # more steps, so that there is something to resume
    run = build(tmp_path, replace(config, num_steps=10))
    assert fit(run)["step"] == 10
    assert run.ledger.skips == []
