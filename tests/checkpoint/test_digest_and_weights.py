"""The state digest, and weights on disk."""

import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distkit.checkpoint.digest import state_digest
from distkit.checkpoint.shard_file import save_weights

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.ones(3, dtype=torch.bfloat16),
    "step": torch.tensor(4),
}


def changed(**new: Tensor) -> dict[str, Tensor]:
    return {**TENSORS, **new}


def test_digest_is_the_values_not_the_layout() -> None:
    digest = state_digest(TENSORS)
    assert digest == state_digest(dict(reversed(TENSORS.items())))
    transposed = TENSORS["b"].t().contiguous().t()
    assert transposed.stride() != TENSORS["b"].stride()
    assert state_digest(changed(b=transposed)) == digest


@pytest.mark.parametrize(
    "other",
    [
        changed(b=TENSORS["b"].view(3, 2)),
        changed(b=TENSORS["b"].double()),
        changed(b=torch.nextafter(TENSORS["b"], torch.tensor(9.0))),
        changed(step=torch.tensor(5)),
        {**{name: t for name, t in TENSORS.items() if name != "a"}, "c": TENSORS["a"]},
        changed(empty=torch.ones(0)),
    ],
    ids=["shape", "dtype", "one bit", "scalar", "name", "additional"],
)
def test_digest_sees_every_difference(other: dict[str, Tensor]) -> None:
    assert state_digest(other) != state_digest(TENSORS)


def test_digest_never_changes_silently() -> None:
    assert (
        state_digest({"w": torch.tensor([1.0, 2.0])})
        == "9b115f696de4464e664e583ce3ccbf9a114efe12b36c97f764e467b74b9c86f1"
    )


def test_weights_come_back(tmp_path: Path) -> None:
    tied = {**TENSORS, "tied": TENSORS["b"]}
    save_weights(tmp_path / "weights.safetensors", tied, {"step": "3"})
    loaded = load_file(tmp_path / "weights.safetensors")
    assert loaded.keys() == tied.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tied.items())
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, TENSORS, {})
    before = path.read_bytes()
    old_limit, old_action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, old_limit[1]))
    try:
        with pytest.raises(OSError, match=r"weights\.safetensors"):
            save_weights(path, {"big": torch.ones(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_action)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
