"""A run that is told to stop: one boundary of all ranks, a committed checkpoint of it, and the same bits afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.harness import ROOT, Ended, free_port, run_recipe_cli
from support.launching import LAUNCH, environment, marked, run, started

from distkit.checkpoint.format import step_name
from distkit.engine.preemption import why
from distkit.engine.watch import JOB_END, NO_LAUNCHER, STOP_FILE, Watch, slurm_job_end
from distkit.runtime.heartbeat import Heartbeat, StopRequested

RECIPE = ROOT / "tests" / "support" / "signalled.py"
FLAGS = [
    "--run-dir", "run", "--num-steps", "12", "--eval-every", "4", "--eval-batch-size", "4", "--report-every", "2",
    "--checkpoint.enabled", "--checkpoint.save-every", "6", "--dropout", "0.1", "--batch-norm",
]  # fmt: skip
#: Place -> the step in which the signal comes.
STEPS = {"start-up": 0, "data": 5, "forward": 5, "backward": 5, "update": 5, "evaluation": 8, "save": 6}
PLACES = [place for place in STEPS if place not in ("forward", "backward", "update")]


def once(folder: Path, env: dict[str, str], world_size: int = 2) -> list[Ended]:
    return run_recipe_cli(FLAGS, folder, recipe=RECIPE, world_size=world_size, env=env)


def status(folder: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((folder / "run" / "status.json").read_text())
    return value


def learned(folder: Path) -> tuple[str, list[dict[str, object]]]:
    """The digest of a run that is complete, and its lines without times."""
    assert status(folder)["state"] == "completed"
    digest = json.loads((folder / "run" / "summary.json").read_text())["state_digest"]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    timed = ("samples_per_second", "data_wait_seconds")
    kept = [{name: value for name, value in line.items() if name not in timed} for line in lines]
    return digest, [line for line in kept if line["event"] in ("train", "eval")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert [done.returncode for done in once(folder, {})] == [0, 0]
    return learned(folder)


def told(place: str, rank: int, name: str) -> dict[str, str]:
    """The environment in which `rank` gets signal `name` at `place`."""
    step = STEPS[place]
    if place in PLACES:
        return {"DISTKIT_FAULT": f"{place}:{rank}:{step}:{name.lower()}"}
    return {"SEND": f"{place}:{rank}:{step}:{name}"}


def check_stop(folder: Path, env: dict[str, str], name: str, rank: int, undisturbed: object) -> int:
    """Run, be stopped, run again; the step of the stop."""
    ended = once(folder, env)
    assert [done.returncode for done in ended] == [75, 75]
    said = status(folder)
    step = said["step"]
    assert isinstance(step, int)
    assert said["state"] == "preempted"
    assert said["reason"] in ended[0].stderr.splitlines()[-1]
    assert f"stopped after step {step} (SIG{name} to rank {rank})" in str(said["reason"])
    assert (folder / "run" / "checkpoints" / step_name(step) / "MANIFEST.json").exists()
    assert [done.returncode for done in once(folder, {})] == [0, 0]
    assert learned(folder) == undisturbed
    return step


@pytest.mark.distributed
@pytest.mark.parametrize(("place", "rank", "name"), [("forward", 1, "TERM"), ("evaluation", 0, "USR1")])
def test_a_signal_to_one_rank_stops_all_at_one_saved_step(
    tmp_path: Path, undisturbed: object, place: str, rank: int, name: str
) -> None:
    check_stop(tmp_path, told(place, rank, name), name, rank, undisturbed)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["TERM", "USR1"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", STEPS)
def test_a_signal_in_every_place(tmp_path: Path, undisturbed: object, place: str, rank: int, name: str) -> None:
    check_stop(tmp_path, told(place, rank, name), name, rank, undisturbed)


@pytest.mark.distributed
def test_an_evaluation_is_broken_off_and_made_up_for(tmp_path: Path, undisturbed: object) -> None:
    env = told("evaluation", 1, "TERM") | {"SLOWLY": "0.5"}
    step = check_stop(tmp_path, env, "TERM", 1, undisturbed)
    assert step == STEPS["evaluation"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    resumed = next(i for i, line in enumerate(lines) if "resumed from" in line.get("message", ""))
    (evaluated,) = [i for i, line in enumerate(lines) if line["event"] == "eval" and line["step"] == step]
    assert resumed < evaluated
    # the checkpoint of the step knows the evaluation now, and nothing lies beside it
    state = json.loads((tmp_path / "run" / "checkpoints" / step_name(step) / "state.json").read_text())
    assert state["parts"]["trackers"]["last"]["step"] == step
    assert all(path.name.startswith("step-") for path in (tmp_path / "run" / "checkpoints").iterdir())


def test_a_file_stop_stops_one_process(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    (done,) = once(tmp_path, {"SLOWLY": "0.2"}, world_size=1)
    assert done.returncode == 75
    assert "(a file STOP in the run directory)" in done.stderr
    assert not (tmp_path / "run" / "STOP").exists()
    assert status(tmp_path)["retryable"] is False
    (again,) = once(tmp_path, {}, world_size=1)
    assert again.returncode == 0


def test_a_file_save_is_obeyed_at_a_report(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "SAVE").touch()
    flags = ["--checkpoint.save-every", "None", "--checkpoint.keep-best", "None", "--checkpoint.keep-last", "None"]
    (done,) = run_recipe_cli([*FLAGS, *flags], tmp_path, recipe=RECIPE, env={"SLOWLY": "0.3"})
    assert done.returncode == 0
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(steps) == 2
    assert int(steps[0].removeprefix("step-")) % 2 == 0
    assert steps[1] == step_name(12)
    assert not (tmp_path / "run" / "SAVE").exists()


def test_the_end_of_the_job_stops_the_run(tmp_path: Path) -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 20), "SLOWLY": "0.3"}
    (done,) = once(tmp_path, env, world_size=1)
    assert done.returncode == 75
    assert "(the end of the SLURM job is near); saved" in done.stderr


def test_a_save_that_would_come_too_late_is_left_out(tmp_path: Path) -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) - 1), "SLOWLY": "0.3"}
    (done,) = once(tmp_path, env, world_size=1)
    assert done.returncode == 75
    assert "too late for a save: the same command continues from the beginning" in done.stderr


def test_without_checkpoints_it_says_that_nothing_is_saved(tmp_path: Path) -> None:
    flags = ["--run-dir", "run", "--num-steps", "12"]
    env = {"SEND": "forward:0:3:INT", "SLOWLY": "0.2"}
    (done,) = run_recipe_cli(flags, tmp_path, recipe=RECIPE, env=env)
    assert done.returncode == 75
    assert "nothing is saved (--checkpoint.no-enabled): the same command begins again" in done.stderr
    assert status(tmp_path)["state"] == "preempted"


def test_a_second_signal_ends_at_once_and_says_so(tmp_path: Path) -> None:
    env = environment({"SLOWLY": "60", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    command = [sys.executable, str(RECIPE), *FLAGS]
    with started(command, tmp_path, env, tmp_path / "run") as process:
        err = (tmp_path / "run").with_suffix(".err")
        wait_for((tmp_path / "run.forward").exists, process, 100)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "ends it at once" in err.read_text(), process, 20)
        time.sleep(1.2)
        process.send_signal(signal.SIGINT)
        process.wait(15)
    assert process.returncode == 128 + signal.SIGINT
    assert "was ended at once by a second SIGINT" in err.read_text().splitlines()[-1]
    assert status(tmp_path)["state"] == "failed"


def wait_for(condition, process: subprocess.Popen[bytes], seconds: float) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_worker_processes_ignore_what_stops_the_run(tmp_path: Path) -> None:
    script = """
