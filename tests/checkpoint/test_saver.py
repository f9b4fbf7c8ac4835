"""Real ranks save and other ranks load: sharded tensors of any layout, failures that all ranks hear of."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.harness import run_ranks
from support.writing import default_state, with_optimizer
from torch import Tensor

from distkit.checkpoint import commit
from distkit.checkpoint.format import step_name
from distkit.checkpoint.read import iterate, load_tensors
from distkit.checkpoint.saver import Saver, Snapshot
from distkit.checkpoint.verify import read_manifest, verify
from distkit.config import CheckpointConfig, TrainConfig
from distkit.errors import CheckpointError, RankFailedError
from distkit.runtime import read_topology
from distkit.runtime.process import Runtime, start

CONFIG = TrainConfig(num_steps=1, device="cpu", num_threads=1, timeout_seconds=60)


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model/even": torch.randn(8, 6, generator=generator),
        "model/uneven": torch.randn(7, 5, generator=generator),
        "model/fewer rows than ranks": torch.randn(2, 9, generator=generator),
        "model/columns": torch.randn(3, 10, generator=generator).bfloat16(),
        "model/scalar": torch.tensor(3.0),
    }


def runtime_here() -> Runtime:
    return start(CONFIG, read_topology(os.environ))


def saver_in(folder: Path, runtime: Runtime, **options: object) -> Saver:
    config = CheckpointConfig(**options)  # type: ignore[arg-type]
    return Saver(folder, runtime, config, recipe="tiny", strategy="fsdp", clean=lambda step: None)


def at(step: int, snapshot: Snapshot) -> Snapshot:
    """`snapshot` with the values that a run has at `step`."""
    values = with_optimizer(default_state(step, 1), snapshot.shared)
    return dataclasses.replace(snapshot, values={name: value for name, value in values.items() if name != "ranks"})


def sharded(layout: str, world_size: int) -> dict[str, Tensor]:
    """`whole` as DTensors over all ranks; the scalar stays plain."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

    hybrid = layout == "hybrid"
    mesh = init_device_mesh("cpu", (2, world_size // 2) if hybrid else (world_size,))
    tensors = {}
    for name, tensor in whole().items():
        dim = 1 if "columns" in name else 0
        placements: list[Placement] = [Replicate(), Shard(dim)] if hybrid else [Shard(dim)]
        if layout == "replicate":
            placements = [Replicate()]
        tensors[name] = distribute_tensor(tensor, mesh, placements) if tensor.ndim else tensor
    return tensors


def save_sharded(folder: str, layout: str) -> None:
    runtime = runtime_here()
    own = {f"rng/{runtime.rank:05d}/torch": torch.full((3,), runtime.rank)}
    saver = saver_in(Path(folder), runtime, asynchronous="on")
    saver.save(5, at(5, Snapshot(shared=sharded(layout, runtime.world_size), own=own, values={})))
    assert [outcome.error for outcome in saver.finish()] == [None]
    runtime.close()


def load_sharded(folder: str, layout: str) -> bool:
    from torch.distributed.tensor import DTensor

    runtime = runtime_here()
    directory = Path(folder) / step_name(5)
    targets = {name: torch.zeros_like(tensor) for name, tensor in sharded(layout, runtime.world_size).items()}
    load_tensors(directory, read_manifest(directory), targets)
    full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in targets.items()}
    runtime.close()
    return all(torch.equal(full[name], tensor) for name, tensor in whole().items())


@pytest.mark.distributed
@pytest.mark.parametrize(("saved", "ranks", "loaded", "others"), [
    ("rows", 4, "rows", 2), ("hybrid", 4, "rows", 3), ("rows", 3, "hybrid", 4), ("replicate", 2, "rows", 2),
])  # fmt: skip
def test_sharded_state_is_written_once_and_read_anywhere(
    saved: str, ranks: int, loaded: str, others: int, tmp_path: Path
) -> None:
    run_ranks(save_sharded, ranks, str(tmp_path), saved)
    directory = tmp_path / step_name(5)
    manifest = verify(directory)
    values = dict(iterate(directory, manifest))
    assert all(torch.equal(values[name], tensor) for name, tensor in whole().items())
    assert [values[f"rng/{rank:05d}/torch"].tolist() for rank in range(ranks)] == [[rank] * 3 for rank in range(ranks)]
    written = sum(path.stat().st_size for path in directory.glob("shard-*"))
    needed = sum(tensor.nbytes for tensor in values.values())
    assert written < needed + 1_200 * ranks  # headers; replicas are not written again
    assert run_ranks(load_sharded, others, str(tmp_path), loaded) == [True] * others


def outcomes_of(folder: str, how: str, break_rank: int) -> list[tuple[int, str | None]]:
    """Three saves, of which the second fails on one rank; what this rank is told."""
    runtime = runtime_here()
    saver = saver_in(Path(folder), runtime, asynchronous=how)
    own = {f"rng/{runtime.rank:05d}/torch": torch.zeros(3)}  # so that each rank has a file to write
    snapshot = Snapshot(shared={"model/w": torch.arange(10.0)}, own=own, values={})
    told = []
    for step in (1, 2, 3):
        os.environ["DISTKIT_FAULT"] = f"half_shard:{break_rank}:2:enospc"
        told += saver.save(step, at(step, snapshot))
        saver.check()
    told += saver.finish()
    saver.check(last=True)
    runtime.close()
    return [(outcome.step, outcome.error) for outcome in told]


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["on", "off"])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_hears_the_same(how: str, rank: int, tmp_path: Path) -> None:
    first, second = run_ranks(outcomes_of, 2, str(tmp_path), how, rank)
    assert first == second
    assert [step for step, _ in first] == [1, 2, 3]
    assert [error is None for _, error in first] == [True, False, True]
    assert f"rank {rank}: No space left on device" in str(first[1][1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_name(1), step_name(3)]


def saves_of(folder: str, how: str, bad_rank: int) -> list[tuple[int, str | None, str | None]]:
    """Four saves: fine, a rank's optimizer state infinite, a weight NaN too, and fine again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    runtime = runtime_here()
    saver = saver_in(Path(folder), runtime, asynchronous=how, max_failures=1)
    moments = distribute_tensor(torch.zeros(8, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    weights, mask = torch.zeros(5), torch.full((3,), -torch.inf)
    shared = {"model/w": weights, "model/mask": mask, "optimizer/w/m": moments, "extra/x": torch.tensor(torch.nan)}
    judged = {"model/w": False, "model/mask": True, "optimizer/w/m": False}
    snapshot = Snapshot(shared=shared, own={}, values={}, judged=judged)
    told = []
    for step in (1, 2, 3, 4):
        moments.to_local().fill_(torch.inf if step in (2, 3) and runtime.rank == bad_rank else 0.0)
        weights[1] = torch.nan if step == 3 else 0.0
        told += saver.save(step, at(step, snapshot))
    told += saver.finish()
    saver.check(last=True)
    runtime.close()
    return [(outcome.step, outcome.lost, outcome.error) for outcome in told]


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["on", "off"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_not_finite_is_not_saved_and_named(how: str, rank: int, tmp_path: Path) -> None:
    first, second = run_ranks(saves_of, 2, str(tmp_path), how, rank)
    assert first == second
    assert [lost for _, lost, _ in first][:2] == [None, f"optimizer/w/m (in the part of rank {rank})"]
    assert f"rank {rank}: optimizer/w/m is NaN or infinite" == first[1][2]
    assert str(first[2][1]).startswith("model/w (in the part of rank")
    assert first[3] == (4, None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_name(1), step_name(4)]


def test_the_state_is_that_of_the_boundary_and_not_of_later_steps(tmp_path: Path) -> None:
    runtime = runtime_here()
    saver = saver_in(tmp_path, runtime, asynchronous="on")
    weights = torch.zeros(1_000_000)
    for step in (1, 2, 3):
        weights.fill_(step)
        saver.save(step, at(step, Snapshot(shared={"model/w": weights}, own={}, values={})))
        weights.fill_(-1)
    saver.finish()
    for step in (1, 2, 3):
        directory = tmp_path / step_name(step)
        ((_, saved),) = iterate(directory, verify(directory))
        assert torch.equal(saved, torch.full((1_000_000,), float(step)))


def test_at_most_one_save_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distkit.runtime import faults

    monkeypatch.setenv(faults.VARIABLE, "before_vote:0:1:slow")
    faults.check_faults()
    saver = saver_in(tmp_path, runtime_here(), asynchronous="on")
    snapshot = Snapshot(shared={"model/w": torch.zeros(3)}, own={}, values={})
    begin = time.monotonic()
    assert saver.save(1, at(1, snapshot)) == []
    assert time.monotonic() - begin < 1
    assert saver.poll() == []
    assert [outcome.step for outcome in saver.save(2, at(2, snapshot))] == [1]
    assert time.monotonic() - begin > 1.9
    assert [outcome.step for outcome in saver.finish()] == [2]
    monkeypatch.delenv(faults.VARIABLE)
    faults.check_faults()


def test_a_tensor_that_changes_its_form_is_planned_anew(tmp_path: Path) -> None:
    saver = saver_in(tmp_path, runtime_here(), asynchronous="off")
    for step, size in ((1, 3), (2, 5)):
        state = {"model/w": torch.ones(size), **({"optimizer/w/m": torch.ones(size)} if step == 2 else {})}
        assert saver.save(step, at(step, Snapshot(shared=state, own={}, values={})))[0].error is None
        assert {n: e.shape for n, e in verify(tmp_path / step_name(step)).tensors.items()} == dict.fromkeys(
            state, (size,)
        )


def test_a_file_in_the_place_of_a_save_is_no_obstacle(tmp_path: Path) -> None:
    saver = saver_in(tmp_path, runtime_here(), asynchronous="off")
    snapshot = Snapshot(shared={"model/w": torch.zeros(3)}, own={}, values={})
    (tmp_path / ".tmp-step-000000001").write_text("a file")
    (tmp_path / ".tmp-step-000000002").symlink_to(tmp_path)
    assert [saver.save(step, at(step, snapshot))[0].error for step in (1, 2)] == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]


def test_failures_in_a_row_end_the_run_and_others_do_not(tmp_path: Path) -> None:
    saver = saver_in(tmp_path / "missing", runtime_here(), asynchronous="off", max_failures=2)
    snapshot = Snapshot(shared={"model/w": torch.zeros(3)}, own={}, values={})
    assert "No such file" in str(saver.save(1, at(1, snapshot))[0].error)
    saver.check()
    (tmp_path / "missing").mkdir()
    assert saver.save(2, at(2, snapshot))[0].error is None
    saver.check(last=True)
    (tmp_path / "missing").rename(tmp_path / "gone")
    for step in (3, 4):
        saver.save(step, at(step, snapshot))
        with pytest.raises(CheckpointError, match="last checkpoint was not saved: rank 0: No such file"):
            saver.check(last=True)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("limit", "file"), [("MAX_STATE_BYTES", "state.json"), ("MAX_MANIFEST_BYTES", "MANIFEST.json")]
)
def test_what_no_resume_would_read_is_not_saved(
    limit: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saver_in(tmp_path, runtime_here(), asynchronous="off")
    snapshot = Snapshot(shared={"model/w": torch.zeros(3)}, own={}, values={})
    assert saver.save(1, at(1, snapshot))[0].error is None
    monkeypatch.setattr(commit, limit, 20)
    assert f"{file} would have " in str(saver.save(2, at(2, snapshot))[0].error)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"seed": -1}, "config.seed: -1 is not"),
        ({"seed": 0, "global_batch_size": 8, "optim": 5}, "config.optim: 5 is not"),
    ],
)
def test_a_state_that_no_resume_would_take_is_not_saved(change: dict[str, object], why: str, tmp_path: Path) -> None:
    saver = saver_in(tmp_path, runtime_here(), asynchronous="off")
    good = at(1, Snapshot(shared={"model/w": torch.zeros(3)}, own={}, values={}))
    (outcome,) = saver.save(1, dataclasses.replace(good, values={**good.values, "config": change}))
    assert str(outcome.error).startswith("rank 0: state.json ")
    assert why in str(outcome.error)
    assert not list(tmp_path.iterdir())
    assert saver.save(1, good)[0].error is None


def test_a_disk_that_does_not_answer_does_not_hold_its_rank_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distkit.runtime import faults

    saver = saver_in(tmp_path, runtime_here(), asynchronous="on")
    snapshot = Snapshot(shared={"model/w": torch.zeros(3)}, own={}, values={})
    monkeypatch.setenv(faults.VARIABLE, "before_vote:0:1:slow")
    faults.check_faults()
    assert saver.save(1, at(1, snapshot)) == []
    # as on one of several ranks: alone it waits
    group = dist.ProcessGroup(0, 2)
    saver._runtime = dataclasses.replace(saver._runtime, cpu_group=group, timeout=datetime.timedelta(seconds=0.01))
    with pytest.raises(RankFailedError, match="twice --timeout-seconds: does the disk of"):
        saver.finish()
    saver._runtime = dataclasses.replace(saver._runtime, cpu_group=None)
    assert [outcome.error for outcome in saver.finish()] == [None]
    monkeypatch.delenv(faults.VARIABLE)
    faults.check_faults()
