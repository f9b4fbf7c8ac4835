"""What a person is told about checkpoints: by list, show, verify, diff, digest and prune."""

import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.writing import default_state, rehash, reseal, write_checkpoint
from torch import Tensor

from distkit.checkpoint.digest import StateDigest, state_digest
from distkit.checkpoint.format import DTYPES, MANIFEST, STATE, step_name
from distkit.checkpoint.retention import Retention, list_checkpoints
from distkit.commands.tools import diff as inspect_module
from distkit.commands.tools import prune as prune_module
from distkit.commands.tools.compare import BLOCK, compare
from distkit.commands.tools.diff import diff, differing_tensors, digest
from distkit.commands.tools.list import check, list_run, show
from distkit.commands.tools.locate import find_checkpoint, find_folder, run_of
from distkit.commands.tools.prune import prune
from distkit.engine.lease import Lease
from distkit.errors import CheckpointError, ConfigError

TENSORS = {
    "model/fc.weight": torch.arange(12, dtype=torch.float32).view(4, 3),
    "model/fc.bias": torch.ones(4, dtype=torch.bfloat16),
    "model/steps": torch.tensor(7),
    "optimizer/fc.weight/exp_avg": torch.full((4, 3), 0.5),
    "ema/fc.weight": torch.zeros(4, 3),
    "rng/00000/torch": torch.arange(16, dtype=torch.uint8),
}


def evaluated(step: int, world_size: int = 2, **values: float) -> dict[str, object]:
    state = default_state(step, world_size)
    state["parts"]["trackers"]["last"] = {"step": float(step), **values}
    return state


def changed(**new: Tensor) -> dict[str, Tensor]:
    return {**TENSORS, **{name.replace("__", "/").replace("_dot_", "."): tensor for name, tensor in new.items()}}


