"""Packing: whole after any kill, done once by processes that start together, repairable when the disk is full."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.packing import SHARD, save, small_tree, varied_tree

from distkit.data.packed import plan as planning
from distkit.data.packed import write as pack_writer
from distkit.data.packed.pack import pack, verify
from distkit.errors import DataError, Stopped


@pytest.fixture
def small(tmp_path):
    return small_tree(tmp_path)


@pytest.fixture
def varied(tmp_path):
    return varied_tree(tmp_path)


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def whole(root, **options):
    """The files that an undisturbed process writes."""
    out = root.parent / "reference"
    pack(str(root), out, shard_bytes=SHARD, **options)
    return contents(out)


@pytest.fixture
def samples_read(monkeypatch):
    """The samples that are read from their source."""
    read = []
    make = planning._plan

    def spied(*, read_spied=read, **fields):
        original = fields["read"]
        return make(**{**fields, "read": lambda index: read_spied.append(index) or original(index)})

    monkeypatch.setattr(planning, "_plan", spied)
    return read


def test_packing_again_writes_nothing(small, tmp_path):
    pack(str(small), tmp_path)
    index = tmp_path / "train" / "index.json"
    before = index.stat()
    assert pack(str(small), tmp_path).count("packed before") == 2
    assert index.stat() == before
    save(small / "train" / "ant" / "99.png", 7)
    with pytest.raises(DataError, match="holds something else") as caught:
        pack(str(small), tmp_path)
    assert "--overwrite" in str(caught.value)
    assert index.stat() == before
    assert "61 raw images" in pack(str(small), tmp_path, overwrite=True)


KILLS = """
import os, signal, sys
from pathlib import Path
from distkit.data.packed import plan as planning
from distkit.data.packed.pack import pack

source, out, form = sys.argv[1:]
names = ("fsync", "fdopen", "replace", "open", "mkdir", "unlink", "rmdir")
whole = {name: getattr(os, name) for name in names}

def attempt(fatal):
    "Pack in a child that is killed before its system call number `fatal`; reading a sample counts as one."
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = 0
    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in names:
        setattr(os, name, counted(whole[name]))
    planning.decode = counted(planning.decode)
    planning._file = counted(planning._file)
    pack(source, Path(out), form=form, num_workers=1, shard_bytes=20_000)
    os._exit(0)

fatal, kills = 1, 0
while True:
    status = attempt(fatal)
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    kills += 1
    index = Path(out) / "train" / "index.json"
    if not index.exists() and fatal % 2:
        # What is left is from the last kill; half the time start from nothing, half the time continue from there.
        for path in (Path(out) / "train").glob("*"):
            path.unlink()
    fatal += 1
print(kills)
"""


@pytest.mark.parametrize("form", ["raw", "encoded"])
def test_a_kill_at_any_system_call_leaves_something_to_continue_from(small, tmp_path, form):
    """Killed before call 1, call 2, … and before every sample: the end is the same files bit for bit."""
    shutil.rmtree(small / "test")
    reference = tmp_path / "reference"
    pack(str(small), reference, form=form, shard_bytes=20_000)
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLS, str(small), str(out), form], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
    (out / ".train.lock").unlink(missing_ok=True)  # of a process that was killed when all was done
    assert contents(out) == contents(reference)
    assert len(contents(out)) > 2


SLOW = """
import sys, time
from pathlib import Path
from distkit.data.packed import plan as planning
from distkit.data.packed.pack import pack

