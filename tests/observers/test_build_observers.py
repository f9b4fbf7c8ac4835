import subprocess
import sys
from pathlib import Path

import pytest

from distkit.config import ObserveConfig
from distkit.errors import ConfigError
from distkit.observers import build_observers
from distkit.observers.console import ConsoleObserver
from distkit.observers.jsonl import JsonlObserver
from distkit.observers.tensorboard import TensorboardObserver
from distkit.observers.wandb import WandbObserver

ALL = ObserveConfig(console=True, tensorboard=True, wandb=True)


def test_jsonl_is_always_on_and_the_console_comes_last(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    kinds = [type(observer) for observer in build_observers(ALL, tmp_path, True)]
    assert kinds == [JsonlObserver, TensorboardObserver, WandbObserver, ConsoleObserver]
    only = build_observers(ObserveConfig(console=False), tmp_path, True)
    assert [type(observer) for observer in only] == [JsonlObserver]
    assert list(tmp_path.iterdir()) == []


def test_an_observer_without_a_switch_is_asked_for_by_name(tmp_path: Path) -> None:
    observe = ObserveConfig(console=False, also=("console",))
    assert [type(observer) for observer in build_observers(observe, tmp_path, True)] == [JsonlObserver, ConsoleObserver]
    with pytest.raises(ConfigError, match=r"--observe\.also console"):
        build_observers(ObserveConfig(also=("consol",)), tmp_path, False)


def test_other_ranks_have_none(tmp_path: Path) -> None:
    assert build_observers(ObserveConfig(), tmp_path, False) == []


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
@pytest.mark.parametrize("is_main_process", [True, False])
def test_a_missing_package_is_named_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, is_main_process: bool
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    observe = ObserveConfig(tensorboard=package == "tensorboard", wandb=package == "wandb")
    with pytest.raises(ConfigError, match=rf'pip install "distkit\[{package}\]"'):
        build_observers(observe, tmp_path, is_main_process)


def test_a_folder_of_that_name_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    code = (
        "import importlib.util as u; spec = u.find_spec('wandb'); assert spec and spec.origin is None;"
        "import distkit.observers as o; assert not o._installed('wandb')"
    )
    root = str(Path(__file__).parents[2])
    env = {"PYTHONPATH": root}
    got = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr


def test_importing_the_observers_imports_none_of_their_packages() -> None:
    code = (
        "import sys, distkit.observers;"
        "print([m for m in ('torch', 'rich', 'wandb', 'tensorboard') if m in sys.modules])"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "[]"
