"""Staging: a copy is whole or not there, made once, and never an old one."""

import os
import shutil
from pathlib import Path

import pytest

from distkit.commands import run
from distkit.commands.slurm.stage import copy_name, stage
from distkit.errors import ConfigError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "packed"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "index.json").write_text("{}")
    (folder / "train" / "images").write_bytes(bytes(1000))
    return folder


def test_a_copy_is_made_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "scratch" / "me" / copy_name(data)
    assert run(["slurm", "stage", str(data), str(target)]) == 0
    assert "copied" in capsys.readouterr().out
    assert (target / "train" / "images").read_bytes() == bytes(1000)
    assert "is there already" in stage(data, target)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_other_content_has_another_name(data: Path) -> None:
    before = copy_name(data)
    assert before.startswith("packed-")
    assert copy_name(data) == before
    (data / "train" / "index.json").write_text("[]")
    assert copy_name(data) != before


def test_what_a_killed_copy_left_is_replaced(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "scratch" / copy_name(data)
    half = target.with_name(f".tmp-{target.name}")
    half.mkdir(parents=True)
    (half / "rubbish").touch()
    stage(data, target)
    assert sorted(path.name for path in target.iterdir()) == ["train"]
    assert not half.exists()


def test_too_little_space_and_a_bad_place_are_said_and_nothing_is_left(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (data / "train" / "huge").open("wb") as file:  # sparse: it takes no room here
        os.truncate(file.fileno(), 2**43)
    scratch = tmp_path / "scratch"
    with pytest.raises(ConfigError, match="GB free"):
        stage(data, scratch / "copy")
    assert list(scratch.iterdir()) == []
    scratch.rmdir()
    scratch.touch()
    with pytest.raises(ConfigError, match="cannot copy"):
        stage(data, scratch / "copy")
    shutil.rmtree(data)
    with pytest.raises(ConfigError, match="is no folder"):
        copy_name(data)
