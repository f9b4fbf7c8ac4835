"""What tells data from other data: a short digest of their content, quick also where they are a terabyte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distkit.data.dataset import MapDataset
from distkit.errors import DataError

BLOCK_BYTES = 2**16
#: Blocks of a tensor that are read: 256 MiB, so that a set such as CIFAR-10 is read whole.
BLOCKS = 4096
DIGITS = 16


def fingerprint(*tensors: Tensor) -> str:
    """16 hexadecimal digits: a sha256 of dtypes, shapes and evenly spread blocks of the values.

    Tensors of up to 256 MiB are read whole. Where they lie (memory, a mapped file, a device) changes nothing.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        for block in spread(tensor.detach().cpu().numpy().reshape(-1).view(np.uint8), BLOCKS):
            digest.update(block)
    return digest.hexdigest()[:DIGITS]


def spread(data: NDArray[np.uint8], most: int) -> Iterator[bytes]:
    """At most so many blocks of `data` [n], evenly spread, the first and the last among them."""
    blocks = -(-len(data) // BLOCK_BYTES)
    for number in np.unique(np.linspace(0, blocks - 1, min(blocks, most)).astype(np.int64)):
        yield data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES].tobytes()


def fingerprint_of(dataset: object) -> str | None:
    """What a data set says of its content; None where it says nothing.

    Raises:
        DataError: it has a `fingerprint` that is no text.
    """
    samples = dataset.samples if isinstance(dataset, MapDataset) else dataset
    found = getattr(samples, "fingerprint", None)
    if found is None or isinstance(found, str):
        return found
    raise DataError(f"the fingerprint of {type(samples).__name__} is no text", expected="a str, or no such attribute",
                    got=type(found).__name__)  # fmt: skip