decode, file = planning.decode, planning._file
planning.decode = lambda *args, **options: time.sleep(0.02) or decode(*args, **options)
planning._file = lambda *args: time.sleep(0.02) or file(*args)
print(pack(sys.argv[1], Path(sys.argv[2]), num_workers=1, shard_bytes=4096))
"""


def start(code, *args):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_for_shards(folder, least):
    deadline = time.monotonic() + 60
    while len(list(folder.glob("images-*"))) < least:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("form", ["raw", "encoded"])
def test_only_the_missing_shards_are_read_after_a_kill(varied, small, tmp_path, samples_read, capsys, form):
    source = small / "train" if form == "raw" else varied
    expected = whole(source)
    process = start(SLOW, source, tmp_path / "out")
    wait_for_shards(tmp_path / "out" / "train", 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / "train" / "index.json").exists()
    del samples_read[:]
    pack(str(source), tmp_path / "out", shard_bytes=SHARD)
    assert "complete already" in capsys.readouterr().err
    assert 0 < len(samples_read) < (60 if form == "raw" else 40)
    assert contents(tmp_path / "out") == expected


def test_a_damaged_remainder_is_not_trusted(small, tmp_path, samples_read):
    """Of an unfinished pack only shards with the right bytes stay: in the header, a table, an image and a checksum."""
    expected = whole(small)
    out = tmp_path / "out"
    first = "train/images-00000-of-00012.safetensors"
    size = len(expected[first])
    for position in (3, 160, 700, size // 2, size - 1, None):
        shutil.copytree(tmp_path / "reference", out)
        (out / "train" / "index.json").unlink()
        damaged = bytearray(expected[first])
        if position is None:
            del damaged[-100:]
        else:
            damaged[position] ^= 1
        (out / first).write_bytes(damaged)
        del samples_read[:]
        pack(str(small), out, splits=["train"], shard_bytes=SHARD)
        assert samples_read == [0, 1, 2, 3, 4]
        assert contents(out) == expected
        shutil.rmtree(out)


def test_an_unfinished_pack_of_another_source_or_with_other_options_is_refused(small, tmp_path):
    out = tmp_path / "out"
    pack(str(small), out, shard_bytes=SHARD)
    (out / "train" / "index.json").unlink()
    for options in ({"form": "encoded"}, {"shard_bytes": 2 * SHARD}):
        with pytest.raises(DataError, match="files of another, unfinished pack") as caught:
            pack(str(small), out, splits=["train"], **{"shard_bytes": SHARD, **options})
        assert "--overwrite" in str(caught.value)
    os.utime(small / "train" / "ant" / "00.png", ns=(1, 1))
    with pytest.raises(DataError, match="files of another, unfinished pack"):
        pack(str(small), out, splits=["train"], shard_bytes=SHARD)
    pack(str(small), out, splits=["train"], shard_bytes=2 * SHARD, overwrite=True)
    assert len(list((out / "train").glob("images-*"))) == 6
    verify(out / "train")


def test_overwrite_repairs_the_damaged_shards_only(small, tmp_path, samples_read):
    expected = whole(small)
    path = tmp_path / "reference" / "test" / "images-00001-of-00004.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-300] ^= 1
    path.write_bytes(damaged)
    del samples_read[:]
    said = pack(str(small), tmp_path / "reference", shard_bytes=SHARD, overwrite=True)
    assert said.count("packed before") == 1
    assert samples_read == [5, 6, 7, 8, 9]
    assert contents(tmp_path / "reference") == expected


def test_two_processes_do_the_work_once(small, tmp_path):
    expected = whole(small)
    both = [start(SLOW, small, tmp_path / "out") for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    outputs = "".join(out for out, _ in said)
    assert outputs.count("packed before") == 2
    assert contents(tmp_path / "out") == expected


def test_a_dead_writer_blocks_nobody(small, tmp_path):
    expected = whole(small)
    first = start(SLOW, small, tmp_path / "out")
    wait_for_shards(tmp_path / "out" / "train", 3)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(SLOW, small, tmp_path / "out")
    assert second.stderr.readline().startswith("waiting for another process, which is writing ")
    first.kill()
    first.communicate()
    _, err = second.communicate(timeout=60)
    assert second.returncode == 0
    assert "complete already" in err
    assert contents(tmp_path / "out") == expected


def test_a_full_disk_is_an_error_that_can_be_repaired(small, tmp_path, capsys):
    shard_bytes = 16_000  # the third shard is the first that is too large for the limit, because of its paths
    for i in range(30):
        (small / "train" / "bée" / f"{i:02}.png").rename(small / "train" / "bée" / f"{i:02}{'x' * 200}.png")
    expected_in = tmp_path / "reference"
    pack(str(small), expected_in, shard_bytes=shard_bytes)
    expected = contents(expected_in)
    limit = max(len(data) for name, data in expected.items() if name.startswith("train/images")) - 100
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom distkit.commands import run\n"
        f"import distkit.data.packed.pack as p\np.pack.__kwdefaults__['shard_bytes'] = {shard_bytes}\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.exit(run(['data', 'pack', *sys.argv[1:]]))"
    )
    process = start(code, small, tmp_path / "out")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "train cannot be written" in err
    assert "File too large" in err
    assert "Traceback" not in err
    left = sorted(contents(tmp_path / "out"))
    assert left
    assert all(name.startswith("train/images-") for name in left)
    pack(str(small), tmp_path / "out", shard_bytes=shard_bytes)
    assert "complete already" in capsys.readouterr().err
    assert contents(tmp_path / "out") == expected
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_too_little_space_is_known_before_the_work(small, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(DataError, match="10 bytes free"):
        pack(str(small), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_keyboard_stops_it_resumably(small, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_writer, "write_json", interrupt)
    with pytest.raises(Stopped):
        pack(str(small), tmp_path / "out")
    monkeypatch.undo()
    pack(str(small), tmp_path / "out")
    verify(tmp_path / "out" / "train")
    assert json.loads((tmp_path / "out" / "train" / "index.json").read_text())["num_samples"] == 60
