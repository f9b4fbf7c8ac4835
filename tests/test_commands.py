"""The `distkit` command."""

import json
from pathlib import Path

import pytest

import distkit
from distkit.commands import run


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "usage: distkit" in capsys.readouterr().out
    assert run([]) == 2
    assert run(["version"]) == 0
    assert capsys.readouterr().out.endswith(f"{distkit.__version__}\n")


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = {"state": "failed", "step": 30, "reason": "ValueError: x", "attempt": 1}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert run(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "failed at step 30" in out
    assert "ValueError: x" in out
    (tmp_path / "summary.json").write_text(json.dumps({"best": {"top1": 0.75, "step": 10.0}, "state_digest": "ab"}))
    assert run(["show", str(tmp_path)]) == 0
    assert "top1 0.75" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["shwo", "x"], "distkit show"),
        (["show"], "one run directory"),
        (["show", "nowhere"], "nowhere"),
        (["version", "x"], "no argument"),
    ],
)
def test_wrong_lines(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) < 10


def test_a_broken_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{", "[]"):
        (tmp_path / "status.json").write_text(text)
        assert run(["show", str(tmp_path)]) == 2
        assert "status.json" in capsys.readouterr().err
