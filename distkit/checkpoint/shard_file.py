"""The one writer of safetensors files: shards in memory, weights and exports straight to the disk.

The format: 8 bytes of header length, the header (JSON), then the tensors without gaps. Larger elements come first, so
that each tensor is aligned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from distkit.checkpoint.format import DTYPES, spec_bytes
from distkit.checkpoint.plan import Piece
from distkit.errors import NonFiniteError
from distkit.files import atomic_file
from distkit.tensors.finite import is_finite
from distkit.tensors.spec import TensorSpec, spec_of, torch_dtype


class Header:
    """The first bytes of a file, and where each tensor goes.

    Attributes:
        data: length and header, padded to 8 bytes.
        spans: first byte in the file, and the one after the last, of each tensor, in the order of the file.
        nbytes: of the whole file.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
        spans, end = {}, 0
        for name, (dtype, shape) in sorted(specs.items(), key=lambda item: (-DTYPES[item[1][0]][1], item[0])):
            start, end = end, end + spec_bytes((dtype, shape))
            header[name] = {"dtype": DTYPES[dtype][0], "shape": shape, "data_offsets": (start, end)}
            spans[name] = start, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.data = len(text).to_bytes(8, "little") + text
        self.spans = {name: (start + len(self.data), stop + len(self.data)) for name, (start, stop) in spans.items()}
        self.nbytes = end + len(self.data)


class ShardFile:
    """One shard file in memory, byte for byte as it will be on the disk."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = {piece.key: piece for piece in pieces}
        self.header = Header({piece.key: (piece.dtype, piece.shape) for piece in pieces})
        self.nbytes = self.header.nbytes

    @torch.no_grad()
    def fill_(self, buffer: Tensor, value_of: Callable[[Piece], Tensor]) -> None:
        """Put the file into `buffer` (uint8, at least `nbytes`). Copies from a GPU are queued, not waited for."""
        data = self.header.data
        buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for key, (start, stop) in self.header.spans.items():
            piece = self.pieces[key]
            if stop > start:
                target = buffer[start:stop].view(torch_dtype(piece.dtype)).view(piece.shape)
                target.copy_(value_of(piece), non_blocking=True)

    def check_finite(self, buffer: Tensor, judged: Mapping[str, bool]) -> None:
        """Refuse a file, as `fill_` put it into `buffer`, with a tensor that is NaN or infinite; weights come first.

        Args:
            buffer: uint8, at least `nbytes`; copies into it have ended.
            judged: names of tensors that must not be NaN -> whether they may be infinite.

        Raises:
            NonFiniteError: its message is the tensor's name.
        """
        for key in sorted(self.pieces, key=lambda key: not self.pieces[key].name.startswith("model/")):
            piece, (start, stop) = self.pieces[key], self.header.spans[key]
            values = buffer[start:stop].view(torch_dtype(piece.dtype))
            if piece.name in judged and not is_finite(values, infinity=judged[piece.name]):
                raise NonFiniteError(piece.name)


def write_tensors(file: BinaryIO, header: Header, values: Iterable[Tensor]) -> None:
    """Write a whole file, one tensor in memory at a time.

    Args:
        file: open for writing, empty.
        header: of the file.
        values: in the order of `header.spans`; any device and strides.

    Raises:
        OSError: the disk is full or failing.
    """
    file.write(header.data)
    for tensor in values:
        file.write(tensor_bytes(tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()))
        del tensor  # before the next one is made


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write whole tensors to `path` as one file, tied ones under each of their names.

    Raises:
        OSError: the disk is full or not writable; what was at `path` is unchanged then.
    """
    header = Header({name: spec_of(tensor) for name, tensor in tensors.items()}, metadata)
    with atomic_file(path) as file:
        write_tensors(file, header, (tensors[name] for name in header.spans))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    # numpy has no bfloat16: the same bytes as uint8
    return tensor.reshape(-1).view(torch.uint8).numpy().data
