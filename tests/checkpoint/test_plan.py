"""Who writes what: every byte once, spread evenly, the same decision on every rank."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distkit.checkpoint import plan as planning
from distkit.checkpoint.format import FileEntry, Manifest, dump_manifest, parse_manifest
from distkit.checkpoint.plan import Layout, global_layout, local_plan, piece_of
from distkit.errors import CheckpointError


def layout_of(shared: dict[str, Tensor], world_size: int, own: list[dict[str, Tensor]] | None = None) -> Layout:
    plans = [local_plan(shared, own[rank] if own else {}, rank, world_size) for rank in range(world_size)]
    return global_layout(plans)


def accepted(layout: Layout) -> Manifest:
    """The manifest of `layout` as a reader takes it: tiles, names and overlaps are checked there."""
    entry = FileEntry(1, "0" * 64)
    files = {name: entry for held in layout.files for name in held} | {"state.json": entry}
    manifest = Manifest(step=1, recipe="r", strategy="ddp", world_size=len(layout.files), created="", versions={},
                        files=files, tensors=layout.tensors)  # fmt: skip
    return parse_manifest(dump_manifest(manifest))


def rebuild(layout: Layout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = {name: torch.full(entry.shape, -1, dtype=getattr(torch, entry.dtype))
             for name, entry in layout.tensors.items()}  # fmt: skip
    for held in layout.files:
        for pieces in held.values():
            for piece in pieces:
                part = whole[piece.name]
                for dim, (start, length) in enumerate(zip(piece.offsets, piece.shape, strict=True)):
                    part = part.narrow(dim, start, length)
                part.copy_(piece_of(tensors, piece))
    return whole


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6),
    world_size=st.integers(1, 5),
    spread=st.integers(1, 2_000),
    split=st.integers(1, 5_000),
)
def test_every_element_is_written_once(shapes: list[list[int]], world_size: int, spread: int, split: int) -> None:
    patch = pytest.MonkeyPatch()
    try:
        for name, value in (("SPREAD_BYTES", spread), ("MIN_FILE_BYTES", split), ("MAX_FILE_BYTES", split)):
            patch.setattr(planning, name, value)
        tensors = {f"t{i}": torch.arange(math.prod(s), dtype=torch.int32).reshape(s) for i, s in enumerate(shapes)}
        layout = layout_of(tensors, world_size)
        accepted(layout)
        whole = rebuild(layout, tensors)
        assert all(torch.equal(whole[name], tensor) for name, tensor in tensors.items())
    finally:
        patch.undo()


def test_replicated_bytes_are_spread_evenly() -> None:
    tensors = {f"layer{i}": torch.zeros(64, 1000) for i in range(20)} | {"embedding": torch.zeros(5_000, 300)}
    layout = layout_of(tensors, 4)
    sizes = [sum(piece.nbytes for pieces in held.values() for piece in pieces) for held in layout.files]
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())
    assert max(sizes) < 1.1 * min(sizes)


def test_what_a_rank_has_alone_it_writes_itself() -> None:
    own = [{f"rng/{rank:05d}/torch": torch.zeros(5_000, dtype=torch.uint8)} for rank in range(3)]
    layout = layout_of({"w": torch.zeros(4)}, 3, own)
    for rank, held in enumerate(layout.files):
        names = {piece.name for pieces in held.values() for piece in pieces}
        assert f"rng/{rank:05d}/torch" in names
    assert set(layout.tensors) == {"w", *(name for one in own for name in one)}


def test_much_goes_into_several_files_of_about_the_same_size() -> None:
    layout = layout_of({"large": torch.zeros(2**22, 8, dtype=torch.float32), "small": torch.zeros(3)}, 1)
    sizes = [sum(piece.nbytes for piece in pieces) for pieces in layout.files[0].values()]
    assert 2 <= len(sizes) <= 8
    assert max(sizes) - min(sizes) < 1_000


def test_keys_do_not_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SPREAD_BYTES", 1)
    tensors = {"a": torch.arange(4), "a@1": torch.arange(3), "a@@1": torch.arange(2)}
    for world_size in (1, 2, 4):
        layout = layout_of(tensors, world_size)
        accepted(layout)
        for held in layout.files:
            for pieces in held.values():
                assert len({piece.key for piece in pieces}) == len(pieces)


def test_a_name_that_no_terminal_should_see_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot be printed"):
        local_plan({"a\x1b[2J": torch.zeros(2)}, {}, 0, 1)


def test_a_dtype_that_no_file_can_hold_is_named() -> None:
    with pytest.raises(CheckpointError, match="tensor z has dtype"):
        local_plan({"z": torch.zeros(2, dtype=torch.complex128)}, {}, 0, 1)
