"""Files of weights that something else has written: what is taken, what is refused and in which words."""

import os
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distkit.checkpoint.weights_file import load_weights_file_
from distkit.errors import ConfigError


def model(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def weights(width: int = 3) -> dict[str, Tensor]:
    return {name: torch.rand_like(value) if value.is_floating_point() else value + 7
            for name, value in model(width).state_dict().items()}  # fmt: skip


def load(file: Path) -> tuple[nn.Module, list[str]]:
    net = model()
    return net, load_weights_file_(net, file)


def save(content: object, file: Path) -> Path:
    save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)  # type: ignore[arg-type]
    return file


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin"])
def test_every_value_arrives(name: str, tmp_path: Path) -> None:
    saved = weights()
    net, notes = load(save(saved, tmp_path / name))
    assert all(torch.equal(value, saved[key]) for key, value in net.state_dict().items())
    assert notes == [f"started from the weights of {tmp_path / name}"]
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_older_form_of_torch_save(tmp_path: Path) -> None:
    saved = weights()
    torch.save(saved, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    net, _ = load(tmp_path / "w.pth")
    assert torch.equal(net.state_dict()["0.weight"], saved["0.weight"])


WRAPPED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "ddp": (lambda saved: {f"module.{name}": value for name, value in saved.items()}, "'module.' was taken off"),
    "compiled": (lambda saved: {f"_orig_mod.{name}": value for name, value in saved.items()}, "'_orig_mod.' was"),
    "compiled ddp": (
        lambda saved: {f"module._orig_mod.{name}": value for name, value in saved.items()}, "'_orig_mod.' was",
    ),
    "a trainer": (
        lambda saved: {"epoch": 3, "state_dict": {f"model.{name}": value for name, value in saved.items()}},
        "those under 'state_dict'",
    ),
    "two levels": (lambda saved: {"model": {"module": saved}, "step": torch.tensor(3)}, "those under 'module'"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_what_wrappers_add_is_taken_off_and_said(how: str, tmp_path: Path) -> None:
    saved, (wrap, says) = weights(), WRAPPED[how]
    net, notes = load(save(wrap(saved), tmp_path / "w.pth"))
    assert torch.equal(net.state_dict()["2.bias"], saved["2.bias"])
    assert any(says in note for note in notes)


def test_names_of_the_model_itself_are_left_alone(tmp_path: Path) -> None:
    holder = nn.ModuleDict({"model": nn.Linear(2, 2), "module": nn.Linear(2, 2)})
    saved = {name: torch.rand_like(value) for name, value in holder.state_dict().items()}
    assert len(load_weights_file_(holder, save(saved, tmp_path / "w.pth"))) == 1
    assert torch.equal(holder["model"].weight, saved["model.weight"])


class Tied(nn.Module):
    """A head that is the embedding, a counter as extra state, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(3)

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError("it is no weight")


@pytest.mark.parametrize("name", ["wte.weight", "head.weight"])
def test_tied_weights_may_be_saved_once(name: str, tmp_path: Path) -> None:
    net, value = Tied(), torch.rand(5, 3)
    load_weights_file_(net, save({name: value, "_extra_state": torch.tensor(9)}, tmp_path / "w.pth"))
    assert torch.equal(net.head.weight, value)
    assert net.head.weight is net.wte.weight


def test_other_precisions_are_converted_and_said(tmp_path: Path) -> None:
    saved = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights().items()}
    net, notes = load(save(saved, tmp_path / "w.safetensors"))
    assert notes[-1] == "weights were converted from bfloat16 to float32"
    assert torch.equal(net.state_dict()["0.weight"], saved["0.weight"].float())


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights().items() if key != name}


UNFIT: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (lambda: without("2.bias"), r"missing in the file: 2\.bias"),
    "unexpected": (lambda: weights() | {"head.weight": torch.ones(1)}, r"unexpected in the file: head\.weight"),
    "another shape": (lambda: weights(4), r"mismatched: 0\.weight is float32 \[4, 2\], here float32 \[3, 2\]"),
    "whole numbers": (lambda: weights() | {"2.bias": torch.ones(2).long()}, r"2\.bias is int64 \[2\], here float32"),
    "sparse": (lambda: weights() | {"2.bias": torch.ones(2).to_sparse()}, r"mismatched: 2\.bias"),
    "no tensor": (lambda: weights() | {"2.bias": 3}, r"2\.bias is a int, here float32 \[2\]"),
    "other names": (lambda: {f"net.{name}": value for name, value in weights().items()}, "missing in the file: 0"),
    "nothing": (dict, "missing in the file"),
    "a list": (lambda: list(weights().values()), "holds no weights(.|\n)*a list"),
    "a tensor": (lambda: torch.ones(3), "holds no weights(.|\n)*a Tensor"),
    "a number": (lambda: 3, "holds no weights(.|\n)*a int"),
    "a module": (model, r"could run code(.|\n)*torch\.nn\.modules\.container\.Sequential"),
    "arguments": (lambda: {"state_dict": weights(), "args": Namespace(lr=1)}, r"could run code(.|\n)*Namespace"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_does_not_fit_changes_nothing(kind: str, tmp_path: Path) -> None:
    make, says = UNFIT[kind]
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ConfigError, match=says) as caught:
        load_weights_file_(net, save(make(), tmp_path / "w.pth"))
    assert len(str(caught.value).splitlines()) < 10
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def write_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02]q\x00.")


DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no weights at all, and a few more words of it"),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeros": lambda file: file.write_bytes(bytes(4096)),
    "a pickle": lambda file: file.write_bytes(pickle.dumps({"a": Evil()})),
    "evil": lambda file: torch.save({"a": Evil()}, file),
    "another archive": write_zip,
    "a long header": lambda file: file.write_bytes((2**62).to_bytes(8, "little") + b"{}"),
}


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_one_message(name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = save(weights(), tmp_path / name)
    DAMAGED[how](file)
    with pytest.raises(ConfigError, match="--resume") as caught:
        load(file)
    assert len(str(caught.value).splitlines()) < 6
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("distkit.checkpoint.weights_file.load_file", refuse)
    with pytest.raises(ConfigError, match=r"got:      Permission denied\n  type:     chmod u\+r"):
        load(save(weights(), tmp_path / "w.safetensors"))


def test_the_form_is_told_by_the_content(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    save_file(model.state_dict(), tmp_path / "weights.pth")
    other = nn.Linear(2, 3)
    load_weights_file_(other, tmp_path / "weights.pth")
    assert torch.equal(other.weight, model.weight)
    (tmp_path / "junk.pth").write_bytes(b"not a pickle at all")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_weights_file_(other, tmp_path / "junk.pth")


def test_a_sparse_weight_is_named_as_one(tmp_path: Path) -> None:
    state = nn.Linear(2, 3).state_dict()
    torch.save({**state, "weight": state["weight"].to_sparse()}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="weight is sparse_coo float32"):
        load_weights_file_(nn.Linear(2, 3), tmp_path / "weights.pt")


def test_a_file_that_holds_itself_is_read_to_an_end(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["model"] = state
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="does not fit the model"):
        load_weights_file_(nn.Linear(2, 3), tmp_path / "weights.pt")
