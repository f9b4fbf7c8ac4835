"""The manifest: what is written is what is read, and what was changed or made up is refused."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.writing import sealed

from distkit.checkpoint.format import (
    DTYPES,
    STATE,
    FileEntry,
    Manifest,
    Shard,
    TensorEntry,
    dump_manifest,
    parse_manifest,
    shard_name,
    step_name,
    step_of,
)
from distkit.errors import CheckpointError

FIRST, SECOND = shard_name(0, 2, 0), shard_name(1, 2, 0)
MANIFEST = Manifest(
    step=500,
    recipe="tiny",
    strategy="ddp",
    world_size=2,
    created="2026-01-02T03:04:05+00:00",
    versions={"distkit": "0", "torch": "2.11"},
    files={STATE: FileEntry(2, "0" * 64), FIRST: FileEntry(400, "a1" * 32), SECOND: FileEntry(300, "b2" * 32)},
    tensors={
        "model/weight": TensorEntry(
            "float32", (4, 3), (Shard(FIRST, "w0", (0, 0), (2, 3)), Shard(SECOND, "w1", (2, 0), (2, 3)))
        ),
        "optimizer/weight/step": TensorEntry("int64", (), (Shard(FIRST, "s", (), ()),)),
        "model/nothing": TensorEntry("bfloat16", (0, 7), (Shard(SECOND, "n", (0, 0), (0, 7)),)),
    },
)


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest after `change`, with the digest that fits."""
    value = json.loads(dump_manifest(MANIFEST))
    change(value)
    return sealed(value)


def refusal(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse_manifest(data)
    return str(caught.value)


def test_names() -> None:
    assert step_name(500) == "step-000000500"
    assert step_of("step-000000500") == 500
    assert step_of(step_name(10**12)) == 10**12
    for other in ("step-500", "step-0000000500", ".tmp-step-000000500", "step-000000500/", "step-00000050x", ""):
        assert step_of(other) is None
    assert shard_name(1, 16, 2) == "shard-00001-of-00016-002.safetensors"


def test_round_trip() -> None:
    assert parse_manifest(dump_manifest(MANIFEST)) == MANIFEST
    assert MANIFEST.nbytes() == 702
    assert MANIFEST.tensors["model/weight"].nbytes == 48
    assert MANIFEST.tensors["optimizer/weight/step"].nbytes == 8
    assert parse_manifest(changed(lambda value: None)) == MANIFEST


def test_every_flipped_bit_is_seen() -> None:
    data = dump_manifest(MANIFEST)
    for position, bit in itertools.product(range(len(data)), range(8)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        with pytest.raises(CheckpointError):
            parse_manifest(bytes(flipped))


def test_every_truncation_is_seen() -> None:
    data = dump_manifest(MANIFEST)
    for length in range(len(data) - 1):
        with pytest.raises(CheckpointError):
            parse_manifest(data[:length])


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"\x80\x04K\x01.", b"[" * 10**6, b"9" * 10**5, b'{"format": "distkit-checkpoint"}'],
    ids=["empty", "object", "list", "null", "pickle", "deep", "number", "no-version"],
)
def test_what_is_no_manifest(data: bytes) -> None:
    assert refusal(data).startswith("MANIFEST.json")


def test_other_versions_say_so() -> None:
    assert "newer distkit" in refusal(changed(lambda value: value.update(version=2)))
    assert "unknown" in refusal(changed(lambda value: value.update(version="1")))
    assert "not the manifest" in refusal(changed(lambda value: value.update(format="torch")))


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "..",
        ".",
        "",
        "MANIFEST.json",
        "weights.pt",
        f"../{FIRST}",
        f"{FIRST}/../x",
        f"{FIRST}\n",
        f"{FIRST}\0",
        "shard-0-of-2-0.safetensors",
        "x" * 4000,
    ],
)
def test_file_names_that_are_not_ours(name: str) -> None:
    listed = changed(lambda value: value["files"].update({name: value["files"][FIRST]}))
    used = changed(lambda value: value["tensors"]["model/weight"]["shards"][0].update(file=name))
    for data in (listed, used):
        message = refusal(data)
        assert "malformed" in message
        assert "file name" in message
        assert len(message) < 300


def test_a_tensor_in_a_file_that_is_not_listed() -> None:
    assert "not listed" in refusal(changed(lambda value: value["files"].pop(SECOND)))
    assert "no state.json" in refusal(changed(lambda value: value["files"].pop(STATE)))
    inside = changed(lambda value: value["tensors"]["model/weight"]["shards"][0].update(file=STATE))
    assert "not listed" in refusal(inside)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("step",), -1),
        (("step",), True),
        (("step",), 1.5),
        (("step",), 2**63),
        (("world_size",), "2"),
        (("recipe",), None),
        (("versions",), ["torch"]),
        (("versions", "torch"), 2),
        (("files",), [FIRST]),
        (("files", FIRST), 400),
        (("files", FIRST, "bytes"), -1),
        (("files", FIRST, "sha256"), "A1" * 32),
        (("files", FIRST, "sha256"), "a1"),
        (("tensors",), None),
        (("tensors", "model/weight"), []),
        (("tensors", "model/weight", "dtype"), "object"),
        (("tensors", "model/weight", "dtype"), "__class__"),
        (("tensors", "model/weight", "shape"), "43"),
        (("tensors", "model/weight", "shape"), [4, -3]),
        (("tensors", "model/weight", "shape"), [1] * 65),
        (("tensors", "model/weight", "shards"), {"file": FIRST}),
        (("tensors", "model/weight", "shards"), [[]]),
    ],
)
def test_malformed_values(path: tuple[str, ...], value: object) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for name in path[:-1]:
            manifest = manifest[name]
        manifest[path[-1]] = value

    assert "malformed" in refusal(changed(change))


