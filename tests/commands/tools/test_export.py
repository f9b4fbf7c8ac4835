"""Exported weights: canonical names, whole files, and what other programs read."""

import json
import math
import os
import resource
import signal
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from support.writing import default_state, write_checkpoint
from torch import Tensor

from distkit.checkpoint.format import MANIFEST, STATE
from distkit.commands.tools import export as export_module
from distkit.commands.tools.export import Item, canonical_name, export, index_of, parse_size, split
from distkit.errors import CheckpointError, ConfigError

MODEL = {
    "fc.weight": torch.arange(35, dtype=torch.float32).view(7, 5) / 3,
    "fc.bias": torch.arange(7, dtype=torch.bfloat16),
    "norm.num_batches_tracked": torch.tensor(9),
    "mask": torch.tensor([True, False, True]),
    "empty": torch.ones(0, 4),
}
OTHERS = {"optimizer/fc.weight/exp_avg": torch.ones(7, 5), "rng/00000/torch": torch.arange(16, dtype=torch.uint8)}


def save(folder: Path, model: Mapping[str, Tensor] = MODEL, ema: Mapping[str, Tensor] | None = None) -> Path:
    tensors = {f"model/{name}": tensor for name, tensor in model.items()} | OTHERS
    tensors |= {f"ema/{name}": tensor for name, tensor in (ema or {}).items()}
    return write_checkpoint(folder / "run" / "checkpoints", 500, tensors, world_size=3)