import os, signal, sys, time
import torch
from distkit import LossOutput, Recipe, TrainConfig, main
from distkit.config import ObserveConfig

class Points(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, index):
        time.sleep(0.01)
        return torch.ones(2) * index

def loss(config, model, batch):
    if loss.calls == 2:  # as a terminal or SLURM does it: to everything that belongs to the run
        os.killpg(0, signal.SIGTERM)
    loss.calls += 1
    return LossOutput(model(batch).mean())

loss.calls = 0
base = TrainConfig(num_steps=200, global_batch_size=4, observe=ObserveConfig(console=False))
recipe = Recipe("workers", TrainConfig, lambda config: torch.nn.Linear(2, 1), lambda config, split: Points(), loss,
                presets={"default": base})
if __name__ == "__main__":
    main(recipe)
"""
    (tmp_path / "mine.py").write_text(script)
    command = [sys.executable, "mine.py", "--run-dir", "run", "--device", "cpu", "--data.num-workers", "2"]
    done = run(["setsid", "--wait", *command], tmp_path, environment({"PYTHONPATH": str(ROOT)}))
    assert done.returncode == 75, done.stderr
    assert status(tmp_path)["state"] == "preempted"
    assert "DataLoader worker" not in done.stderr


#: How to start two ranks (python: one), and the signals that the launcher passes on or that end it.
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT"],
    "accelerate": ["accelerate", "launch", "--config_file", str(LAUNCH / "cpu_2_processes.yaml"),
                   "--main_process_port", "PORT"],
    "local.sh": [str(LAUNCH / "local.sh"), "-n", "2"],
}  # fmt: skip

NAMES, TARGETS = ("TERM", "USR1", "HUP", "INT"), ("rank 0", "rank 1", "launcher")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "target", "name"),
    [("python", "rank 0", name) for name in NAMES]
    + [(launcher, target, name) for launcher in list(LAUNCHERS)[1:] for target in TARGETS for name in NAMES]
    + [(launcher, "launcher", "KILL") for launcher in list(LAUNCHERS)[1:]],
)
def test_a_signal_to_anyone_under_any_launcher(
    tmp_path: Path, undisturbed: tuple[str, object], launcher: str, target: str, name: str
) -> None:
    env = environment({"SLOWLY": "0.4", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "GRACE_SECONDS": "20"})
    port = str(free_port())
    words = [port if word == "PORT" else word for word in LAUNCHERS[launcher]]
    with started([*words, str(RECIPE), *FLAGS], tmp_path, env, tmp_path / "run", own_group=True) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and '"step": 2' in metrics.read_text(), process, 100)
        ranks = {one.environ().get("RANK", "0"): one.pid for one in marked(env["DISTKIT_TEST_MARK"])
                 if str(RECIPE) in one.cmdline() and (launcher == "python" or one.pid != process.pid)
                 and (launcher == "python" or "RANK" in one.environ())}  # fmt: skip
        pid = process.pid if target == "launcher" else ranks[target.removeprefix("rank ")]
        os.kill(pid, getattr(signal, f"SIG{name}"))
        process.wait(90)
        deadline = time.monotonic() + 60  # ranks without a launcher end by themselves
        while marked(env["DISTKIT_TEST_MARK"]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert status(tmp_path)["state"] == "preempted"
    assert status(tmp_path)["retryable"] is True
    if launcher in ("python", "local.sh") and name != "KILL":
        assert process.returncode == 75
    world_size = 1 if launcher == "python" else 2
    assert {done.returncode for done in once(tmp_path, {}, world_size)} == {0}
    if world_size == 2:
        assert learned(tmp_path)[0] == undisturbed[0]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_is_told_to_stop_does_not_wait_for_a_rank_that_is_stopped(
    tmp_path: Path, undisturbed: tuple[str, object]
) -> None:
    env = environment({"SLOWLY": "0.1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                       "DISTKIT_FAULT": "step:1:7:stop"})  # fmt: skip
    with started(
        [str(LAUNCH / "local.sh"), "-n", "2", str(RECIPE), *FLAGS], tmp_path, env, tmp_path / "run"
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and '"step": 6' in metrics.read_text(), process, 100)
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) not in (0, 75)
    said = status(tmp_path)
    assert (said["state"], said["retryable"]) == ("failed", True)
    assert "is stopped (SIGSTOP)" in str(said["reason"])
    assert [done.returncode for done in once(tmp_path, {})] == [0, 0]
    assert learned(tmp_path)[0] == undisturbed[0]


def test_the_reason_names_the_rank() -> None:
    assert why({1: signal.SIGTERM}, 4) == "SIGTERM to rank 1"
    assert why({rank: int(signal.SIGUSR1) for rank in range(4)}, 4) == "SIGUSR1 to all ranks"
    assert why({0: signal.SIGINT}, 1) == "SIGINT"
    assert why({3: NO_LAUNCHER}, 4) == "the launcher is gone"


def test_what_a_watch_sees(tmp_path: Path) -> None:
    watch = Watch(directory=tmp_path)
    assert watch.look(1) == 0
    (tmp_path / "SAVE").touch()
    assert watch.look(1) == 0
    assert watch.wants_save
    watch.done_with("SAVE")
    assert not (tmp_path / "SAVE").exists()
    (tmp_path / "STOP").touch()
    assert watch.look(1) == STOP_FILE
    # what the last save took, twice, and the margin must fit before the end
    later = Watch(job_end=time.time() + 100.0, directory=tmp_path / "none")
    assert later.look(1) == 0
    later.save_seconds = 40.0
    assert later.look(2) == JOB_END
    assert Watch(launcher=os.getppid()).look(1) == 0
    assert Watch(launcher=1 if os.getppid() != 1 else 2).look(1) == NO_LAUNCHER


def test_the_end_of_a_job_is_read_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "100")
    assert slurm_job_end() is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm_job_end() == 100.0


def test_no_unit_begins_after_a_decision_on_one_process() -> None:
    heartbeat = Heartbeat(beats=True)
    heartbeat.beat_seconds = 0.05
    for _ in range(3):
        heartbeat.next_unit()
    heartbeat.wish(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while not heartbeat.stopping:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(StopRequested) as stopped:
        heartbeat.next_unit()
    heartbeat.close()
    assert stopped.value.wishes == {0: signal.SIGTERM}
