"""A file of weights that something else has written, for `--resume FILE --resume.weights-only`.

It is a safetensors file, or a state dict that torch.save has written.

Such a file is compared with the model, name by name, before anything is changed. Nothing in it is executed: torch reads
it with `weights_only=True`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distkit.errors import ConfigError, shorten
from distkit.tensors.spec import spec_of, spec_text

#: Where trainers keep the weights beside other things.
KEYS = ("state_dict", "model_state_dict", "model", "module")
#: What wrappers put before each name: DistributedDataParallel, torch.compile, a module that holds the model.
PREFIXES = ("module.", "_orig_mod.", "model.")
#: What get_extra_state gives: it need be no tensor, and is left out.
EXTRA = "_extra_state"
#: A state dict may lack BatchNorm's counters, as torch itself allows.
OPTIONAL = "num_batches_tracked"


def load_weights_file_(model: nn.Module, file: Path) -> list[str]:
    """Fill `model`, on the CPU, with the weights of `file`; what was done to make them fit, as notes.

    Raises:
        ConfigError: the file cannot be read, or has other names or shapes than the model; `model` is unchanged then.
    """
    content, notes = read_weights(file), [f"started from the weights of {file}"]
    live = {name: value for name, value in model.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor) and not name.endswith(EXTRA)}  # fmt: skip
    saved, found = unwrap(content, live)
    lines = compare(saved, live)
    if lines:
        said = "\n  ".join([f"--resume {file} does not fit the model of build_model", *lines])
        raise ConfigError(said, fix="weights of the same model; what fits of others can be loaded in build_model")
    cast = {f"{spec_of(tensor)[0]} to {spec_of(live[name])[0]}" for name, tensor in saved.items()
            if isinstance(tensor, Tensor) and name in live and tensor.dtype != live[name].dtype}  # fmt: skip
    with torch.no_grad():
        for name, target in live.items():
            if name in saved:
                target.copy_(saved[name])  # type: ignore[arg-type]  # `compare` has seen that it is a tensor
    return notes + found + [f"weights were converted from {words}" for words in sorted(cast)]


def read_weights(file: Path) -> Mapping[object, object]:
    """What a file holds, on the CPU and mapped where that is possible.

    Raises:
        ConfigError: it is neither form, is damaged, or holds more than tensors, numbers, text, lists and dicts.
    """
    try:
        content = load_file(file) if is_safetensors(file) else load_pickled(file)
    except PermissionError as error:
        raise ConfigError(f"--resume {file} cannot be read", expected="a file that you may read", got=error.strerror,
                          fix=f"chmod u+r {file}") from error  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--resume {file} cannot be read", expected="a safetensors file, or one of torch.save",
                          got=str(error).splitlines()[0]) from error  # fmt: skip
    except Exception as error:  # torch's unpickler raises nearly anything for a file that is damaged
        other = is_pickled(file) and ("Unsupported" in str(error) or "Weights only" in str(error))
        raise ConfigError(
            f"--resume {file} " + ("holds more than tensors, which could run code" if other else "cannot be read"),
            expected="a state dict: torch.save(model.state_dict(), FILE)",
            got=next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), type(error).__name__),
        ) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"--resume {file} holds no weights", expected="a state dict: names and tensors",
                          got=f"a {type(content).__name__}")  # fmt: skip
    return content


def is_safetensors(file: Path) -> bool:
    """By its first bytes, whatever its name: the length of a header, which is JSON."""
    with open(file, "rb") as stream:
        begin = stream.read(9)
    return file.suffix == ".safetensors" or (begin[8:] == b"{" and int.from_bytes(begin[:8], "little") < 2**30)


def is_pickled(file: Path) -> bool:
    """By its first bytes: a zip archive, or a pickle."""
    with open(file, "rb") as stream:
        return stream.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def load_pickled(file: Path) -> object:
    """What torch.save has written; the older of its two formats cannot be mapped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of its own old formats
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            return torch.load(file, map_location="cpu", weights_only=True)


def unwrap(content: Mapping[object, object], live: Mapping[str, Tensor]) -> tuple[dict[str, object], list[str]]:
    """The entries by the names that the model uses, where wrappers added to them, and what was taken off, as notes."""
    notes, values = [], {str(name): value for name, value in content.items()}
    for _ in KEYS:  # more of them lie in each other only where one holds itself
        key = next((key for key in KEYS if isinstance(values.get(key), Mapping)), None)
        if key is None:
            break
        values = {str(name): value for name, value in values[key].items()}  # type: ignore[attr-defined]
        notes.append(f"the weights are those under {key!r} in that file")
    while values and not values.keys() & live.keys():
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in values)), None)
        if prefix is None:
            break
        values = {name.removeprefix(prefix): value for name, value in values.items()}
        notes.append(f"{prefix!r} was taken off the names in that file")
    return {name: value for name, value in values.items() if not name.endswith(EXTRA)}, notes


def compare(saved: Mapping[str, object], live: Mapping[str, Tensor]) -> list[str]:
    """How the saved entries differ from the model in name, shape or kind, in lines; [] where they fit."""
    held = {id(live[name]) for name in saved if name in live}  # tied tensors may be saved under one of their names
    lines = []
    missing = [name for name, value in live.items()
               if name not in saved and id(value) not in held and not name.endswith(OPTIONAL)]  # fmt: skip
    if missing:
        lines.append(f"missing in the file: {shorten(missing)}")
    if unexpected := sorted(saved.keys() - live.keys()):
        lines.append(f"unexpected in the file: {shorten(unexpected)}")
    odd = [f"{name} is {_text(saved[name])}, here {spec_text(spec_of(value))}"
           for name, value in live.items() if name in saved and not fits(saved[name], value)]  # fmt: skip
    if odd:
        lines.append(f"mismatched: {shorten(odd)}")
    return lines


def fits(saved: object, here: Tensor) -> bool:
    """Whether `saved` is a tensor of the same shape that can be copied without a change of kind."""
    if not isinstance(saved, Tensor) or saved.layout != torch.strided or saved.shape != here.shape:
        return False
    return saved.dtype == here.dtype or (saved.is_floating_point() and here.is_floating_point())


def _text(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kind = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
    return kind + spec_text(spec_of(value))