def assert_same(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name


def load_sharded(index: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """As Hugging Face loads it: every tensor from the file that the index names."""
    value = json.loads(index.read_text())
    files = {name: load_file(index.parent / name) for name in set(value["weight_map"].values())}
    tensors = {name: files[file][name] for name, file in value["weight_map"].items()}
    assert sum(map(len, files.values())) == len(tensors)
    return tensors, value["metadata"]


def test_one_file(tmp_path: Path) -> None:
    save(tmp_path)
    out = tmp_path / "model.safetensors"
    said = export(tmp_path / "run", out)
    assert said == f"{out}: weights of step 500, 5 tensors, {35 * 4 + 7 * 2 + 8 + 3} bytes"
    assert_same(load_file(out), MODEL)
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": "tiny", "step": "500"}
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "run"]
    # aligned, as the library writes it
    header = int.from_bytes(out.read_bytes()[:8], "little")
    assert header % 8 == 0
    for entry in json.loads(out.read_bytes()[8 : 8 + header]).values():
        if "dtype" in entry:
            size = {"I64": 8, "F32": 4, "BF16": 2, "BOOL": 1}[entry["dtype"]]
            assert entry["data_offsets"][0] % size == 0


@pytest.mark.parametrize("limit", [None, 1200])
def test_a_tied_tensor_has_each_of_its_names(limit: int | None, tmp_path: Path) -> None:
    tensors = {f"model/{name}": tensor for name, tensor in MODEL.items()}
    tensors["ema/fc.weight"] = MODEL["fc.weight"] + 1
    aliases = {"module.head.weight": "fc.weight", "gone": "nowhere"}
    write_checkpoint(tmp_path / "run" / "checkpoints", 5, tensors, state=default_state(5, 2) | {"aliases": aliases})
    out = tmp_path / "model.safetensors"
    for ema in (False, True):
        export(tmp_path / "run", out, ema=ema, max_shard_bytes=limit, overwrite=True)
        loaded = load_file(out) if limit is None else load_sharded(index_of(out))[0]
        expected = {**MODEL, "fc.weight": MODEL["fc.weight"] + 1 if ema else MODEL["fc.weight"]}
        assert_same(loaded, {**expected, "head.weight": expected["fc.weight"]})


def test_names_without_wrappers(tmp_path: Path) -> None:
    save(tmp_path, {"module._orig_mod.net.0._orig_mod.weight": torch.ones(2), "net.module.bias": torch.zeros(3)})
    export(tmp_path / "run", tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == {"net.0.weight", "net.bias"}
    assert canonical_name("module") == "module"
    assert canonical_name("my_module.weight") == "my_module.weight"


def test_two_tensors_with_one_canonical_name(tmp_path: Path) -> None:
    save(tmp_path, {"module.weight": torch.ones(2), "weight": torch.ones(2)})
    with pytest.raises(ConfigError, match=r"model/module\.weight and model/weight"):
        export(tmp_path / "run", tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == ["run"]


def test_averages_where_there_are_any(tmp_path: Path) -> None:
    average = torch.full((7, 5), 0.25)
    save(tmp_path, {f"module.{name}": tensor for name, tensor in MODEL.items()}, {"_orig_mod.fc.weight": average})
    out = tmp_path / "m.safetensors"
    assert "averaged weights of step 500" in export(tmp_path / "run", out, ema=True)
    assert_same(load_file(out), {**MODEL, "fc.weight": average})
    export(tmp_path / "run", out, overwrite=True)
    assert_same(load_file(out), MODEL)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(precision: export_module.Precision, dtype: torch.dtype, tmp_path: Path) -> None:
    model = {**MODEL, "wide": torch.tensor([0.1, math.nan, math.inf], dtype=torch.float64)}
    save(tmp_path, model)
    export(tmp_path / "run", tmp_path / "m.safetensors", precision=precision)
    expected = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.items()}
    loaded = load_file(tmp_path / "m.safetensors")
    assert torch.equal(loaded["wide"].isnan(), torch.tensor([False, True, False]))
    assert_same({n: t.nan_to_num() for n, t in loaded.items()}, {n: t.nan_to_num() for n, t in expected.items()})


def test_a_value_that_does_not_fit_is_not_made_infinite(tmp_path: Path) -> None:
    save(tmp_path, {"fc.weight": torch.tensor([1.0, math.inf, -70_000.0])})
    with pytest.raises(ConfigError, match=r"fc\.weight has values that float16 cannot hold\n.*65504\n.*70000"):
        export(tmp_path / "run", tmp_path / "m.safetensors", precision="fp16")
    assert os.listdir(tmp_path) == ["run"]
    save(tmp_path / "other", {"fc.weight": torch.tensor([1.0, math.inf, -60_000.0])})
    export(tmp_path / "other" / "run", tmp_path / "m.safetensors", precision="fp16")


# several files


def large(count: int = 6, rows: int = 1000) -> dict[str, Tensor]:
    return {f"layers.{number}.weight": torch.full((rows,), float(number)) for number in range(count)}


@pytest.mark.parametrize(("limit", "files"), [(4_000, 6), (5_500, 6), (9_800, 3), (13_900, 2), (10**6, 1)])
def test_files_of_a_size(limit: int, files: int, tmp_path: Path) -> None:
    save(tmp_path, large())
    out = tmp_path / "m.safetensors"
    export(tmp_path / "run", out, max_shard_bytes=limit)
    if files == 1:
        assert_same(load_file(out), large())
        return
    names = [f"m-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    assert sorted(os.listdir(tmp_path)) == [*names, "m.safetensors.index.json", "run"]
    loaded, metadata = load_sharded(tmp_path / "m.safetensors.index.json")
    assert_same(loaded, large())
    assert metadata == {"total_size": 24_000}
    for name in names:
        # a tensor that is larger by itself has a file of its own
        assert (tmp_path / name).stat().st_size <= limit or len(load_file(tmp_path / name)) == 1


def test_another_library_reads_the_index(tmp_path: Path) -> None:
    from accelerate import load_checkpoint_in_model

    save(tmp_path, large())
    out = tmp_path / "m.safetensors"
    for limit in (9_800, None):
        export(tmp_path / "run", out, max_shard_bytes=limit, overwrite=True)
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList(torch.nn.LayerNorm(1000, bias=False) for _ in range(6))
        load_checkpoint_in_model(model, str(out if limit is None else tmp_path / "m.safetensors.index.json"))
        assert_same(model.state_dict(), large())


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5_000), min_size=1, max_size=30), limit=st.none() | st.integers(1, 20_000)
)  # fmt: skip
def test_split_keeps_order_and_size(sizes: list[int], limit: int | None) -> None:
    items = [Item(f"t{place}", f"model/t{place}", ("uint8", (size,))) for place, size in enumerate(sizes)]
    shards = split(items, limit)
    assert [item for shard in shards for item in shard] == items
    if limit is None:
        assert len(shards) == 1
        return
    assert all(len(shard) == 1 or sum(item.nbytes for item in shard) < limit for shard in shards)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("1.5MiB", 3 * 2**19), ("200", 200), ("7B", 7), ("2KB", 2000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-5GB", "5PB", "5e9", "inf", "nan", "0.1B", "9" * 400, "5 GB GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size"):
        parse_size(text)


# whole files, under free names


def test_nothing_is_overwritten_without_being_asked(tmp_path: Path) -> None:
    save(tmp_path, large())
    out = tmp_path / "m.safetensors"
    export(tmp_path / "run", out, max_shard_bytes=9_800)
    before = {path: path.read_bytes() for path in tmp_path.glob("m*")}
    for limit in (None, 13_900):
        with pytest.raises(ConfigError, match="exists"):
            export(tmp_path / "run", out, max_shard_bytes=limit)
    assert {path: path.read_bytes() for path in tmp_path.glob("m*")} == before
    (tmp_path / "m-extra.safetensors").write_text("mine")
    # what is left of the one before would be read together with the new one
    export(tmp_path / "run", out, max_shard_bytes=13_900, overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("m*")) == [
        "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m-extra.safetensors",
        "m.safetensors.index.json",
    ]  # fmt: skip
    assert_same(load_sharded(tmp_path / "m.safetensors.index.json")[0], large())
    export(tmp_path / "run", out, overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("m*")) == ["m-extra.safetensors", "m.safetensors"]
    export(tmp_path / "run", out, max_shard_bytes=9_800, overwrite=True)
    assert not out.exists()


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    out = tmp_path / "m.safetensors"
    write = export_module.write_shard

    def and_another(*args: object) -> None:
        write(*args)
        out.write_text("another's")

    monkeypatch.setattr(export_module, "write_shard", and_another)
    with pytest.raises(ConfigError, match="exists"):
        export(tmp_path / "run", out)
    assert out.read_text() == "another's"
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "run"]


