"""The weights of a model as one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distkit.checkpoint.write import sync_folder


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to `path`; a reader sees the whole file or none (write, fsync, rename, fsync the folder).

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    partial = path.with_name(f".tmp-{path.name}")
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").resolve_conj().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        # safetensors refuses tied tensors and views of one memory, and a loader wants every name
        whole[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    try:
        save_file(whole, partial, metadata=dict(metadata))
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
