import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from distkit.observers.wandb import WandbObserver

pytest.importorskip("wandb")

SCRIPT = """
import json, sys
from pathlib import Path
from distkit.errors import ConfigError
from distkit.observers import RunInfo
from distkit.observers.wandb import WandbObserver

run_dir, state = Path(sys.argv[1]), json.loads(sys.argv[2])
observer = WandbObserver(run_dir)
observer.load_state_dict(state)
try:
    observer.start(RunInfo(recipe="cifar10", run_dir=run_dir, num_steps=4, facts={"device": "cpu"}), 0)
except ConfigError as error:
    sys.exit(f"ConfigError {error}")
observer.record({"event": "train", "step": 2, "loss": 0.5})
observer.record({"event": "eval", "step": 4, "accuracy": 0.75})
observer.record({"event": "note", "step": 4, "message": "hello"})
observer.close("completed", "")
print(json.dumps(observer.state_dict()))
"""


def run(run_dir: Path, state: dict[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"HOME": str(run_dir), "WANDB_ERROR_REPORTING": "false", **variables}
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(run_dir), json.dumps(state)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def processes_with(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DISTKIT_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
        except psutil.Error:
            continue
    return found


def test_offline_run_keeps_its_id_and_leaves_no_process(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    first = run(tmp_path, {}, WANDB_MODE="offline", DISTKIT_TEST_MARK=mark)
    assert first.returncode == 0, first.stderr
    state = json.loads(first.stdout)
    assert set(state) == {"wandb_run_id"}
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{state['wandb_run_id']}/*.wandb"))) == 1
    again = run(tmp_path, state, WANDB_MODE="offline", DISTKIT_TEST_MARK=mark)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == state
    assert processes_with(mark) == []


def test_without_a_login_it_says_what_to_type(tmp_path: Path) -> None:
    got = run(tmp_path, {})
    assert got.returncode == 1
    assert "ConfigError --observe.wandb" in got.stderr
    assert "WANDB_MODE=offline" in got.stderr


def test_state_before_a_start() -> None:
    observer = WandbObserver(Path("unused"))
    assert observer.state_dict() == {}
    observer.load_state_dict({"other": "x"})
    assert observer.state_dict() == {}
    observer.load_state_dict({"wandb_run_id": "abc"})
    assert observer.state_dict() == {"wandb_run_id": "abc"}
    observer.close("failed", "")
