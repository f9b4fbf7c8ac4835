"""A second writer of checkpoints, for tests: it shares the manifest's code with distkit, and nothing else.

directory = write_checkpoint(tmp_path, 500, {"model/weight": torch.randn(4, 3)})
reseal(directory, lambda manifest: manifest["files"].pop("state.json"))    # a liar's manifest, with its digest
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distkit.checkpoint.format import (
    MANIFEST,
    STATE,
    FileEntry,
    Manifest,
    Shard,
    TensorEntry,
    dump_manifest,
    shard_name,
    step_name,
)
from distkit.tensors.spec import dtype_name

#: Offsets and shape of a part of a tensor.
Box = tuple[tuple[int, ...], tuple[int, ...]]


def write_checkpoint(
    parent: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    *,
    world_size: int = 2,
    state: Mapping[str, object] | None = None,
    split: int = 0,
    tilings: Mapping[str, Sequence[Box]] | None = None,
    recipe: str = "tiny",
    strategy: str = "ddp",
) -> Path:
    """Write a whole checkpoint of plain CPU tensors to `parent`/step-…, and return that directory.

    Args:
        parent: a folder; made where it is missing.
        step: finished steps.
        tensors: by their names in the checkpoint, such as `model/fc.weight`.
        world_size: ranks to spread it over; each that gets something writes one file.
        state: what state.json holds; by default the least that a run writes.
        split: the dim along which a tensor is cut, one part a rank, where it has as many rows; others go to one rank.
        tilings: the boxes of some tensors, dealt to the ranks in turn, instead of what `split` says.
        recipe, strategy: for the manifest.
    """
    directory = parent / step_name(step)
    directory.mkdir(parents=True)
    shards: dict[str, list[Shard]] = {name: [] for name in tensors}
    contents: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for turn, (name, tensor) in enumerate(sorted(tensors.items())):
        boxes = (tilings or {}).get(name) or split_box(tensor, world_size, split)
        for index, (offsets, shape) in enumerate(boxes):
            file = shard_name((index if len(boxes) > 1 else turn) % world_size, world_size, 0)
            key = name if len(boxes) == 1 else f"{name}#{index}"
            part = tensor.detach()
            for dim, (start, length) in enumerate(zip(offsets, shape, strict=True)):
                part = part.narrow(dim, start, length)
            contents[file][key] = part.clone(memory_format=torch.contiguous_format)
            shards[name].append(Shard(file, key, offsets, shape))
    for file, held in contents.items():
        save_file(held, directory / file)
    state = default_state(step, world_size) if state is None else state
    (directory / STATE).write_text(json.dumps(with_optimizer(state, tensors)))
    entries = {
        name: TensorEntry(dtype_name(tensor), tuple(tensor.shape), tuple(shards[name]))
        for name, tensor in tensors.items()
    }
    manifest = Manifest(
        step=step,
        recipe=recipe,
        strategy=strategy,
        world_size=world_size,
        created="2026-01-02T03:04:05+00:00",
        versions={"distkit": "0", "torch": torch.__version__},
        files={path.name: file_entry(path) for path in directory.iterdir()},
        tensors=entries,
    )
    (directory / MANIFEST).write_bytes(dump_manifest(manifest))
    return directory


def default_state(step: int, world_size: int) -> dict[str, Any]:
    """The least that a run writes into state.json, of the recipe `tiny` and an optimizer without state."""
    parts = {
        "progress": {"step": step},
        "trackers": {"last": None, "best": None},
        "clock": {"seconds": 1.5, "samples": 8 * step, "open_seconds": 0.25},
        "observers": {},
        "optimizer": {"class": "SGD", "groups": [], "state": {}},
    }
    return {"version": 1, "recipe": "tiny", "num_samples": 96, "config": {"seed": 0, "global_batch_size": 8},
            "step": step, "parts": parts, "ranks": [{} for _ in range(world_size)]}  # fmt: skip


def with_optimizer(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """`state` with a description of `optimizer/PARAMETER/KEY`, unless it describes the optimizer's state otherwise."""
    saved = copy.deepcopy(dict(state))
    if saved.get("parts", {}).get("optimizer", {}).get("state") == {}:
        weights = [name.removeprefix("model/") for name in tensors if name.startswith("model/")]
        saved["parts"]["optimizer"]["groups"] = [{"param_names": weights}]
        for name in tensors:
            if name.startswith("optimizer/"):
                parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
                saved["parts"]["optimizer"]["state"].setdefault(parameter, {})[key] = {"tensor": True}
    return saved


def split_box(tensor: Tensor, parts: int, dim: int) -> list[Box]:
    """Boxes that cut `tensor` into `parts` along `dim`; the whole where it has too few rows."""
    rows = tensor.shape[dim] if dim < tensor.ndim else 0
    if parts == 1 or rows < parts:
        return [((0,) * tensor.ndim, tuple(tensor.shape))]
    boxes = []
    for part in range(parts):
        start, stop = part * rows // parts, (part + 1) * rows // parts
        offsets = tuple(start if d == dim else 0 for d in range(tensor.ndim))
        shape = tuple(stop - start if d == dim else size for d, size in enumerate(tensor.shape))
        boxes.append((offsets, shape))
    return boxes


def file_entry(path: Path) -> FileEntry:
    """Size and sha256 of a file as it is now."""
    data = path.read_bytes()
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def reseal(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` alter the manifest as a dict, and give it the digest that fits: what a liar would write."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_bytes(sealed(manifest))


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest with the digest that fits."""
    value = {name: part for name, part in manifest.items() if name != "digest"}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    whole = {**value, "digest": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(whole, sort_keys=True).encode() + b"\n"


def rehash(directory: Path, *names: str) -> None:
    """Put the present size and sha256 of the files `names` into the manifest, and reseal it."""
    now = {name: file_entry(directory / name) for name in names}
    entries = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in now.items()}
    reseal(directory, lambda manifest: manifest["files"].update(entries))
