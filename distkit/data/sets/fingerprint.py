"""Fingerprints: a short digest of the content of data, quick even where they are a terabyte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distkit.data.dataset import MapDataset
from distkit.errors import DataError

BLOCK_BYTES = 2**16
#: Blocks of a tensor that are read: 256 MiB, so that a set such as CIFAR-10 is read whole.
BLOCKS = 4096
DIGITS = 16


class Values(Protocol):
    """A tensor, or files that are read as one."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""

    @property
    def shape(self) -> torch.Size:
        """Size of every dim."""

    def __len__(self) -> int:
        """Size of the first dim."""

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """Rows `start` to `start + length`; `dim` is 0."""


def fingerprint(*values: Values) -> str:
    """16 hexadecimal digits: a sha256 of dtypes, shapes and evenly spread blocks of the values.

    Up to 256 MiB are read whole. Where the values are (memory, mapped files, a device) changes nothing.
    """
    digest = hashlib.sha256()
    for each in values:
        digest.update(f"{each.dtype} {list(each.shape)}\n".encode())
        row_bytes = each.dtype.itemsize * each.shape[1:].numel()
        for start, stop in _spread(len(each) * row_bytes, BLOCKS):
            first, last = start // row_bytes, -(-stop // row_bytes)
            rows = each.narrow(0, first, last - first).detach().cpu().numpy().reshape(-1).view(np.uint8)
            digest.update(rows[start - first * row_bytes : stop - first * row_bytes].data)
    return digest.hexdigest()[:DIGITS]


def spread(data: NDArray[np.uint8], most: int) -> Iterator[bytes]:
    """At most `most` blocks of `data` [n], evenly spread, the first and the last among them."""
    for start, stop in _spread(len(data), most):
        yield data[start:stop].tobytes()


def _spread(num_bytes: int, most: int) -> Iterator[tuple[int, int]]:
    blocks = -(-num_bytes // BLOCK_BYTES)
    for number in np.unique(np.linspace(0, blocks - 1, min(blocks, most)).astype(np.int64)).tolist():
        yield number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, num_bytes)


def fingerprint_of(dataset: object) -> str | None:
    """What a data set says of its content; None where it says nothing.

    Raises:
        DataError: it has a `fingerprint` that is not a str.
    """
    samples = dataset.samples if isinstance(dataset, MapDataset) else dataset
    declared = getattr(samples, "fingerprint", None)
    if declared is None or isinstance(declared, str):
        return declared
    raise DataError(
        f"the fingerprint of {type(samples).__name__} is not a string",
        expected="a str, or no such attribute",
        got=type(declared).__name__,
    )


def file_digest(file: Path) -> str:
    """A sha256 of the size of a file and of evenly spread blocks of it, at most 256 MiB."""
    digest = hashlib.sha256(str(file.stat().st_size).encode())
    for block in spread(np.memmap(file, np.uint8, mode="r"), BLOCKS):
        digest.update(block)
    return digest.hexdigest()
