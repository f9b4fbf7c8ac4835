"""Every way in which a directory is not the checkpoint that was written is seen, named, and never executed."""

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.writing import rehash, reseal, write_checkpoint

from distkit.checkpoint import verify as verify_module
from distkit.checkpoint.format import MANIFEST, MAX_MANIFEST_BYTES, STATE, shard_name
from distkit.checkpoint.read import load_tensors
from distkit.checkpoint.verify import check_file, check_listing, read_manifest, read_state, verify
from distkit.errors import CheckpointError

FIRST, SECOND = shard_name(0, 2, 0), shard_name(1, 2, 0)
TENSORS = {
    "model/weight": torch.arange(12.0).view(4, 3),
    "model/bias": torch.arange(6, dtype=torch.float32),
    "optimizer/weight/step": torch.tensor(3.0),
}
Header = dict[str, Any]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, 7, TENSORS)


def refusal(directory: Path, **options: Any) -> str:
    """The message of the CheckpointError, without the directory that it begins with."""
    with pytest.raises(CheckpointError) as caught:
        verify(directory, **options)
    message = str(caught.value)
    assert message.startswith(f"{directory}: ")
    assert message.isprintable()  # one line
    return message.removeprefix(f"{directory}: ")


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def header_of(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_header(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_an_untouched_checkpoint_verifies(directory: Path) -> None:
    manifest = verify(directory)
    assert manifest == read_manifest(directory)
    assert manifest.step == 7
    assert set(manifest.files) == {STATE, FIRST, SECOND}
    for name in manifest.files:
        check_file(directory, manifest, name)
    assert verify(directory, threads=1) == verify(directory, threads=8) == manifest


def test_a_flipped_bit_is_seen_wherever_it_is(directory: Path) -> None:
    length = struct.unpack("<Q", (directory / FIRST).read_bytes()[:8])[0]
    size = (directory / FIRST).stat().st_size
    places = {FIRST: (0, 7, 8, 20, 7 + length, 8 + length, size - 1), STATE: (0, 5, -1), MANIFEST: (0, 50, -1)}
    for name, positions in places.items():
        original = (directory / name).read_bytes()
        for position in positions:
            for bit in (0, 5, 7):
                flip(directory / name, position, bit)
                assert name in refusal(directory)
                (directory / name).write_bytes(original)
    verify(directory)


@pytest.mark.parametrize("name", [FIRST, STATE])
def test_truncated_and_grown_files(directory: Path, name: str) -> None:
    size = (directory / name).stat().st_size
    for other in (size - 1, size // 2, 0, size + 1):
        os.truncate(directory / name, other)
        assert refusal(directory) == f"{name} has {other} bytes, the manifest says {size}"


@pytest.mark.parametrize("name", [FIRST, SECOND, STATE, MANIFEST])
def test_missing_files(directory: Path, name: str) -> None:
    (directory / name).unlink()
    assert refusal(directory) == f"missing file {name}"


def test_swapped_shards(directory: Path) -> None:
    os.rename(directory / FIRST, directory / "x")
    os.rename(directory / SECOND, directory / FIRST)
    os.rename(directory / "x", directory / SECOND)
    message = refusal(directory)
    assert FIRST in message
    assert "bytes" in message
    rehash(directory, FIRST, SECOND)
    assert "does not hold" in refusal(directory)


def test_additional_files_and_folders(directory: Path) -> None:
    for name in ("x", ".hidden", shard_name(5, 6, 0), "a\x1b[31m\nb"):
        (directory / name).write_bytes(b"")
        assert "unexpected file" in refusal(directory)
        (directory / name).unlink()
    (directory / "folder").mkdir()
    assert refusal(directory) == "unexpected file folder"
    manifest = read_manifest(directory)
    with pytest.raises(CheckpointError, match="unexpected file folder"):
        check_listing(directory, manifest)


def test_broken_manifests(directory: Path) -> None:
    path = directory / MANIFEST
    whole = path.read_bytes()
    for data in (b"", b"{", b"null", whole[:-20], whole.replace(b"tiny", b"tidy"), b"\xff\xfe" + whole):
        path.write_bytes(data)
        assert MANIFEST in refusal(directory)
    os.truncate(path, MAX_MANIFEST_BYTES + 1)
    assert refusal(directory).startswith(f"{MANIFEST} has {MAX_MANIFEST_BYTES + 1} bytes")


def test_a_newer_version_says_so(directory: Path) -> None:
    reseal(directory, lambda manifest: manifest.update(version=2))
    assert "newer distkit" in refusal(directory)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/hostname", "..", "a/b", "weights.pt", "\x1b[2J", "x\ny", "MANIFEST.json"]
)
def test_no_name_leaves_the_directory(directory: Path, name: str) -> None:
    (directory.parent / "x").write_bytes((directory / FIRST).read_bytes())

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(FIRST)
        for entry in manifest["tensors"].values():
            for shard in entry["shards"]:
                shard["file"] = shard["file"].replace(FIRST, name)

    reseal(directory, change)
    assert "file name" in refusal(directory)


def test_overlapping_shards(directory: Path) -> None:
    reseal(directory, lambda manifest: manifest["tensors"]["model/weight"]["shards"][1].update(offsets=[1, 0]))
    assert "exactly once" in refusal(directory)


def test_two_tensors_in_one_place(directory: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"]["model/copy"] = manifest["tensors"]["model/bias"]

    reseal(directory, change)
    assert "of tensor model/bias and of tensor model/copy" in refusal(directory)


def test_symlinks_are_not_followed(directory: Path) -> None:
    for name in (FIRST, STATE, MANIFEST):
        os.rename(directory / name, directory.parent / name)
        (directory / name).symlink_to(directory.parent / name)
        assert refusal(directory) == f"{name} is a symlink"
        assert refusal(directory, files=[]) == f"{name} is a symlink"
        if name == FIRST:  # also by who opens it without looking at the listing
            with pytest.raises(CheckpointError, match=f"{FIRST} is a symlink"):
                check_file(directory, read_manifest(directory), FIRST)
        os.rename(directory.parent / name, directory / name)
    verify(directory)


def test_the_directory_is_one(directory: Path) -> None:
    link = directory.parent / "link"
    link.symlink_to(directory)
    assert refusal(link) == "is a symlink"
    assert refusal(directory / STATE) == "is not a directory"
    assert refusal(directory.parent / "nothing") == "is not a directory"


def test_a_renamed_step(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("step-000000008", "step-7", "step-"):
        renamed = directory.rename(directory.with_name(name))
        assert "is for step 7" in refusal(renamed)
        directory = renamed
    monkeypatch.chdir(directory)
    assert "is for step 7" in refusal(Path("."))
    copy = shutil.copytree(directory, directory.with_name("keep-this"))
    assert verify(copy).step == 7


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_not_waited_for(directory: Path) -> None:
    manifest = read_manifest(directory)
    for name in (FIRST, STATE, MANIFEST):
        os.rename(directory / name, directory.parent / name)
        os.mkfifo(directory / name)
        assert refusal(directory) == f"{name} is not a regular file"
        if name != MANIFEST:
            with pytest.raises(CheckpointError, match="is not a regular file"):
                check_file(directory, manifest, name)
        (directory / name).unlink()
        (directory / name).mkdir()
        assert refusal(directory) == f"{name} is not a regular file"
        (directory / name).rmdir()
        os.rename(directory.parent / name, directory / name)
    verify(directory)


def test_a_share_of_the_files(directory: Path) -> None:
    flip(directory / SECOND, -1)
    verify(directory, [])
    verify(directory, [FIRST, STATE])
    assert SECOND in refusal(directory, files=[SECOND])
    assert "does not list" in refusal(directory, files=["../x"])
    (directory / "x").touch()
    assert "unexpected" in refusal(directory, files=[])


def test_many_threads_and_one_bad_file(tmp_path: Path) -> None:
    tensors = {f"model/{i}": torch.full((3,), float(i)) for i in range(40)}
    directory = write_checkpoint(tmp_path, 1, tensors, world_size=40)
    verify(directory, threads=6)
    flip(directory / shard_name(31, 40, 0), -1)
    for threads in (1, 2, 6):
        assert shard_name(31, 40, 0) in refusal(directory, threads=threads)


def _changed(key: str, **values: object) -> Callable[[Header], object]:
    return lambda header: header[key].update(values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_changed("model/bias#0", dtype="I32"), "as I32 [3], tensor model/bias needs F32 [3]"),
        (_changed("model/bias#0", shape=[1, 3]), "needs F32 [3]"),
        (_changed("model/bias#0", shape=[4]), "needs F32 [3]"),
        (_changed("model/bias#0", data_offsets=[0, 8]), "gives model/bias#0 8 bytes"),
        (_changed("model/bias#0", data_offsets=[12, 0]), "gives model/bias#0 -12 bytes"),
        (_changed("model/bias#0", data_offsets=[1, 13]), "a gap or an overlap"),
        (_changed("model/weight#0", data_offsets=[0, 24]), "a gap or an overlap"),
        (_changed("model/bias#0", data_offsets=[-12, 0]), "malformed"),
        (_changed("model/bias#0", data_offsets=[0.0, 12.0]), "malformed"),
        (_changed("model/bias#0", data_offsets=[False, 12]), "malformed"),
        (_changed("model/bias#0", data_offsets=[0, 12, 12]), "malformed"),
        (_changed("model/bias#0", data_offsets="ab"), "malformed"),
        (_changed("model/bias#0", shape=None), "malformed"),
        (_changed("model/bias#0", dtype=[]), "malformed"),
        (lambda header: header["model/bias#0"].pop("dtype"), "malformed"),
        (lambda header: header.update({"model/bias#0": []}), "malformed"),
        (lambda header: header.pop("model/bias#0"), "does not hold model/bias#0, a shard of tensor model/bias"),
        (lambda header: header.update(z={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "does not list"),
    ],
)
def test_a_header_that_contradicts_the_manifest(
    directory: Path, change: Callable[[Header], object], reason: str
) -> None:
    header, data = header_of(directory / FIRST)
    change(header)
    put_header(directory / FIRST, header, data)
    rehash(directory, FIRST)
    message = refusal(directory)
    assert FIRST in message
    assert reason in message
    target = {name: torch.full_like(tensor, -1) for name, tensor in TENSORS.items()}
    with pytest.raises(CheckpointError):
        load_tensors(directory, read_manifest(directory), target)
    assert all(bool((tensor == -1).all()) for tensor in target.values())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 10**6) + b"[" * 10**6,
        struct.pack("<Q", 2) + b"\xff\xfe",
    ],
    ids=["empty", "short", "bomb", "too-long", "list", "null", "deep", "no-text"],
)
def test_files_that_are_no_safetensors(directory: Path, content: bytes) -> None:
    (directory / FIRST).write_bytes(content)
    rehash(directory, FIRST)
    assert FIRST in refusal(directory)


def test_bytes_behind_the_data_and_huge_headers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = (directory / FIRST).read_bytes()
    (directory / FIRST).write_bytes(original + b"\0")
    rehash(directory, FIRST)
    assert "its header says" in refusal(directory)
    (directory / FIRST).write_bytes(original)
    rehash(directory, FIRST)
    verify(directory)
    monkeypatch.setattr(verify_module, "MAX_HEADER_BYTES", 40)
    assert "claims a header" in refusal(directory)


def test_a_header_may_have_metadata(directory: Path) -> None:
    header, data = header_of(directory / FIRST)
    put_header(directory / FIRST, {**header, "__metadata__": {"format": "pt"}}, data)
    rehash(directory, FIRST)
    verify(directory)


class Canary:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def load(directory: Path) -> None:
    load_tensors(directory, read_manifest(directory), {name: torch.zeros_like(t) for name, t in TENSORS.items()})


def test_a_smuggled_pickle_is_never_executed(directory: Path, tmp_path: Path) -> None:
    alive = tmp_path / "canary"
    payload = pickle.dumps(Canary(alive))
    pickle.loads(payload)
    alive.rmdir()  # it sings
    torch.save({"x": Canary(alive)}, tmp_path / "saved.pt")

    for name in ("model.pkl", "model.pt", ".metadata", "__0_0.distcp", "x.safetensors", shard_name(2, 3, 0)):
        for data in (payload, (tmp_path / "saved.pt").read_bytes()):
            (directory / name).write_bytes(data)
            assert "unexpected file" in refusal(directory)
        (directory / name).unlink()

    for name, read in ((FIRST, load), (STATE, read_state), (MANIFEST, read_manifest)):
        original = (directory / name).read_bytes()
        (directory / name).write_bytes(payload)
        if name != MANIFEST:
            rehash(directory, name)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            read(directory)
        (directory / name).write_bytes(original)
        if name != MANIFEST:
            rehash(directory, name)
    verify(directory)
    assert not alive.exists()


def test_a_shard_of_another_checkpoint(directory: Path) -> None:
    header, _ = header_of(directory / FIRST)
    save_file({key: torch.ones(value["shape"]) for key, value in header.items()}, directory / FIRST)
    assert (directory / FIRST).stat().st_size == read_manifest(directory).files[FIRST].bytes
    assert "sha256" in refusal(directory)
