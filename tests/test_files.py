"""Whole files: the old one or the new one, and nothing left of a failure."""

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distkit import files
from distkit.files import (
    atomic_file,
    atomic_path,
    open_regular,
    read_regular,
    remove_temporaries,
    write_bytes,
    write_json,
)


def by_file(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def by_path(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        assert temporary.read_bytes() == b""
        temporary.unlink()  # as a library that makes its own file
        temporary.touch(mode=0o600)
        temporary.write_bytes(data)


WRITERS = [write_bytes, by_file, by_path]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_is_replaced_whole(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    for data in (b"old", b"newer"):
        write(tmp_path / "f", data)
        assert (tmp_path / "f").read_bytes() == data
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("write", WRITERS)
def test_the_umask_holds(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "f", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


@pytest.mark.parametrize("write", WRITERS)
def test_data_then_name_then_folder_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None]
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", sync)
    monkeypatch.setattr(files.os, "replace", rename)
    write(tmp_path / "f", b"x")
    assert events == ["file", "rename", "folder"]


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs to mount a file system")
def test_what_must_be_said_is_written_over_on_a_full_disk(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], check=True)
    try:
        status = tmp_path / "status.json"
        files.overwrite_json(status, {"state": "running", "reason": "x" * 200})
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "fill").write_bytes(bytes(2**20))
        with pytest.raises(OSError, match="No space left"):
            files.write_json(status, {"state": "failed"})
        for value in ({"state": "failed"}, {"state": "failed", "reason": "y" * 900}):
            files.overwrite_json(status, value)
            assert json.loads(status.read_text()) == value
        assert sorted(path.name for path in tmp_path.iterdir()) == ["fill", "status.json"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None]
) -> None:
    write(tmp_path / "f", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f", b"new")
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


@pytest.mark.parametrize("opened", [atomic_file, atomic_path])
def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path, opened: Callable[..., object]) -> None:
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "f"):  # type: ignore[attr-defined]
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "f").symlink_to(tmp_path / "target")
    write_bytes(tmp_path / "f", b"new")
    assert not (tmp_path / "f").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_json_has_null_where_a_number_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [float("inf"), (1.0, -float("inf"))], "c": {"d": 2}})
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"a": None, "b": [None, [1.0, None]], "c": {"d": 2}}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == text


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / ".tmp-step-000000001").mkdir()
    (tmp_path / ".tmp-f-12345678").touch()
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "f")
    remove_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".tmp-step-000000001", "f"]


@pytest.mark.timeout(20)
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    real, link, fifo = tmp_path / "real", tmp_path / "link", tmp_path / "fifo"
    real.write_bytes(b"data")
    link.symlink_to(real)
    os.mkfifo(fifo)
    appending = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    for flags in (os.O_RDONLY, os.O_RDWR, appending):
        os.close(open_regular(real, flags))
        os.close(open_regular(link, flags, follow=True))
        with pytest.raises(OSError, match="is a symbolic link"):
            open_regular(link, flags)
        with pytest.raises(OSError, match="is not a regular file"):
            open_regular(fifo, flags)
    with pytest.raises(OSError, match=r"is not a regular file|Is a directory"):
        open_regular(tmp_path, os.O_RDONLY)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nothing")
    with pytest.raises(OSError, match="is a symbolic link"):
        open_regular(dangling, appending)
    assert not (tmp_path / "nothing").exists()
    os.close(open_regular(tmp_path / "new", appending, 0o600))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    assert read_regular(link, 4) == b"data"
    with pytest.raises(OSError, match="more than the 3 bytes"):
        read_regular(real, 3)
