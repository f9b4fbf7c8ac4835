"""What was saved is what is loaded, to the bit, whatever the sharding on either side."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.harness import run_ranks
from support.writing import Box, rehash, reseal, write_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from torch.testing._internal.distributed.fake_pg import FakeStore

from distkit.checkpoint import read as read_module
from distkit.checkpoint.format import DTYPES, MAX_STATE_BYTES, STATE, shard_name
from distkit.checkpoint.read import iterate, load_tensors, read_tensor, to_metadata
from distkit.checkpoint.verify import read_manifest, read_state, verify
from distkit.errors import CheckpointError

SHAPES = {"matrix": (7, 6), "vector": (5,), "cube": (3, 4, 5), "scalar": (), "empty": (0, 3), "rowless": (3, 0)}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits at all: NaN with payloads, -0.0, denormals."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty((), dtype=dtype).element_size()
    bits = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).tolist()
    return values


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def load_all(directory: Path, like: dict[str, Tensor], threads: int = 2) -> dict[str, Tensor]:
    targets = {name: torch.zeros_like(tensor, memory_format=torch.contiguous_format) for name, tensor in like.items()}
    load_tensors(directory, read_manifest(directory), targets, threads)
    return targets


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape(tmp_path: Path, dtype: str) -> None:
    saved = {name: random_bits(shape, getattr(torch, dtype)) for name, shape in SHAPES.items()}
    for split, world_size in ((0, 1), (0, 3), (1, 2)):
        directory = write_checkpoint(tmp_path / f"{split}{world_size}", 1, saved, world_size=world_size, split=split)
        manifest = verify(directory)
        loaded = load_all(directory, saved)
        assert all(same(loaded[name], saved[name]) for name in saved)
        assert all(same(read_tensor(directory, manifest, name), saved[name]) for name in saved)


TARGETS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "contiguous": lambda shape: torch.zeros(shape),
    "transposed": lambda shape: torch.zeros(shape[::-1]).permute(tuple(range(len(shape)))[::-1]),
    "with gaps": lambda shape: torch.zeros([2 * size for size in shape])[tuple(slice(0, 2 * n, 2) for n in shape)],
    "in the middle": lambda shape: torch.zeros((3, *shape))[1],
    "a parameter": lambda shape: torch.nn.Parameter(torch.zeros(shape)),
    "a transposed parameter": lambda shape: torch.nn.Parameter(TARGETS["transposed"](shape)),
}


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that come from cutting it again and again."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8)) if shape else 0):
        offsets, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, size[dim]))
        for first, length in ((0, cut), (cut, size[dim] - cut)):
            start = tuple(o + first * (d == dim) for d, o in enumerate(offsets))
            boxes.append((start, tuple(length if d == dim else n for d, n in enumerate(size))))
    return shape, draw(st.permutations(boxes))


@settings(max_examples=80, deadline=None)
@given(tilings(), st.sampled_from(sorted(TARGETS)), st.sampled_from([8, 64, 2**25]), st.sampled_from([0, 8, 2**18]))
def test_any_tiling_into_any_target(tiling: tuple[tuple[int, ...], list[Box]], kind: str, block: int, gap: int) -> None:
    shape, boxes = tiling
    saved = {"w": torch.randn(shape), "other": torch.arange(3)}
    target = TARGETS[kind](shape)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(read_module, "BLOCK_BYTES", block),
        mock.patch.object(read_module, "GAP_BYTES", gap),
    ):
        directory = write_checkpoint(Path(folder), 3, saved, world_size=3, tilings={"w": boxes})
        load_tensors(directory, verify(directory), {"w": target})
    assert same(target, saved["w"])


@contextlib.contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[DeviceMesh]:
    """This process as one of several that do not exist: a collective would not do what it should."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


