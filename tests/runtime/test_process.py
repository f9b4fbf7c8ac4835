"""Real ranks: groups, agreement, seeds."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from support.harness import ROOT, run_ranks

from distkit.config import TrainConfig
from distkit.errors import ConfigError, DataError, LaunchError, RankFailedError
from distkit.runtime import Topology, read_topology
from distkit.runtime.environment import describe_environment, git_revision
from distkit.runtime.process import choose_device, choose_num_threads, start
from distkit.runtime.seeding import derive_seed, seed_everything, seeded

CONFIG = TrainConfig(num_steps=1, device="cpu", timeout_seconds=60)


def talk() -> dict[str, object]:
    runtime = start(CONFIG, read_topology(os.environ))
    total = runtime.all_reduce_(torch.tensor(float(runtime.rank + 1)))
    answer = {
        "sum": total.item(),
        "gathered": runtime.gather(f"rank {runtime.rank}"),
        "broadcast": runtime.broadcast(runtime.rank * 10 + 7),
        "main": runtime.is_main_process,
        "world": runtime.world_size,
        "draw": (random.random(), float(np.random.rand()), float(torch.rand(()))),
        "environment": describe_environment(runtime)["world_size"],
    }
    runtime.close()
    return answer


@pytest.mark.distributed
def test_ranks_talk_and_are_seeded_apart() -> None:
    first, second = run_ranks(talk, 2)
    assert first["sum"] == second["sum"] == 3
    assert first["gathered"] == second["gathered"] == ["rank 0", "rank 1"]
    assert first["broadcast"] == second["broadcast"] == 7
    assert (first["main"], second["main"], first["world"], first["environment"]) == (True, False, 2, 2)
    assert all(a != b for a, b in zip(first["draw"], second["draw"], strict=True))
    again, _ = run_ranks(talk, 2)
    assert again["draw"] == first["draw"]


def fail_on(rank: int, kind: type[Exception]) -> str:
    runtime = start(CONFIG, read_topology(os.environ))
    try:
        with runtime.raise_on_all_ranks("trying"):
            if runtime.rank == rank:
                raise kind("the cause")
    except Exception as error:
        return f"{type(error).__name__}: {error}" + " (on all ranks)" * getattr(error, "on_all_ranks", False)
    finally:
        runtime.close()
    return "went on"


@pytest.mark.distributed
def test_one_ranks_error_is_every_ranks() -> None:
    first, second = run_ranks(fail_on, 2, 1, ValueError)
    assert second == "ValueError: the cause"
    assert first == "RankFailedError: rank 1 failed while trying: ValueError: the cause"


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_configuration_error_is_the_same_on_all_ranks(rank: int) -> None:
    assert run_ranks(fail_on, 2, rank, DataError) == ["DataError: the cause (on all ranks)"] * 2


@pytest.mark.distributed
def test_main_process_first() -> None:
    for order in run_ranks(in_order, 3):
        assert order[0] == 0


def in_order() -> list[int]:
    import time

    runtime = start(CONFIG, read_topology(os.environ))
    with runtime.main_process_first():
        moment = time.monotonic()
        if runtime.is_main_process:
            time.sleep(0.2)
            moment = time.monotonic()
    moments = runtime.gather(moment)
    runtime.close()
    return sorted(range(3), key=moments.__getitem__)


def test_errors_of_one_process_pass_through() -> None:
    runtime = start(CONFIG, Topology())
    with pytest.raises(ValueError, match="mine"), runtime.raise_on_all_ranks("trying"):
        raise ValueError("mine")
    assert runtime.gather(3) == [3]
    assert runtime.broadcast("x") == "x"


def test_exit_codes_of_agreed_errors() -> None:
    assert RankFailedError("x").exit_code == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_absent_devices_are_refused() -> None:
    with pytest.raises(LaunchError, match="--device cpu"):
        choose_device("cuda", Topology())
    assert choose_device("auto", Topology()).type in ("cpu", "mps")


def test_mps_is_for_one_process() -> None:
    with pytest.raises(ConfigError):
        choose_device("mps", Topology(world_size=2, local_world_size=2))


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_num_threads(None, 1) == cores
    assert choose_num_threads(None, cores) == 1
    assert choose_num_threads(1, 1) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert choose_num_threads(None, 1) == 7


def test_derived_seeds_are_stable_and_apart() -> None:
    assert derive_seed(0, "init") == 7398377047407540960
    assert len({derive_seed(seed, what) for seed in range(50) for what in ("init", "rank")}) == 100
    assert derive_seed(1, "rank", 23) != derive_seed(1, "rank2", 3)
    assert 0 <= derive_seed(2**63 - 1, "x") < 2**63


def test_seeded_leaves_the_generators_as_they_were() -> None:
    seed_everything(5)
    expected = (random.random(), np.random.rand(), torch.rand(()).item())
    seed_everything(5)
    with seeded(9):
        inside = (random.random(), np.random.rand(), torch.rand(()).item())
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
    with seeded(9):
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == inside


def test_seeded_asks_this_process_s_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fork_rng(devices: object = None) -> contextlib.AbstractContextManager[None]:
        asked.append(devices)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    with seeded(1):
        assert asked == [[]] or torch.cuda.is_initialized()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    with seeded(1):
        assert asked[1:] == [[5]]


def test_git_revision(tmp_path: object) -> None:
    from support.harness import ROOT

    revision = git_revision(ROOT)
    assert revision is None or len(revision.split("+")[0]) == 40
    assert git_revision(__import__("pathlib").Path(str(tmp_path))) is None


OWNED = """
import multiprocessing, os, sys, time
from distkit.runtime.local_ranks import die_with_owner


def work(owner, path):
    die_with_owner(owner)
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    context.Process(target=work, args=(os.getpid(), sys.argv[2]), daemon=True).start()
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_ends_with_its_owner_however_it_was_started(method: str, tmp_path: Path) -> None:
    (tmp_path / "owned.py").write_text(OWNED)
    said = tmp_path / "pid"
    command = [sys.executable, str(tmp_path / "owned.py"), method, str(said)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as owner:
        try:
            wait_until(lambda: said.exists() and bool(said.read_text()))
            worker = psutil.Process(int(said.read_text()))
            assert worker.is_running()
        finally:
            owner.kill()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


LATE = """
import os, subprocess, sys, time
from distkit.runtime.local_ranks import die_with_parent


def before_exec():
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))
    while os.getppid() == owner:
        time.sleep(0.01)
    die_with_parent(owner)


owner = os.getpid()
subprocess.Popen(["sleep", "600"], preexec_fn=before_exec)
"""


def test_a_command_does_not_begin_when_its_parent_has_ended(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    said = tmp_path / "pid"
    command = [sys.executable, str(tmp_path / "late.py"), str(said)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as parent:
        try:
            wait_until(lambda: said.exists() and bool(said.read_text()))
            child = psutil.Process(int(said.read_text()))
        finally:
            parent.kill()
        # not waited for: a process that has ended and that nobody has asked about still has its id
        wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def wait_until(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)
