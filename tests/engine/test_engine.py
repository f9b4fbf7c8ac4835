"""One step and the loop: however a batch is cut, the same samples and updates (C1, C2), and no waiting (C5)."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny
from support.harness import run_ranks
from support.strategy_runs import CountReads
from support.tiny import BASE, NUM_TEST, NUM_TRAIN, TinyConfig, Vectors, build_run
from torch import Tensor, nn

from distkit.assemble import assemble
from distkit.config import LBFGS, SGD, AdamW, Constant, Plateau, Split
from distkit.data import SampleStream
from distkit.data.reading.fetchers import Batches
from distkit.data.reading.loader import EvaluationLoader
from distkit.engine.evaluate import evaluate, rank_range
from distkit.engine.fit import fit
from distkit.engine.run import Best, Run, Trackers
from distkit.engine.train_step import due, train_step
from distkit.errors import ConfigError, NonFiniteError, TrainingError
from distkit.losses import LossOutput
from distkit.runtime import Topology, read_topology
from distkit.runtime.process import start


def lines(run: Run, event: str) -> list[dict[str, float]]:
    text = (run.directory.path / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]


def outcome(folder: str, config: TinyConfig) -> dict[str, object]:
    """Train here; what a test wants to compare."""
    run = build_run(folder, config)
    dataset = run.loader.fetcher._make.dataset  # type: ignore[attr-defined]
    assert isinstance(dataset, Vectors)
    dataset.read.clear()
    summary = fit(run)
    answer = {
        "read": [indices.tolist() for indices in dataset.read],
        "weights": {name: p.detach().clone() for name, p in run.strategy.module.named_parameters()},
        "buffers": {name: b.clone() for name, b in run.strategy.module.named_buffers()},
        "digest": summary["state_digest"],
        "last": summary["last"],
        "strategy": run.strategy.name,
    }
    if run.runtime.is_main_process:
        answer["train"] = lines(run, "train")
    run.runtime.close()
    return answer


def test_due() -> None:
    assert [step for step in range(1, 11) if due(4, step, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(None, step, 10)] == [10]


SPLITS = [(1, 1), (1, 8), (2, 4), (4, 2), (8, 1)]


def split_config(world_size: int, accum_steps: int, **changes: object) -> TinyConfig:
    micro = BASE.global_batch_size // world_size // accum_steps
    return replace(BASE, microbatch_size=micro, **changes)  # type: ignore[arg-type]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_every_split_reads_the_same_batches_and_ends_with_the_same_weights(tmp_path: Path, weighted: bool) -> None:
    reference = None
    for world_size, accum_steps in SPLITS:
        config = split_config(world_size, accum_steps, weighted=weighted, noise=0.1, max_grad_norm=0.5)
        folder = str(tmp_path / f"{world_size}x{accum_steps}")
        ranks = run_ranks(outcome, world_size, folder, config)
        assert ranks[0]["strategy"] == ("single" if world_size == 1 else "ddp")
        stream = SampleStream(config.seed, NUM_TRAIN, config.global_batch_size)
        for step in range(config.num_steps or 0):
            read = [ranks[r]["read"][step * accum_steps + a] for a in range(accum_steps) for r in range(world_size)]
            assert [index for part in read for index in part] == stream.global_batch(step).tolist()
        assert len({rank["digest"] for rank in ranks}) == 1
        reference = reference or ranks[0]
        for name, weight in reference["weights"].items():
            torch.testing.assert_close(ranks[0]["weights"][name], weight, atol=1e-6, rtol=0)
        for mine, theirs in zip(ranks[0]["train"], reference["train"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
            assert mine["correct"] == theirs["correct"]
            assert mine["samples"] == theirs["samples"] == 40
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ranks[0]["last"]["correct"] == reference["last"]["correct"]


def test_training_is_the_loop_by_hand(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    model = nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Tanh(), nn.Dropout(0), nn.Linear(8, 4))
    model.load_state_dict(run.strategy.module.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    stream, data = SampleStream(0, NUM_TRAIN, 8), Vectors("train", 0.0)
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * run.schedule(step)
        rows = torch.from_numpy(stream.global_batch(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.inputs[rows]), data.labels[rows]).backward()
        optimizer.step()
    fit(run)
    for mine, theirs in zip(run.strategy.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_the_same_seed_gives_the_same_digest_and_another_seed_another(tmp_path: Path) -> None:
    config = replace(BASE, dropout=0.3, noise=0.1, batch_norm=True, ema_decay=0.9)
    first = fit(build_run(tmp_path / "a", config))["state_digest"]
    second = fit(build_run(tmp_path / "b", config))["state_digest"]
    other = fit(build_run(tmp_path / "c", replace(config, seed=1)))["state_digest"]
    assert first == second != other


@pytest.mark.parametrize(
    "config",
    [
        BASE,
        replace(BASE, microbatch_size=2, weighted=True, max_grad_norm=1.0, ema_decay=0.99),
        replace(BASE, max_grad_value=0.1, precision="bf16"),
        replace(BASE, precision="fp16", max_grad_norm=1.0, optim=AdamW(lr=0.01)),
    ],
    ids=["plain", "weighted-accumulated-clipped-ema", "value-bf16", "fp16"],
)
def test_a_step_never_waits_for_the_device(tmp_path: Path, config: TinyConfig) -> None:
    run = build_run(tmp_path, config)
    run.strategy.module.train()
    train_step(run)
    with CountReads() as count:
        for _ in range(3):
            train_step(run)
    assert count.reads == 0


def test_reports_are_due_and_complete(tmp_path: Path) -> None:
    run = build_run(tmp_path, replace(BASE, eval_every=10, num_steps=22))
    fit(run)
    train, evals = lines(run, "train"), lines(run, "eval")
    assert [line["step"] for line in train] == [5, 10, 15, 20, 22]
    assert [line["step"] for line in evals] == [10, 20, 22]
    for line in train:
        assert {"loss", "lr", "grad_norm", "samples", "samples_per_second", "data_wait_seconds"} <= line.keys()
        assert line["lr"] == pytest.approx(0.2 * run.schedule(int(line["step"]) - 1))
    assert [line["samples"] for line in train] == [40, 40, 40, 40, 16]
    assert all(line["samples"] == NUM_TEST for line in evals)


def test_the_run_directory_says_what_happened(tmp_path: Path) -> None:
    run = build_run(tmp_path, replace(BASE, eval_every=5, ema_decay=0.9))
    fit(run)
    run.directory.release()
    folder = run.directory.path
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "config.json", "environment.json", "status.json", "attempts.jsonl", "summary.json", "metrics.jsonl",
        "weights.safetensors", "ema.safetensors", "recipe",
    }  # fmt: skip
    status, summary = (json.loads((folder / name).read_text()) for name in ("status.json", "summary.json"))
    told = {"state": "completed", "step": 20, "num_steps": 20, "reason": None, "retryable": None, "cause": None,
            "attempt": 1, "exit_code": 0}  # fmt: skip
    assert told.items() <= status.items()
    evals = lines(run, "eval")
    assert summary["best"]["correct"] == max(line["correct"] for line in evals)
    assert summary["last"]["loss"] == evals[-1]["loss"]
    assert len(summary["state_digest"]) == 64


def test_weights_file_loads_into_the_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = build_run(tmp_path, replace(BASE, batch_norm=True))
    fit(run)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0), nn.Linear(8, 4))
    model.load_state_dict(load_file(run.directory.path / "weights.safetensors"))
    assert torch.equal(model[0].weight, run.strategy.module[0].weight)  # type: ignore[index]


def test_a_nan_loss_ends_the_run_and_is_named(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    run.strategy.module[0].weight.data[0, 0] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match=r"the loss became nan in step 1 \(samples 0 to 7 of epoch 0\)"):
        fit(run)
    status = json.loads((run.directory.path / "status.json").read_text())
    assert status["state"] == "failed"
    assert "the loss became nan" in status["reason"]
    assert lines(run, "train")[0]["nonfinite"]


def test_fp16_skips_an_update_and_counts_it(tmp_path: Path) -> None:
    run = build_run(tmp_path, replace(BASE, precision="fp16", num_steps=6))
    before = [p.detach().clone() for p in run.strategy.module.parameters()]
    honest = run.compute_loss

    def overflow(model: nn.Module, batch: object) -> LossOutput:
        output = honest(model, batch)  # type: ignore[arg-type]
        return replace(output, loss=output.loss * 1e30) if run.progress.step == 0 else output

    run = replace(run, compute_loss=overflow)
    train_step(run)
    assert run.strategy.skipped.item() == 1
    assert all(torch.equal(p, old) for p, old in zip(run.strategy.module.parameters(), before, strict=True))
    run.meter.reduce()
    fit(run)
    assert lines(run, "train")[-1]["skipped_updates"] == 1
    assert lines(run, "train")[-1]["loss_scale"] == 2.0**15
    assert not torch.equal(next(run.strategy.module.parameters()), before[0])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_like_fp32(tmp_path: Path, precision: str) -> None:
    config = replace(BASE, num_steps=200)
    exact = fit(build_run(tmp_path / "fp32", config))
    low = fit(build_run(tmp_path / precision, replace(config, precision=precision)))  # type: ignore[arg-type]
    assert low["last"]["loss"] == pytest.approx(exact["last"]["loss"], abs=0.05)  # type: ignore[index]


def test_clipping_by_norm_and_by_value(tmp_path: Path) -> None:
    free = build_run(tmp_path / "free")
    by_norm = build_run(tmp_path / "norm", replace(BASE, max_grad_norm=1e-3))
    by_value = build_run(tmp_path / "value", replace(BASE, max_grad_value=1e-4))
    for run in (free, by_norm, by_value):
        train_step(run)
    norm = torch.cat([p.grad.flatten() for p in by_norm.strategy.module.parameters()]).norm()  # type: ignore[union-attr]
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)
    expected = torch.cat([p.grad.flatten() for p in free.strategy.module.parameters()]).norm()  # type: ignore[union-attr]
    assert by_norm.meter.grad_norm is not None
    assert by_norm.meter.grad_norm.item() == pytest.approx(expected.item())
    for mine, raw in zip(by_value.strategy.module.parameters(), free.strategy.module.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, raw.grad.clamp(-1e-4, 1e-4))  # type: ignore[union-attr]


def test_lbfgs_trains_through_a_closure(tmp_path: Path) -> None:
    optim = LBFGS(lr=0.5, line_search="strong_wolfe", max_iter=5)
    config = replace(BASE, optim=optim, global_batch_size=NUM_TRAIN, schedule=Constant())
    run = build_run(tmp_path, config)
    fit(run)
    losses = [line["loss"] for line in lines(run, "train")]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.distributed
def test_lbfgs_ranks_stay_together(tmp_path: Path) -> None:
    optim = LBFGS(lr=0.5, max_iter=4)
    config = replace(BASE, optim=optim, num_steps=3, schedule=Constant())
    one = run_ranks(outcome, 1, str(tmp_path / "one"), config)[0]
    two = run_ranks(outcome, 2, str(tmp_path / "two"), config)
    for name, weight in one["weights"].items():
        # a quasi-Newton step divides by differences of gradients, which magnifies their rounding
        torch.testing.assert_close(two[0]["weights"][name], weight, atol=1e-4, rtol=0)
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name])


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"optim": LBFGS(lr=1.0), "max_grad_norm": 1.0}, "--max-grad-norm None"),
        ({"precision": "tf32"}, "--precision fp32"),
        ({"global_batch_size": NUM_TRAIN + 1}, "--global-batch-size 96"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, object], flag: str
) -> None:
    with pytest.raises(ConfigError, match=flag):
        build_run(tmp_path, replace(BASE, **changes))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_plateau_lowers_the_rate_when_nothing_improves(tmp_path: Path) -> None:
    schedule = Plateau(patience=0, gamma=0.5, threshold=10.0)
    run = build_run(tmp_path, replace(BASE, schedule=schedule, eval_every=5))
    fit(run)
    rates = [line["lr"] for line in lines(run, "train")]
    assert rates[0] == pytest.approx(0.2)
    assert rates[-1] < rates[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("num_samples", [1, 7, 64, 1000])
def test_rank_ranges_cover_every_sample_once(num_samples: int, world_size: int) -> None:
    ranges = [rank_range(num_samples, rank, world_size) for rank in range(world_size)]
    assert [index for part in ranges for index in part] == list(range(num_samples))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_evaluation_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    run = build_run(tmp_path, replace(BASE, batch_norm=True, dropout=0.5, ema_decay=0.9, eval_batch_size=5))
    module = run.strategy.module
    module.train()
    module[1].eval()  # type: ignore[index]  # a frozen norm stays frozen
    train_step(run)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    rng = torch.get_rng_state()
    assert run.test_loader is not None
    means = evaluate(run, run.test_loader)
    assert means.samples == NUM_TEST
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert module.training
    assert not module[1].training  # type: ignore[index]


def evaluated(folder: str, config: TinyConfig) -> tuple[float, float]:
    run = build_run(folder, config)
    assert run.test_loader is not None
    means = evaluate(run, run.test_loader)
    run.runtime.close()
    return means.loss, means.metrics["correct"]


@pytest.mark.distributed
def test_evaluation_is_exact_over_any_number_of_ranks(tmp_path: Path) -> None:
    config = replace(BASE, global_batch_size=24, eval_batch_size=4, weighted=True)
    (loss, correct), *_ = run_ranks(evaluated, 1, str(tmp_path / "1"), config)
    for world_size in (2, 3):
        for other_loss, other_correct in run_ranks(evaluated, world_size, str(tmp_path / str(world_size)), config):
            assert other_correct == correct
            assert other_loss == pytest.approx(loss, rel=1e-6)


def test_evaluation_that_misses_samples_is_an_error(tmp_path: Path) -> None:
    run = build_run(tmp_path)

    class Repeats(EvaluationLoader):
        def open(self, samples: range, size: int) -> Batches:
            return super().open(range(samples.start, samples.stop + 1), size)

    assert run.test_loader is not None
    short = Repeats(run.test_loader.fetcher, NUM_TEST - 1)
    with pytest.raises(TrainingError, match="37 samples of 36"):
        evaluate(run, short)


@pytest.mark.distributed
def test_buffers_of_all_ranks_end_equal(tmp_path: Path) -> None:
    config = replace(BASE, batch_norm=True)
    first, second = run_ranks(outcome, 2, str(tmp_path), config)
    for name, buffer in first["buffers"].items():
        assert torch.equal(buffer, second["buffers"][name])
    assert first["digest"] == second["digest"]


def averaged(folder: str, config: TinyConfig) -> tuple[float, dict[str, Tensor]]:
    run = build_run(folder, config)
    summary = fit(run)
    assert run.ema is not None
    shadow = {name: tensor.clone() for name, tensor in run.ema.shadow.items()}
    run.runtime.close()
    return summary["last"]["loss"], shadow  # type: ignore[index]


@pytest.mark.distributed
def test_averaged_batch_norm_statistics_are_the_same_on_every_rank(tmp_path: Path) -> None:
    config = replace(BASE, batch_norm=True, ema_decay=0.9)
    (loss, first), (other_loss, second) = run_ranks(averaged, 2, str(tmp_path), config)
    assert loss == other_loss
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.distributed
def test_a_rank_without_a_test_sample_evaluates_nothing(tmp_path: Path) -> None:
    first, second = run_ranks(evaluate_one, 2, str(tmp_path))
    assert first == second
    assert first[1] == 1


def evaluate_one(folder: str) -> tuple[float, int]:
    run = build_run(folder)
    assert run.test_loader is not None
    means = evaluate(run, EvaluationLoader(run.test_loader.fetcher, 1))
    run.runtime.close()
    return means.loss, means.samples


def chance(folder: str, config: TinyConfig) -> list[float]:
    """What build_dataset draws from the global generators, on this rank, for both splits."""
    drawn = []

    def build_dataset(config: TinyConfig, split: Split) -> Vectors:
        drawn.append(torch.rand(()).item())
        return tiny.build_dataset(config, split)

    recipe = replace(tiny.RECIPE, build_dataset=build_dataset)
    run = assemble(recipe, replace(config, run_dir=Path(folder) / "run"), start(config, read_topology(os.environ)))
    run.runtime.close()
    return drawn


@pytest.mark.distributed
def test_a_split_by_chance_is_the_same_for_both_splits_and_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(chance, 2, str(tmp_path), BASE)
    assert first[0] == first[1] == second[0] == second[1]


def test_a_model_that_comes_in_evaluation_mode_is_trained(tmp_path: Path) -> None:
    recipe = replace(tiny.RECIPE, build_model=lambda config: tiny.build_model(config).eval())
    run = assemble(recipe, replace(BASE, run_dir=tmp_path / "run"), start(BASE, Topology()))
    assert run.strategy.module.training


def test_a_recipes_own_schedule_is_used_and_said(tmp_path: Path) -> None:
    recipe = replace(tiny.RECIPE, build_schedule=lambda config, num_steps: lambda step: 1 - step / num_steps)
    config = replace(BASE, run_dir=tmp_path / "run", schedule=Constant())
    run = assemble(recipe, config, start(config, Topology()))
    assert [run.schedule(step) for step in (0, 10)] == [1.0, 0.5]
    assert run.facts["schedule"] == "build_schedule of the recipe"


def test_a_schedule_beside_the_recipes_own_is_refused(tmp_path: Path) -> None:
    recipe = replace(tiny.RECIPE, build_schedule=lambda config, num_steps: lambda step: 1.0)
    config = replace(BASE, run_dir=tmp_path / "run", schedule=Constant(warmup_steps=3))
    with pytest.raises(ConfigError, match="has a build_schedule"):
        assemble(recipe, config, start(config, Topology()))
    assert not (tmp_path / "run").exists()


def test_lbfgs_reports_each_global_batch_once(tmp_path: Path) -> None:
    config = replace(BASE, optim=LBFGS(lr=0.1), num_steps=4, report_every=4)
    run = build_run(tmp_path, config)
    fit(run)
    assert lines(run, "train")[0]["samples"] == 4 * config.global_batch_size


def test_lbfgs_reads_each_global_batch_once(tmp_path: Path) -> None:
    run = build_run(tmp_path, replace(BASE, optim=LBFGS(lr=0.1), num_steps=4, microbatch_size=4))
    assert isinstance(run.data.train_set, Vectors)
    run.data.train_set.read.clear()
    fit(run)
    assert len(run.data.train_set.read) == 4 * 2


def test_a_step_of_padding_alone_moves_nothing(tmp_path: Path) -> None:
    config = replace(BASE, optim=SGD(lr=0.1), schedule=Constant())
    run = build_run(tmp_path, config)
    honest = run.compute_loss
    run = replace(run, compute_loss=lambda model, batch: replace(honest(model, batch), weight=torch.zeros(())))
    before = [p.detach().clone() for p in run.strategy.module.parameters()]
    train_step(run)
    assert all(torch.equal(p, old) for p, old in zip(run.strategy.module.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("sums", "says"),
    [
        ({"step": torch.tensor(1)}, "must not be named step"),
        ({"correct": 3}, r"(?s)correct.*without dims.*int 3"),
        ({"correct": torch.ones(2)}, r"(?s)without dims.*Tensor \[2\]"),
    ],
)
def test_outputs_that_cannot_be_reported_are_refused(tmp_path: Path, sums: dict[str, Tensor], says: str) -> None:
    run = build_run(tmp_path)
    honest = run.compute_loss
    run = replace(run, compute_loss=lambda model, batch: replace(honest(model, batch), sums=sums))
    with pytest.raises(ConfigError, match=says):
        fit(run)


def test_sums_with_a_graph_do_not_keep_it(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    leaf = torch.ones((), requires_grad=True)
    run.meter.add(LossOutput(leaf * 1, {"norm": leaf * 2}), 1)
    assert not run.meter._pending[0].sums["norm"].requires_grad


def test_a_metric_that_is_not_there_is_named_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)--schedule.metric is acc.*correct"):
        build_run(tmp_path, replace(BASE, eval_every=5, schedule=Plateau(metric="acc")))
    config = replace(BASE, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"(?s)the recipe's best is acc.*correct"):
        assemble(replace(tiny.RECIPE, best=("acc", "max")), config, start(config, Topology()))
    assert not (tmp_path / "run").exists()


def test_trackers_remember_the_best() -> None:
    trackers = Trackers(Best("top1", "max"))
    for value in (float("nan"), 0.5, float("nan"), 0.7, 0.6):
        trackers.update({"step": 1.0, "top1": value})
    assert trackers.best is not None
    assert trackers.best["top1"] == 0.7
    copy = Trackers(Best("top1", "max"))
    copy.load_state_dict(trackers.state_dict())
    assert copy == trackers


def test_a_best_one_by_another_rule_is_none() -> None:
    trackers = Trackers(Best("top1", "max"))
    trackers.update({"step": 1.0, "top1": 0.5, "loss": 2.0})
    for rule, state in ((Best("loss", "min"), trackers.state_dict()), (Best("top1", "min"), trackers.state_dict())):
        other = Trackers(rule)
        other.load_state_dict(state)
        assert (other.best, other.last, other.rule_before) == (None, trackers.last, "top1 (max)")
        assert other.update({"step": 2.0, "top1": 0.6, "loss": 3.0})
    older = {name: value for name, value in trackers.state_dict().items() if name != "rule"}
    for rule, best in ((Best("top1", "max"), trackers.best), (Best("top5", "max"), None)):
        other = Trackers(rule)
        other.load_state_dict(older)
        assert other.best == best


@pytest.mark.slow
def test_compiled_training_gives_the_same_weights(tmp_path: Path) -> None:
    plain = build_run(tmp_path / "plain")
    compiled = build_run(tmp_path / "compiled", replace(BASE, compile=True, compile_backend="aot_eager"))
    fit(plain)
    fit(compiled)
    names = [name for name, _ in compiled.strategy.module.named_parameters()]
    assert names == [name for name, _ in plain.strategy.module.named_parameters()]
    for mine, theirs in zip(compiled.strategy.module.parameters(), plain.strategy.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_learning_rate_is_a_function_of_the_step(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    run.progress.step = 7
    train_step(run)
    group = run.strategy.optimizer.param_groups[0]
    assert group["lr"] == 0.2 * run.schedule(7)
    assert math.isclose(run.schedule(0), 1 / 3)
