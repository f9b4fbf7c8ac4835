"""One safetensors file in memory, byte for byte as it will lie on the disk."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distkit.checkpoint.format import DTYPES
from distkit.checkpoint.plan import Piece


class Image:
    """Where each piece of a file goes: 8 bytes of header length, the header, then the tensors without gaps.

    The format is that of the safetensors library; larger elements come first, so that each tensor is aligned.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = sorted(pieces, key=lambda piece: (-DTYPES[piece.dtype][1], piece.key))
        header: dict[str, object] = {}
        spans, end = [], 0
        for piece in self.pieces:
            spans.append((end, end + piece.nbytes))
            header[piece.key] = {"dtype": DTYPES[piece.dtype][0], "shape": piece.shape, "data_offsets": spans[-1]}
            end += piece.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self._spans = [(start + len(self.header), stop + len(self.header)) for start, stop in spans]
        self.nbytes = end + len(self.header)

    @torch.no_grad()
    def fill_(self, buffer: Tensor, value_of: Callable[[Piece], Tensor]) -> None:
        """Put the file into `buffer` (uint8, at least `nbytes`). Copies from a GPU are queued, not waited for."""
        buffer[: len(self.header)] = torch.frombuffer(bytearray(self.header), dtype=torch.uint8)
        for piece, (start, stop) in zip(self.pieces, self._spans, strict=True):
            if stop > start:
                place = buffer[start:stop].view(getattr(torch, piece.dtype)).view(piece.shape)
                place.copy_(value_of(piece), non_blocking=True)


def allocate(nbytes: int, device: torch.device) -> Tensor:
    """uint8 [nbytes] on the host, aligned to a page for direct writes; pinned where copies come from CUDA."""
    if device.type == "cuda":
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    # private: Linux gives huge pages to shared memory only where an administrator said so
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # a fault, and a segment of a direct write, for 2 MiB instead of 4 KiB
        memory.madvise(mmap.MADV_DONTFORK)  # a worker forked later would make the next save copy each page
    return torch.frombuffer(memory, dtype=torch.uint8)
