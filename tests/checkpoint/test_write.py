"""Files: the bytes of the safetensors library, the right hash, nothing half."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distkit.checkpoint.format import DTYPES
from distkit.checkpoint.plan import Piece
from distkit.checkpoint.shard_file import ShardFile, tensor_bytes
from distkit.checkpoint.staging import allocate
from distkit.checkpoint.write import write_file
from distkit.tensors.spec import dtype_name

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 2**20 - 1, 2**20, 2**20 + 4096, 9 * 2**20 + 17])
def test_every_size_is_written_whole_and_hashed(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    buffer = allocate(max(size, 1), CPU)
    buffer[:size] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if size else buffer[:0]
    calls = []
    entry = write_file(tmp_path / "f", tensor_bytes(buffer[:size]), halfway=lambda: calls.append("half"),
                       before_sync=lambda: calls.append("sync"))  # fmt: skip
    assert (tmp_path / "f").read_bytes() == data
    assert (entry.bytes, entry.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert calls == ["half", "sync"]
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


def test_memory_that_is_not_aligned_is_written_all_the_same(tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20 + 5)
    write_file(tmp_path / "f", memoryview(data)[5:])
    assert (tmp_path / "f").read_bytes() == data[5:]


def test_staging_lies_in_private_memory_for_which_huge_pages_are_asked() -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("no Linux")
    buffer = allocate(2**24, CPU)
    area, flags = "", []
    for line in smaps.read_text().splitlines():
        first = line.split()[0]
        if "-" in first and ":" not in first:
            area = first
        elif first == "VmFlags:" and int(area.split("-")[0], 16) <= buffer.data_ptr() < int(area.split("-")[1], 16):
            flags = line.split()[1:]
    # hg: huge pages asked for; dc: not copied into a worker that is forked; sh: shared, which gets no huge pages
    assert {"hg", "dc"} <= set(flags)
    assert "sh" not in flags


class Runtime:
    """CUDA's calls for host memory."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.pinned, self.asked = error, {}, 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.asked += nbytes
        if not self.error:
            self.pinned[address] = (nbytes, flags)
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0


def test_staging_for_a_gpu_is_pinned_to_the_byte_and_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, here = Runtime(), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: here.append(device) or contextlib.nullcontext())
    gpu = torch.device("cuda", 3)
    buffer = allocate(5 * 2**20 + 1, gpu)
    assert runtime.pinned == {buffer.data_ptr(): (5 * 2**20 + 1, 1)}
    assert here == [gpu]
    part = buffer[7:9].fill_(1)
    del buffer
    gc.collect()
    assert runtime.pinned
    del part
    gc.collect()
    assert not runtime.pinned
    assert here == [gpu, gpu]
    runtime.error = 2
    with pytest.raises(RuntimeError, match=r"cannot pin 4,096 bytes .* error 2"):
        allocate(4096, gpu)
    assert runtime.asked == 5 * 2**20 + 1 + 4096


def test_a_file_system_without_direct_writes(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no tmpfs")
    path = shm / f"distkit-test-{os.getpid()}"
    try:
        data = os.urandom(2**21)
        assert write_file(path, memoryview(data)).sha256 == hashlib.sha256(data).hexdigest()
        assert path.read_bytes() == data
    finally:
        path.unlink(missing_ok=True)


def test_nothing_that_exists_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("old", "link"):
        with pytest.raises(OSError, match=name) as caught:
            write_file(tmp_path / name, memoryview(b"new"))
        assert caught.value.errno in (errno.EEXIST, errno.ELOOP)
    assert not (tmp_path / "target").exists()


def test_a_shard_file_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {name: torch.randint(0, 2, (3, 5)).to(getattr(torch, name)) for name in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "rows": torch.randn(6, 4).t()}
    pieces = [Piece(name, (0,) * t.ndim, tuple(t.shape), dtype_name(t)) for name, t in tensors.items()]
    file = ShardFile(pieces)
    buffer = allocate(file.nbytes, CPU)
    file.fill_(buffer, lambda piece: tensors[piece.name])
    write_file(tmp_path / "a.safetensors", tensor_bytes(buffer[: file.nbytes]))
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8) if tensor.ndim else loaded[name],
                           tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor), name  # fmt: skip
