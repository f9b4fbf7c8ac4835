"""Packing: whole after any kill, done once by processes that start together, repairable when the disk is full."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.packing import CHUNK, save, small_tree, varied_tree

from distkit.data.packed import sources as pack_sources
from distkit.data.packed import write as pack_writer
from distkit.data.packed.pack import pack, verify
from distkit.data.packed.read import PackedFile
from distkit.errors import DataError, Stopped


@pytest.fixture
def small(tmp_path):
    return small_tree(tmp_path)


@pytest.fixture
def varied(tmp_path):
    return varied_tree(tmp_path)


def whole(root, **options):
    """The bytes of the pack that an undisturbed process writes."""
    out = root.parent / "reference"
    pack(str(root), out, chunk_bytes=CHUNK, **options)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_packing_again_writes_nothing(small, tmp_path):
    pack(str(small), tmp_path)
    before = (tmp_path / "train.pack").stat()
    assert pack(str(small), tmp_path).count("packed before") == 2
    assert (tmp_path / "train.pack").stat() == before
    save(small / "train" / "ant" / "99.png", 7)
    with pytest.raises(DataError, match="holds something else") as caught:
        pack(str(small), tmp_path)
    assert "--overwrite" in str(caught.value)
    assert (tmp_path / "train.pack").stat() == before
    assert "61 raw images" in pack(str(small), tmp_path, overwrite=True)


KILLS = """
import os, signal, sys
from pathlib import Path
from distkit.data.packed import sources as pack_sources
from distkit.data.packed.pack import pack

source, out, form = sys.argv[1:]
names = ("pwrite", "fsync", "ftruncate", "rename", "replace", "open")
whole = {name: getattr(os, name) for name in names}

def attempt(fatal):
    "Pack in a child that is killed before its system call number `fatal`, and after half of it where it is a write."
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = 0
    def counted(name):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == fatal:
                if name == "pwrite":
                    whole[name](args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return whole[name](*args, **kwargs)
        return call
    for name in names:
        setattr(os, name, counted(name))
    pack(source, Path(out), form=form, num_workers=1, chunk_bytes=4096)
    os._exit(0)

fatal, kills = 1, 0
while True:
    status = attempt(fatal)
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    kills += 1
    published = list(Path(out).glob("*.pack")) if Path(out).exists() else []
    if not published:
        # What is left is from the last kill; half the time start from nothing, half the time go on from there.
        if fatal % 2:
            for path in Path(out).glob(".*"):
                path.unlink()
    fatal += 1
print(kills)
"""


@pytest.mark.parametrize("form", ["raw", "encoded"])
def test_a_kill_at_any_system_call_leaves_something_to_go_on_from(small, tmp_path, form):
    """Killed before call 1, call 2, …, and in the middle of every write: the end is the same file bit for bit."""
    shutil.rmtree(small / "test")
    expected = whole(small, form=form)
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLS, str(small), str(out), form], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


SLOW = """
import os, sys, time
from pathlib import Path
from distkit.data.packed.pack import pack

write = os.pwrite
os.pwrite = lambda *args: time.sleep(0.02) or write(*args)
print(pack(sys.argv[1], Path(sys.argv[2]), chunk_bytes=4096))
"""


def start(code, *args):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_for_bytes(path, least):
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < least:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("form", ["raw", "encoded"])
def test_only_the_rest_is_read_after_a_kill(varied, small, tmp_path, monkeypatch, capsys, form):
    source = small / "train" if form == "raw" else varied
    expected = whole(source)
    total = len(expected["train.pack"])
    process = start(SLOW, source, tmp_path / "out")
    wait_for_bytes(tmp_path / "out" / ".train.pack.partial", total // 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / "train.pack").exists()
    read = []
    for name in ("_file", "_pixels"):
        original = getattr(pack_sources, name)
        monkeypatch.setattr(
            pack_sources, name, lambda listing, i, x, original=original: read.append(i) or original(listing, i, x)
        )
    pack(str(source), tmp_path / "out", chunk_bytes=CHUNK)
    assert "going on at" in capsys.readouterr().err
    assert 0 < len(read) < (60 if form == "raw" else 40)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected


def test_a_damaged_or_foreign_remainder_is_not_trusted(small, tmp_path, capsys):
    expected = whole(small)
    partial = tmp_path / "out" / ".train.pack.partial"
    partial.parent.mkdir()
    header = PackedFile(tmp_path / "reference" / "train.pack").header
    damaged = bytearray(expected["train.pack"])
    damaged[header.sections["images"].offset + 2 * CHUNK + 5] ^= 1
    for remainder, share in ((bytes(damaged), "going on at 17.8%"), (b"x" * 9000, ""), (expected["test.pack"], "")):
        partial.write_bytes(remainder)
        pack(str(small), partial.parent, splits=["train"], chunk_bytes=CHUNK)
        said = capsys.readouterr().err
        assert share in said
        assert ("going on" in said) == bool(share)
        assert (partial.parent / "train.pack").read_bytes() == expected["train.pack"]
        assert not partial.exists()
        (partial.parent / "train.pack").unlink()


def test_two_processes_do_the_work_once(small, tmp_path):
    expected = whole(small)
    both = [start(SLOW, small, tmp_path / "out") for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for i, (_, err) in enumerate(said):  # nobody waits where one is done before the other has begun
        assert "waiting for" not in err or f"waiting for process {both[1 - i].pid} on " in err
    outputs = "".join(out for out, _ in said)
    assert outputs.count("packed before") == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected


def test_a_dead_writer_blocks_nobody(small, tmp_path):
    expected = whole(small)
    first = start(SLOW, small, tmp_path / "out")
    partial = tmp_path / "out" / ".train.pack.partial"
    wait_for_bytes(partial, len(expected["train.pack"]) // 2)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(SLOW, small, tmp_path / "out")
    assert second.stderr.readline().startswith(f"waiting for process {first.pid} on ")
    first.kill()
    first.communicate()
    _, err = second.communicate(timeout=60)
    assert second.returncode == 0
    assert "going on at" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected


def test_a_full_disk_is_an_error_that_can_be_repaired(small, tmp_path, capsys):
    expected = whole(small)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom distkit.commands import run\n"
        "import distkit.data.packed.pack as p\np.pack.__kwdefaults__['chunk_bytes'] = 4096\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))\n"
        "sys.exit(run(['data', 'pack', *sys.argv[1:]]))"
    )
    process = start(code, small, tmp_path / "out")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "train.pack cannot be written" in err
    assert "File too large" in err
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".train.pack.partial"]
    pack(str(small), tmp_path / "out", chunk_bytes=CHUNK)
    assert "going on at" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_too_little_space_is_known_before_the_work(small, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(DataError, match="10 bytes free"):
        pack(str(small), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_keyboard_stops_it_resumably(small, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_writer.PackWriter, "finish", interrupt)
    with pytest.raises(Stopped):
        pack(str(small), tmp_path / "out")
    monkeypatch.undo()
    pack(str(small), tmp_path / "out")
    verify(tmp_path / "out" / "train.pack")