@settings(max_examples=80, deadline=None)
@given(tilings(), st.integers(1, 4), st.sampled_from([8, 64, 2**25]), st.sampled_from([0, 8, 2**18]), st.data())
def test_any_tiling_into_the_part_of_any_rank(
    tiling: tuple[tuple[int, ...], list[Box]], world_size: int, block: int, gap: int, data: st.DataObject
) -> None:
    shape, boxes = tiling
    dim = data.draw(st.integers(0, len(shape) - 1)) if shape else None
    placement = Replicate() if dim is None else Shard(dim)
    rank = data.draw(st.integers(0, world_size - 1))
    saved = torch.randn(shape)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(read_module, "BLOCK_BYTES", block),
        mock.patch.object(read_module, "GAP_BYTES", gap),
        as_rank(rank, world_size) as mesh,
    ):
        expected = saved
        if dim is not None:  # as torch.chunk: parts of the same size, and the last ones shorter or empty
            size = -(-shape[dim] // world_size)
            start = min(rank * size, shape[dim])
            expected = saved.narrow(dim, start, min(size, shape[dim] - start))
        local = torch.zeros_like(expected, memory_format=torch.contiguous_format)
        target = DTensor.from_local(local, mesh, [placement], run_check=False, shape=saved.shape, stride=saved.stride())
        directory = write_checkpoint(Path(folder), 3, {"w": saved}, world_size=3, tilings={"w": boxes})
        load_tensors(directory, verify(directory), {"w": target})
    assert same(local, expected)


def test_a_large_gap_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = torch.randn(6, 1000)
    directory = write_checkpoint(tmp_path, 1, {"w": saved}, world_size=1)
    manifest = verify(directory)
    sizes: list[int] = []
    read = read_module.OpenFile.read_into

    def counted(self: read_module.OpenFile, start: int, target: memoryview) -> None:
        sizes.append(target.nbytes)
        read(self, start, target)

    for gap, expected in ((2000, [1000] * 6), (3000, [5 * 4000 + 1000])):
        local = torch.zeros(6, 250)
        with as_rank(2, 4) as mesh, monkeypatch.context() as patch:
            patch.setattr(read_module, "GAP_BYTES", gap)
            patch.setattr(read_module.OpenFile, "read_into", counted)
            target = DTensor.from_local(local, mesh, [Shard(1)], run_check=False, shape=saved.shape, stride=(1000, 1))
            sizes.clear()
            load_tensors(directory, manifest, {"w": target})
        assert sizes[2:] == expected  # after the length of the header, and the header
        assert same(local, saved[:, 500:750])


def test_reads_are_no_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {"w": torch.randn(64, 48)}
    sizes: list[int] = []
    read = read_module.OpenFile.read_into

    def counted(self: read_module.OpenFile, start: int, target: memoryview) -> None:
        sizes.append(target.nbytes)
        read(self, start, target)

    for split, gap in itertools.product((0, 1), (0, 2**18)):
        directory = write_checkpoint(tmp_path / f"{split}{gap}", 1, saved, split=split)
        monkeypatch.setattr(read_module, "BLOCK_BYTES", 1024)
        monkeypatch.setattr(read_module, "GAP_BYTES", gap)
        manifest = verify(directory)
        with monkeypatch.context() as patch:
            patch.setattr(read_module.OpenFile, "read_into", counted)
            sizes.clear()
            target = torch.zeros(64, 48) if gap else torch.zeros(48, 64).t()
            load_tensors(directory, manifest, {"w": target})
        assert same(target, saved["w"])
        assert max(size for size in sizes if size != 8) <= 1024


def test_two_names_of_one_tensor_and_no_name(tmp_path: Path) -> None:
    saved = {"a": torch.randn(3), "b": torch.randn(3)}
    directory = write_checkpoint(tmp_path, 1, saved)
    load_tensors(directory, read_manifest(directory), {})
    target = torch.zeros(6)
    load_tensors(directory, read_manifest(directory), {"a": target[:3], "b": target[3:]})
    assert same(target, torch.cat([saved["a"], saved["b"]]))


def test_conjugated_targets_get_the_values(tmp_path: Path) -> None:
    saved = {"z": random_bits((4,), torch.complex64).nan_to_num(1.0)}
    directory = write_checkpoint(tmp_path, 1, saved)
    memory = torch.zeros(4, dtype=torch.complex64)
    load_tensors(directory, read_manifest(directory), {"z": memory.conj()})
    assert torch.equal(memory, saved["z"].conj())


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ({"model/z": torch.zeros(3)}, "there is no tensor model/z"),
        ({"model/a": torch.zeros(3, dtype=torch.float64)}, "model/a is float32 [3], to be loaded into float64 [3]"),
        ({"model/a": torch.zeros(1, 3)}, "model/a is float32 [3], to be loaded into float32 [1, 3]"),
        ({"model/a": torch.zeros(2)}, "to be loaded into float32 [2]"),
        ({"model/a": torch.zeros(3, device="meta")}, "without memory"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path: Path, targets: dict[str, Tensor], reason: str) -> None:
    directory = write_checkpoint(tmp_path, 1, {"model/a": torch.ones(3), "model/b": torch.ones(4)})
    other = torch.full((4,), -1.0)
    with pytest.raises(CheckpointError) as caught:
        load_tensors(directory, read_manifest(directory), {"model/b": other, **targets})
    assert str(caught.value).startswith(f"{directory}: ")
    assert reason in str(caught.value)
    assert same(other, torch.full((4,), -1.0))


def test_a_file_that_lost_bytes_after_it_was_verified(tmp_path: Path) -> None:
    saved = {f"t{i}": torch.randn(8, 4) for i in range(4)}
    directory = write_checkpoint(tmp_path, 1, saved)
    manifest = verify(directory)
    os.truncate(directory / shard_name(1, 2, 0), 300)
    targets = {name: torch.zeros(8, 4) for name in saved}
    with pytest.raises(CheckpointError, match="shard-00001"):
        load_tensors(directory, manifest, targets)
    assert not any(bool(target.any()) for target in targets.values())
    (directory / shard_name(1, 2, 0)).unlink()
    with pytest.raises(CheckpointError, match="missing file shard-00001"):
        read_tensor(directory, manifest, "t0")
    with pytest.raises(CheckpointError, match="no tensor t9"):
        read_tensor(directory, manifest, "t9")


def test_iterate_goes_by_name_and_reads_each_header_once(tmp_path: Path) -> None:
    saved = {f"{part}/{name}": torch.randn(4, 2) for part in ("model", "ema") for name in "cab"}
    directory = write_checkpoint(tmp_path, 1, saved)
    manifest = read_manifest(directory)
    with mock.patch.object(read_module, "read_header", wraps=read_module.read_header) as read_header:
        got = list(iterate(directory, manifest))
    assert read_header.call_count == 2
    assert [name for name, _ in got] == sorted(saved)
    assert all(same(tensor, saved[name]) for name, tensor in got)
    assert [name for name, _ in iterate(directory, manifest, "ema/")] == ["ema/a", "ema/b", "ema/c"]
    assert list(iterate(directory, manifest, "optimizer/")) == []


def test_metadata_is_what_the_planners_of_torch_expect(tmp_path: Path) -> None:
    boxes: list[Box] = [((0, 0), (2, 3)), ((2, 0), (0, 3)), ((2, 0), (2, 3))]
    directory = write_checkpoint(tmp_path, 1, {"w": torch.zeros(4, 3)}, tilings={"w": boxes})
    metadata = to_metadata(read_manifest(directory))
    assert isinstance(metadata, Metadata)
    stored = metadata.state_dict_metadata["w"]
    assert isinstance(stored, TensorStorageMetadata)
    assert (stored.size, stored.properties.dtype) == (torch.Size([4, 3]), torch.float32)
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in stored.chunks] == [boxes[0], boxes[2]]
    assert metadata.storage_data[MetadataIndex("w", (2, 0))].shape == (2, 3)
    assert len(metadata.storage_data) == 2