@pytest.mark.parametrize("limit", [None, 9_800])
def test_a_full_disk_leaves_what_was_there(limit: int | None, tmp_path: Path) -> None:
    save(tmp_path, large(rows=2000))
    out = tmp_path / "m.safetensors"
    out.write_text("old")
    old_limit, old_action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, old_limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot export to .*m\.safetensors: File too large"):
            export(tmp_path / "run", out, max_shard_bytes=limit, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_action)
    assert out.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "run"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, large())
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append("fsync")
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    export(tmp_path / "run", tmp_path / "m.safetensors", max_shard_bytes=13_900)
    assert done == ["fsync"] * 3 + ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors",
                                    "m.safetensors.index.json", "fsync"]  # fmt: skip


def test_memory_is_that_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = large(20) | {"all": torch.ones(5_000)}
    save(tmp_path, model)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = []
    empty = export_module._empty

    def counted(*args: object) -> Tensor:
        tensor = empty(*args)
        alive.add(tensor)
        most.append(sum(tensor.nbytes for tensor in alive))
        return tensor

    monkeypatch.setattr(export_module, "_empty", counted)
    monkeypatch.setattr(export_module, "BATCH_BYTES", 12_000)
    for precision in (None, "bf16"):
        most.clear()
        export(tmp_path / "run", tmp_path / "m.safetensors", precision=precision, overwrite=True)
        assert (len(most), max(most)) == (21, 20_000)
        assert load_file(tmp_path / "m.safetensors")["layers.7.weight"][3] == 7


# what is refused


def damage(directory: Path) -> None:
    file = next(directory.glob("shard-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    damage(save(tmp_path))
    with pytest.raises(CheckpointError, match="sha256"):
        export(tmp_path / "run", tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("out", "options", "says"),
    [
        ("model.bin", {}, r"model\.bin\.safetensors"),
        ("folder", {}, r"folder/model\.safetensors"),
        (".safetensors", {}, "the name of a file"),
        ("nowhere/m.safetensors", {}, "mkdir -p .*nowhere"),
        ("run/checkpoints/step-000000500/m.safetensors", {}, "would be damage"),
        ("m.safetensors", {"ema": True}, "no averaged weights"),
    ],
)
def test_wrong_places(out: str, options: Mapping[str, bool], says: str, tmp_path: Path) -> None:
    directory = save(tmp_path)
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(directory))
    with pytest.raises(ConfigError, match=says):
        export(tmp_path / "run", tmp_path / out, **options)
    assert sorted(os.listdir(directory)) == before
    assert sorted(os.listdir(tmp_path)) == ["folder", "run"]


def test_no_weights(tmp_path: Path) -> None:
    save(tmp_path, {})
    with pytest.raises(ConfigError, match="no weights"):
        export(tmp_path / "run", tmp_path / "m.safetensors")


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    access: Callable[..., bool] = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    with pytest.raises(ConfigError, match="directory that you can write to"):
        export(tmp_path / "run", tmp_path / "m.safetensors")


def test_an_export_next_to_its_checkpoint_is_fine(tmp_path: Path) -> None:
    directory = save(tmp_path)
    export(directory, tmp_path / "run" / "model.safetensors")
    assert sorted(p.name for p in directory.iterdir() if p.name in (MANIFEST, STATE)) == [MANIFEST, STATE]
    assert_same(load_file(tmp_path / "run" / "model.safetensors"), MODEL)