def flip(file: Path, place: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints: worst, best, middle; the last on another number of ranks."""
    run = tmp_path / "run"
    for step, top1, world_size in ((5, 0.25, 2), (10, 0.75, 2), (15, 0.5, 3)):
        state = evaluated(step, world_size, loss=1 - top1, top1=top1)
        write_checkpoint(run / "checkpoints", step, TENSORS, world_size=world_size, state=state)
    return run


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / step_name(step)


# where


def test_a_path_may_be_a_checkpoint_a_run_or_its_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == at(run, 15)
    assert find_checkpoint(at(run, 5)) == at(run, 5)
    assert find_folder(run) == find_folder(run / "checkpoints") == run / "checkpoints"
    assert run_of(run / "checkpoints") == run_of(at(run, 5)) == run
    monkeypatch.chdir(run / "checkpoints")
    assert find_folder(Path()).resolve() == run / "checkpoints"
    assert run_of(Path()) == run
    # a folder of another name, say copied elsewhere; a checkpoint without its manifest; one put aside
    shutil.copytree(run / "checkpoints", run / "copies")
    assert find_checkpoint(run / "copies") == run / "copies" / step_name(15)
    (at(run, 5) / MANIFEST).unlink()
    assert find_checkpoint(at(run, 5)) == at(run, 5)
    at(run, 10).rename(run / "checkpoints" / "damaged-1-step-000000010")
    assert find_checkpoint(run / "checkpoints" / "damaged-1-step-000000010").name == "damaged-1-step-000000010"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere", "nothing there"),
        ("run/config.json", "a file"),
        ("run", "a directory without"),
        ("empty", "without one"),
        ("empty/checkpoints/.tmp-step-000000005", "killed"),
    ],
)
def test_a_path_that_is_nothing_of_it(path: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "empty" / "checkpoints" / ".tmp-step-000000005").mkdir(parents=True)
    for command in (show, check, digest):
        with pytest.raises(ConfigError, match=says):
            command(tmp_path / path)


# list


def test_list(run: Path) -> None:
    lines = list_run(run).splitlines()
    assert lines[0] == f"{run / 'checkpoints'}: 3 checkpoints"
    assert lines[1].split() == ["step", "created", "size", "world", "size", "strategy", "last", "evaluation"]
    assert [line.split()[0] for line in lines[2:]] == ["5", "10", "15"]
    assert "loss 0.25  top1 0.75" in lines[3]
    assert [line.endswith("<- newest") for line in lines[2:]] == [False, False, True]
    assert len({line.index("ddp") for line in lines[2:]}) == 1
    assert list_run(run / "checkpoints") == list_run(run)


def test_list_says_what_is_wrong(run: Path) -> None:
    folder = run / "checkpoints"
    write_checkpoint(folder, 20, TENSORS, state=evaluated(15, loss=math.nan))
    (at(run, 5) / MANIFEST).write_text("{")
    (at(run, 10) / STATE).write_text("[")
    (folder / ".tmp-step-000000025").mkdir()
    (folder / ".trash-step-000000001").mkdir()
    (folder / "damaged-1-step-000000030").mkdir()
    lines = list_run(run).splitlines()
    assert "damaged: " in lines[2]
    assert "is not JSON" in lines[2]
    assert lines[3].rstrip().endswith("ddp")
    assert lines[5].endswith("loss not finite  (of step 15)  <- newest")
    assert lines[6] == "unfinished, removed when the run starts again: .tmp-step-000000025, .trash-step-000000001"
    assert lines[7] == "set aside because they failed verification: damaged-1-step-000000030"


def test_list_as_json(run: Path) -> None:
    write_checkpoint(run / "checkpoints", 20, TENSORS, state=evaluated(20, loss=math.inf))
    (at(run, 5) / MANIFEST).unlink()
    (at(run, 10) / MANIFEST).write_text("{")
    (run / "checkpoints" / ".tmp-step-000000025").mkdir()
    value = json.loads(list_run(run, as_json=True), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert value["folder"] == str(run / "checkpoints")
    assert value["unfinished"] == [".tmp-step-000000025"]
    lost, damaged, middle, newest = value["checkpoints"]
    assert lost["step"] == 5
    assert f"missing file {MANIFEST}" in lost["damaged"]
    assert "is not JSON" in damaged.pop("damaged")
    assert damaged == {"step": 10, "path": str(at(run, 10)), "newest": False}
    assert (middle["world_size"], middle["evaluation"]) == (3, {"step": 15.0, "loss": 0.5, "top1": 0.5})
    assert middle["bytes"] == sum(p.stat().st_size for p in at(run, 15).iterdir() if p.name != MANIFEST)
    assert newest["newest"] is True
    assert newest["evaluation"] == {"step": 20.0, "loss": None}


def test_a_run_that_has_saved_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert list_run(tmp_path) == f"{tmp_path / 'checkpoints'}: no checkpoints"
    with pytest.raises(ConfigError, match="is one checkpoint"):
        list_run(write_checkpoint(tmp_path / "checkpoints", 5, TENSORS))


def test_nothing_that_a_terminal_obeys_is_printed(tmp_path: Path) -> None:
    evil = "\x1b[2Jevil"
    state = evaluated(5, **{evil: 1.0})
    directory = write_checkpoint(tmp_path, 5, TENSORS, recipe=evil, strategy=evil, state=state)
    other = write_checkpoint(tmp_path, 6, TENSORS, state=evaluated(6))
    texts = [list_run(tmp_path), show(directory), "\n".join(diff(directory, other).values)]
    assert all(all(line.isprintable() for line in text.splitlines()) for text in texts)
    assert all("evil" in text for text in texts)


# show and verify


def test_show(run: Path) -> None:
    text = show(run)
    assert text == show(at(run, 15))
    lines = [line.split() for line in text.splitlines()]
    for fact in (["step:", "15"], ["recipe:", "tiny"], ["strategy:", "ddp"], ["world", "size:", "3"]):
        assert fact in lines
    assert ["model", "3", "64", "bytes"] in lines
    assert ["rng", "1", "16", "bytes"] in lines
    assert "fc.weight" not in text


def test_show_every_tensor(run: Path) -> None:
    text = show(at(run, 5), tensors=True)
    assert "model/fc.weight  float32 [4, 3]  2 shards\n" in text
    assert "    shard-00001-of-00002-000.safetensors [2:4, 0:3]\n" in text
    assert "model/steps  int64 []  shard-0000" in text
    (at(run, 5) / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        show(at(run, 5))


def test_verify(run: Path) -> None:
    text, sound = check(run)
    assert sound
    assert text.startswith(f"{at(run, 15)}: verified, 4 files, ")
    flip(at(run, 10) / "shard-00001-of-00002-000.safetensors")
    (at(run, 5) / MANIFEST).unlink()
    assert check(run)[1]
    text, sound = check(run, every=True)
    assert not sound
    lost, damaged, verified = text.splitlines()
    assert lost == f"damaged: {at(run, 5)}: missing file {MANIFEST}"
    assert damaged.startswith(f"damaged: {at(run, 10)}: shard-00001-of-00002-000.safetensors does not match its sha256")
    assert verified.startswith(f"{at(run, 15)}: verified")
    text, sound = check(at(run, 5))
    assert (text, sound) == (f"damaged: {at(run, 5)}: missing file {MANIFEST}", False)
    with pytest.raises(ConfigError, match="--all"):
        check(at(run, 10), every=True)


def test_what_a_live_run_removes_meanwhile_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distkit.commands.tools import list as listing

    both = [5, 7, 15]
    monkeypatch.setattr(listing, "list_checkpoints", lambda folder: both)
    text, sound = check(run, every=True)
    assert sound
    assert len(text.splitlines()) == 2
    assert len(list_run(run).splitlines()) == 4
    assert "7" not in [line.split()[0] for line in list_run(run).splitlines()]


# diff


def write_pair(folder: Path, one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[Path, Path]:
    state = evaluated(5)
    first = write_checkpoint(folder / "a", 5, one, world_size=1, state=state)
    return first, write_checkpoint(folder / "b", 5, other, world_size=3, state=state)


def test_equal_whatever_the_world_size(run: Path, tmp_path: Path) -> None:
    state = evaluated(5, loss=0.5)
    first = write_checkpoint(tmp_path / "a", 5, TENSORS, world_size=1, state=state)
    second = write_checkpoint(tmp_path / "b", 5, TENSORS, world_size=3, split=1, state=state)
    found = diff(first, second)
    assert found.equal
    assert (found.tensors, found.values, found.notes) == ((), (), ())
    assert diff(first, first).equal


def test_names_and_forms(tmp_path: Path) -> None:
    other = {name: tensor for name, tensor in TENSORS.items() if name != "model/steps"}
    other |= {"model/new": torch.ones(2), "model/fc.bias": torch.ones(4), "model/fc.weight": torch.ones(3, 4)}
    first, second = write_pair(tmp_path, TENSORS, other)
    assert differing_tensors(first, second) == [
        f"only in {first}: model/steps int64 []",
        f"only in {second}: model/new float32 [2]",
        "model/fc.bias: bfloat16 [4] and float32 [4]",
        "model/fc.weight: float32 [4, 3] and float32 [3, 4]",
    ]


def test_values_that_differ(tmp_path: Path) -> None:
    weight = TENSORS["model/fc.weight"].clone()
    weight[1, 2], weight[3, 0] = 5.5, 8.0
    generator = TENSORS["rng/00000/torch"].clone()
    generator[3] = 200
    pair = write_pair(tmp_path, TENSORS, changed(model__fc_dot_weight=weight, rng__00000__torch=generator))
    assert differing_tensors(*pair) == [
        "model/fc.weight float32 [4, 3]: 2 of 12 elements differ, max abs 1, max relative 0.111, "
        "first at [1, 2]: 5.0 and 5.5",
        "rng/00000/torch uint8 [16]: 1 of 16 elements differ, max abs 197, max relative 0.985, "
        "first at [3]: 3 and 200",
    ]  # fmt: skip
    assert differing_tensors(*pair, limit=1)[1:] == ["... and 1 more"]
    found = diff(*pair)
    assert (found.equal, found.values, found.notes) == (False, (), ())


def test_every_bit_counts(tmp_path: Path) -> None:
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    one = {"w": torch.tensor([0.0, 1.0, math.inf, 2.0]), "n": nan[:1].clone()}
    other = {"w": torch.tensor([-0.0, math.nan, -math.inf, 2.0]), "n": nan[1:].clone()}
    assert differing_tensors(*write_pair(tmp_path, one, other)) == [
        "n float32 [1]: 1 of 1 elements differ, 1 not finite, 1 in the sign of zero or the payload of NaN alone, "
        "first at [0]: nan and nan",
        "w float32 [4]: 3 of 4 elements differ, max abs 0, max relative 0, 2 not finite, 1 in the sign of zero or the "
        "payload of NaN alone, first at [0]: 0.0 and -0.0",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_in_any_dtype(dtype: str) -> None:
    size = DTYPES[dtype][1]
    bits = torch.randint(0, 2, (5, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    one = (bits if dtype == "bool" else bits * 60).view(getattr(torch, dtype)).reshape(5)
    assert compare("w", one, one.clone()) is None
    bits = one.clone().view(torch.uint8).reshape(5, size)
    bits[3, 0] ^= 1
    found = compare("w", one, bits.view(getattr(torch, dtype)).reshape(5))
    assert found is not None
    assert (found.count, found.index, found.dtype) == (1, (3,), dtype)
    assert found.max_abs
    assert 0 < found.max_relative <= 1
    assert "1 of 5 elements" in str(found)


def test_large_integers_differ_by_what_they_differ_by() -> None:
    for dtype, low, high in ((torch.int64, -(2**63), 2**63 - 1), (torch.uint64, 0, 2**64 - 1)):
        one, other = torch.tensor([2**53 + 1, low], dtype=dtype), torch.tensor([2**53, high], dtype=dtype)
        assert compare("w", one[:1], other[:1]).max_abs == 1
        assert compare("w", one, other).max_abs == 2**64 - 1
    assert compare("w", torch.tensor(3), torch.tensor(-5)).max_relative == pytest.approx(8 / 5)


@settings(deadline=None, max_examples=50)
@given(places=st.sets(st.integers(0, 3 * BLOCK), min_size=1, max_size=6))
def test_blocks_do_not_show(places: set[int]) -> None:
    one = torch.zeros(3 * BLOCK + 1, dtype=torch.int8)
    other = one.clone()
    other[sorted(places)] = torch.arange(1, len(places) + 1, dtype=torch.int8)
    found = compare("w", one, other)
    assert found is not None
    assert (found.count, found.index, found.max_abs) == (len(places), (min(places),), len(places))


def test_empty_tensors_and_scalars() -> None:
    assert compare("w", torch.ones(0, 3), torch.ones(0, 3)) is None
    found = compare("w", torch.tensor(1.0), torch.tensor(2.0))
    assert found is not None
    assert str(found) == ("w float32 []: 1 of 1 elements differ, max abs 1, max relative 0.5, first at []: 1.0 and 2.0")


def test_state_counts_and_times_do_not(tmp_path: Path) -> None:
    one, other = evaluated(5, loss=math.nan), evaluated(5, loss=math.nan)
    one["config"], other["config"] = {"run_dir": "a", "optim": {"lr": 0.1}}, {"run_dir": "b", "optim": {"lr": 0.1}}
    one["parts"]["clock"], other["parts"]["clock"] = {"seconds": 1.5}, {"seconds": 2.5}
    one["parts"]["observers"], other["parts"]["observers"] = {"wandb": "x"}, {}
    first = write_checkpoint(tmp_path / "a", 5, TENSORS, state=one)
    found = diff(first, write_checkpoint(tmp_path / "b", 5, TENSORS, state=other))
    assert found.equal
    assert found.notes == (
        'state.json: config.run_dir: "a" and "b"',
        "state.json: parts.clock.seconds: 1.5 and 2.5",
        "state.json: parts.observers: missing and {}",
        'state.json: parts.observers.wandb: "x" and missing',
    )
    other["parts"]["trackers"]["last"]["loss"] = 0.5
    other["ranks"][1] = {"data": [1]}
    found = diff(first, write_checkpoint(tmp_path / "c", 5, TENSORS, state=other), limit=1)
    assert not found.equal
    assert found.values == ("state.json: parts.trackers.last.loss: NaN and 0.5", "... and 2 more")


def test_a_flipped_bit_is_damage_and_no_difference(tmp_path: Path) -> None:
    first, second = write_pair(tmp_path, TENSORS, TENSORS)
    flip(next(second.glob("shard-00000-*")))
    with pytest.raises(CheckpointError, match=r"b/step-000000005: shard-00000.* sha256"):
        diff(first, second)


def test_one_pair_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"model/{number}": torch.full((3,), float(number)) for number in range(6)}
    others = {**tensors, "model/3": torch.zeros(3), "model/35": torch.ones(2)}
    first, second = write_pair(tmp_path, tensors, others)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = []
    iterate = inspect_module.iterate

    def counted(*args: object) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in iterate(*args):
            alive.add(tensor)
            most.append(len(alive))
            yield name, tensor
            del tensor

    monkeypatch.setattr(inspect_module, "iterate", counted)
    assert len(differing_tensors(first, second)) == 2
    assert (len(most), max(most)) == (13, 2)
    most.clear()
    assert digest(first) == state_digest(tensors)
    assert (len(most), max(most)) == (6, 1)


# digest


def test_digest_is_that_of_model_and_optimizer(run: Path) -> None:
    learned = {name: tensor for name, tensor in TENSORS.items() if name.startswith(("model/", "optimizer/"))}
    assert digest(at(run, 5)) == digest(run) == state_digest(learned)
    flip(at(run, 15) / "shard-00001-of-00003-000.safetensors")
    with pytest.raises(CheckpointError, match="sha256"):
        digest(run)


def test_names_of_a_digest_ascend() -> None:
    found = StateDigest()
    found.update("b", torch.ones(2))
    for name in ("a", "b"):
        with pytest.raises(ValueError, match="ascend"):
            found.update(name, torch.ones(2))
    assert found.hexdigest() == state_digest({"b": torch.ones(2)})


# prune


def kept(run: Path) -> list[int]:
    return list_checkpoints(run / "checkpoints")


def test_prune_says_first_and_does_it_then(run: Path) -> None:
    retention = Retention(1, None, None)
    text = prune(run, retention)
    assert f"would go: {at(run, 5)}, " in text
    assert "1 of 3 checkpoints stay, of steps 15" in text
    assert text.endswith("add --yes to remove them")
    assert kept(run) == [5, 10, 15]
    text = prune(run, retention, yes=True)
    assert f"removed: {at(run, 10)}, " in text
    assert sorted(os.listdir(run / "checkpoints")) == [step_name(15)]
    assert prune(run, retention, yes=True).startswith("nothing to remove: 1 of 1")


@pytest.mark.parametrize(
    ("metric", "mode", "stay"), [("top1", "max", [10, 15]), ("loss", "min", [10, 15]), ("loss", "max", [5, 15])]
)
def test_prune_keeps_the_best(run: Path, metric: str, mode: prune_module.Mode, stay: list[int]) -> None:
    prune(run / "checkpoints", Retention(1, 1, None), metric=metric, mode=mode, yes=True)
    assert kept(run) == stay


def test_prune_keeps_multiples(run: Path) -> None:
    prune(run, Retention(1, None, 2), yes=True)
    assert kept(run) == [10, 15]


def test_prune_keeps_the_newest_that_verifies(run: Path) -> None:
    flip(at(run, 15) / STATE, 0)
    prune(run, Retention(1, None, None), yes=True)
    assert kept(run) == [10, 15]
    flip(at(run, 10) / STATE, 0)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        prune(run, Retention(1, None, None), yes=True)
    assert kept(run) == [10, 15]


def test_prune_needs_a_metric_that_is_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loss, top1"):
        prune(run, Retention(1, 1, None), metric="top5", mode="max")
    with pytest.raises(ConfigError, match="--metric"):
        prune(run, Retention(1, 1, None))
    with pytest.raises(ConfigError, match="is one checkpoint"):
        prune(at(run, 5), Retention(1, None, None))
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        prune(tmp_path / "new", Retention(1, None, None))


@pytest.mark.parametrize("where", [lambda run: run, lambda run: run / "checkpoints", lambda _: Path()])
def test_prune_refuses_a_live_run(run: Path, where: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    lease = Lease.acquire(run)
    try:
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            prune(where(run), Retention(1, None, None), yes=True)
    finally:
        lease.release()
    assert kept(run) == [5, 10, 15]
    prune(where(run), Retention(1, None, None), yes=True)
    assert kept(run) == [15]


def test_a_run_that_starts_while_prune_verifies(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([None, "process 1 on elsewhere"])
    monkeypatch.setattr("distkit.engine.lease.holder", lambda run_dir: next(answers))
    with pytest.raises(ConfigError, match="process 1 on elsewhere"):
        prune(run, Retention(1, None, None), yes=True)
    assert kept(run) == [5, 10, 15]


def test_a_removal_that_fails_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, step: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prune_module, "remove", refuse)
    with pytest.raises(CheckpointError, match=r"step-000000005: Permission denied"):
        prune(run, Retention(1, None, None), yes=True)


# no torch, no trust


def test_list_show_verify_and_prune_need_no_torch(run: Path) -> None:
    code = (
        "import sys\nfrom distkit.commands import run\n"
        f"for verb in ('list', 'show', 'verify'): assert run(['checkpoint', verb, {str(run)!r}]) == 0\n"
        f"assert run(['checkpoint', 'prune', {str(run)!r}, '--keep-last', '1']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_liar_is_not_believed(run: Path) -> None:
    reseal(at(run, 15), lambda manifest: manifest["tensors"]["model/steps"].update(dtype="int32"))
    text, sound = check(run)
    assert not sound
    assert "int32" in text or "I32" in text
    for command in (lambda: diff(at(run, 10), run), lambda: digest(run)):
        with pytest.raises(CheckpointError):
            command()
    (at(run, 10) / STATE).write_text("[]")
    rehash(at(run, 10), STATE)
    with pytest.raises(CheckpointError, match="not a JSON object"):
        diff(at(run, 5), at(run, 10))