def test_state(tmp_path: Path) -> None:
    state = {"version": 1, "step": 4, "parts": {"a": [1, 2.5, None]}}
    directory = write_checkpoint(tmp_path, 4, {}, state=state)
    verify(directory)
    assert read_state(directory) == state
    for content in (b"", b"[]", b"{", b"[" * 10**6, b"\x80\x04.", b"9" * 5000):
        (directory / STATE).write_bytes(content)
        rehash(directory, STATE)
        verify(directory)
        with pytest.raises(CheckpointError, match=r"state\.json"):
            read_state(directory)
    os.truncate(directory / STATE, MAX_STATE_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than"):
        read_state(directory)
    (directory / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"missing file state\.json"):
        read_state(directory)


def test_a_lie_about_the_place_is_not_followed(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 1, {"a": torch.randn(4), "b": torch.randn(4)}, world_size=1)

    def exchange(manifest: dict[str, dict[str, dict[str, list[dict[str, object]]]]]) -> None:
        manifest["tensors"]["a"]["shards"][0]["key"] = "c"

    reseal(directory, exchange)
    with pytest.raises(CheckpointError, match="does not hold c, a shard of tensor a"):
        read_tensor(directory, read_manifest(directory), "a")


WIDE = {
    "rows": torch.arange(35.0).view(7, 5),
    "columns": torch.arange(24, dtype=torch.bfloat16).view(4, 6),
    "one row": torch.arange(3.0).view(1, 3),
    "whole": torch.arange(6).view(2, 3),
    "nothing": torch.zeros(0, 4),
    "plain": torch.arange(9.0).view(3, 3),
}


def load_dtensors(folder: str) -> dict[str, list[int]]:
    """Each rank loads its parts by itself; the bits of what it got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    placements = {"rows": Shard(0), "columns": Shard(1), "one row": Shard(0), "whole": Replicate(), "nothing": Shard(0)}
    targets: dict[str, Tensor] = {
        name: zeros(*WIDE[name].shape, dtype=WIDE[name].dtype, device_mesh=mesh, placements=[placement])
        for name, placement in placements.items()
    }
    targets["rows"] = torch.nn.Parameter(targets["rows"])
    targets["plain"] = torch.zeros(3, 3)
    directory = Path(folder)
    manifest = read_manifest(directory)
    dist.barrier()
    if dist.get_rank() == 1:  # a collective would wait for rank 0 here
        load_tensors(directory, manifest, {"rows": targets["rows"]})
        dist.barrier()
    else:
        dist.barrier()
        load_tensors(directory, manifest, {"rows": targets["rows"]})
    load_tensors(directory, manifest, {name: target for name, target in targets.items() if name != "rows"})
    with pytest.raises(CheckpointError, match="float32"):
        load_tensors(directory, manifest, {"rows": zeros(14, 5, device_mesh=mesh, placements=[Shard(0)])})
    wholes = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in targets.items()}
    assert all(same(whole, WIDE[name]) for name, whole in wholes.items())
    locals_ = {name: t.to_local() for name, t in targets.items() if isinstance(t, DTensor)}
    dist.destroy_process_group()
    return {name: list(local.shape) for name, local in locals_.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("split", [0, 1])
def test_saved_on_three_ranks_loaded_on_two(tmp_path: Path, split: int) -> None:
    directory = write_checkpoint(tmp_path, 9, WIDE, world_size=3, split=split)
    shapes = run_ranks(load_dtensors, 2, str(directory))
    assert [rank["rows"] for rank in shapes] == [[4, 5], [3, 5]]
    assert [rank["columns"] for rank in shapes] == [[4, 3], [4, 3]]
    assert shapes[1]["one row"] == [0, 3]
