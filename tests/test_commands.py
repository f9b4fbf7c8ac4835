"""The `distkit` command."""

import json
from pathlib import Path

import pytest
from PIL import Image

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
        (["data"], "pack|show|verify"),
        (["data", "pakc"], "invalid choice"),
        (["data", "pack", "nowhere"], "OUT"),
        (["data", "pack", "nowhere", "out"], "no folder nowhere"),
        (["data", "pack", "nowhere", "out", "--split", "val"], "--split"),
        (["data", "pack", "nowhere", "out", "--workers", "0"], "--workers"),
        (["data", "show", "nowhere"], "nowhere"),
        (["data", "verify", "nowhere"], "nowhere"),
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


def test_pack_show_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        path = tmp_path / "flowers" / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    out = tmp_path / "out"
    assert run(["data", "pack", str(tmp_path / "flowers"), str(out), "--split", "test", "--workers", "1"]) == 0
    assert "test.pack: 6 raw images 3x8x8, 2 classes" in capsys.readouterr().out
    file = str(out / "test.pack")
    assert run(["data", "show", file]) == 0
    shown = capsys.readouterr().out
    assert "flowers, test" in shown
    assert "class 0, class 1" in shown
    assert run(["data", "verify", file]) == 0
    data = bytearray((out / "test.pack").read_bytes())
    data[-1] ^= 1
    (out / "test.pack").write_bytes(data)
    assert run(["data", "verify", file]) == 1
    error = capsys.readouterr().err
    assert "chunk 0 of 1 is damaged" in error
    assert "class 1/5.png" in error
    assert run(["data", "show", str(out)]) == 2
    assert f"distkit data show {file}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run(["data", "pack", "--help"])
    assert ended.value.code == 0
    assert "--overwrite" in capsys.readouterr().out