Box = tuple[tuple[int, ...], tuple[int, ...]]
WHOLE = ((0, 0), (4, 3))


def with_boxes(*boxes: Box) -> bytes:
    entry = TensorEntry("float32", (4, 3), tuple(Shard(FIRST, str(i), *box) for i, box in enumerate(boxes)))
    return dump_manifest(replace(MANIFEST, tensors={"w": entry}))


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([], "fill"),
        ([((0, 0), (4, 2))], "fill"),
        ([WHOLE, WHOLE], "fill"),
        ([((0, 0), (3, 3)), ((1, 0), (3, 1))], "fill"),
        ([((0, 0), (2, 3)), ((0, 0), (2, 3))], "fill"),
        ([((0, 0), (3, 2)), ((1, 1), (3, 2))], "fill"),
        ([((1, 0), (4, 3))], "inside"),
        ([((0,), (4,))], "inside"),
        ([((0, 0, 0), (4, 3, 1))], "inside"),
        ([((0, 0), (2, 6))], "inside"),
    ],
)
def test_shards_that_do_not_tile_their_tensor(boxes: list[Box], reason: str) -> None:
    assert reason in refusal(with_boxes(*boxes))


def test_shards_that_do() -> None:
    for boxes in (
        [WHOLE],
        [((0, 0), (4, 1)), ((0, 1), (4, 2))],
        [((2, 0), (2, 3)), ((0, 0), (2, 3)), ((2, 0), (0, 3))],
    ):
        assert len(parse_manifest(with_boxes(*boxes)).tensors["w"].shards) == len(boxes)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_one_box_that_moves_or_grows_is_seen(shape: list[int], data: st.DataObject) -> None:
    cells = [Shard(FIRST, str(c), c, (1,) * len(shape)) for c in itertools.product(*map(range, shape))]
    entry = TensorEntry("uint8", tuple(shape), tuple(cells))
    assert parse_manifest(dump_manifest(replace(MANIFEST, tensors={"w": entry}))).tensors["w"] == entry
    index = data.draw(st.integers(0, len(cells) - 1))
    dim = data.draw(st.integers(0, len(shape) - 1))
    amount = data.draw(st.integers(1, 3))
    field = data.draw(st.sampled_from(["offsets", "shape"]))
    moved = [v + amount * (d == dim) for d, v in enumerate(getattr(cells[index], field))]
    cells[index] = replace(cells[index], **{field: tuple(moved)})
    broken = replace(MANIFEST, tensors={"w": replace(entry, shards=tuple(cells))})
    with pytest.raises(CheckpointError):
        parse_manifest(dump_manifest(broken))


@pytest.mark.timeout(20)  # each with each is 7 billion
def test_many_boxes_in_many_dims_take_no_longer_than_their_number() -> None:
    side = 44
    cells = [Shard(FIRST, str(c), c, (1, 1, 1)) for c in itertools.product(range(side), repeat=3)]
    entry = TensorEntry("uint8", (side,) * 3, tuple(cells))
    assert parse_manifest(dump_manifest(replace(MANIFEST, tensors={"w": entry}))).tensors["w"] == entry
    cells[-1] = replace(cells[-1], offsets=(0, 0, 0))
    with pytest.raises(CheckpointError, match="exactly once"):
        parse_manifest(dump_manifest(replace(MANIFEST, tensors={"w": replace(entry, shards=tuple(cells))})))


def test_a_shape_that_no_tensor_has() -> None:
    for shape in ((2**40, 2**40, 0), (2**62,)):
        entry = TensorEntry("float32", shape, (Shard(FIRST, "w", (0,) * len(shape), shape),))
        assert "too large" in refusal(dump_manifest(replace(MANIFEST, tensors={"w": entry})))


def test_dtypes_are_those_of_torch() -> None:
    import torch

    for name, (_, size) in DTYPES.items():
        assert torch.empty(3, dtype=getattr(torch, name)).nbytes == 3 * size
        entry = TensorEntry(name, (2, 5), (Shard(FIRST, "x", (0, 0), (2, 5)),))
        assert parse_manifest(dump_manifest(replace(MANIFEST, tensors={"x": entry}))).tensors["x"].nbytes == (
            math.prod((2, 5)) * size
        )
