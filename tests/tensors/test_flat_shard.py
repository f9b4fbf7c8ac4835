"""FlatShard: a run of elements as boxes of the whole, and what may be done with it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distkit.tensors.flat_shard import FlatShard

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def shards(draw: st.DrawFn) -> tuple[Tensor, FlatShard]:
    """A whole tensor of consecutive numbers, and any run of its elements."""
    full = torch.arange(math.prod(shape := draw(SHAPES))).view(shape)
    start = draw(st.integers(0, full.numel()))
    stop = draw(st.integers(start, full.numel()))
    return full, FlatShard(full.reshape(-1)[start:stop], shape, start)


@given(shards())
def test_boxes_hold_each_element_once_and_in_order(made: tuple[Tensor, FlatShard]) -> None:
    full, shard = made
    boxes = shard.boxes()
    assert len(boxes) <= max(1, 2 * full.ndim - 1)
    parts = [shard.part(offsets, sizes) for offsets, sizes in boxes]
    found = torch.cat([part.reshape(-1) for part in parts]) if parts else shard.local[:0]
    assert torch.equal(found, full.reshape(-1)[shard.start : shard.start + shard.local.numel()])
    for (offsets, sizes), part in zip(boxes, parts, strict=True):
        assert torch.equal(part, full[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))])
        assert part.is_contiguous()


@given(shards())
def test_it_says_to_checkpoints_what_its_boxes_are(made: tuple[Tensor, FlatShard]) -> None:
    full, shard = made
    items = shard.__create_write_items__("weight", shard)
    for item, chunk in zip(items, shard.__create_chunk_list__(), strict=True):
        assert item.tensor_data is not None
        assert (item.tensor_data.chunk, item.tensor_data.size) == (chunk, full.shape)
        assert shard.__get_tensor_shard__(item.index).shape == chunk.sizes


def test_only_what_goes_element_by_element_can_be_done() -> None:
    shard = FlatShard(torch.ones(3), (2, 4), 1)
    assert repr(shard) == "FlatShard([2, 4], torch.float32, elements 1 to 4)"
    assert (shard.shape, shard.numel(), shard.nbytes) == ((2, 4), 8, 32)
    for other in (shard.clone(), shard.detach(), torch.zeros_like(shard)):
        assert isinstance(other, FlatShard)
        assert (other.shape, other.start, other.local.numel()) == ((2, 4), 1, 3)
    wide = torch.empty_like(shard, dtype=torch.float64)
    assert isinstance(wide, FlatShard)
    assert wide.dtype == wide.local.dtype == torch.float64
    assert {shard: 1}[shard] == 1
    with pytest.raises(TypeError, match="spread over several ranks"):
        shard.add(1)
