"""One safetensors file in memory, byte for byte as it will lie on the disk."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distkit.checkpoint.format import DTYPES
from distkit.checkpoint.plan import Piece

#: cudaHostRegisterPortable: pinned for every GPU of the process.
PORTABLE = 1


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


class _Memory(mmap.mmap):
    """Memory of this process alone, in huge pages where Linux has them; pinned by CUDA as long as it lives."""

    _unpin: Callable[[], None] | None = None

    def pin(self, device: torch.device) -> None:
        """Let the GPU copy here by itself.

        torch's own pinned memory is rounded up to a power of two, and kept when nobody needs it any more.

        Raises:
            RuntimeError: the driver cannot.
        """
        here, process = torch.frombuffer(self, dtype=torch.uint8).data_ptr(), os.getpid()
        cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):  # a thread begins on GPU 0, which may be another rank's
            error = int(cuda.cudaHostRegister(here, len(self), PORTABLE))
        if error:
            raise RuntimeError(f"CUDA cannot pin {len(self):,} bytes of this machine's memory: error {error}")

        def unpin() -> None:
            if os.getpid() == process:
                with torch.cuda.device(device):
                    cuda.cudaHostUnregister(here)

        self._unpin = unpin

    def __del__(self) -> None:
        if self._unpin is not None:
            self._unpin()


def allocate(nbytes: int, device: torch.device) -> Tensor:
    """uint8 [nbytes] on the host, aligned to a page for direct writes; pinned where copies come from CUDA."""
    # private: Linux gives huge pages to shared memory only where an administrator said so
    memory = _Memory(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # a fault, and a segment of a direct write, for 2 MiB instead of 4 KiB
        memory.madvise(mmap.MADV_DONTFORK)  # a worker forked later would make the next save copy each page
    if device.type == "cuda":
        memory.pin(device)
    return torch.frombuffer(memory, dtype=torch.uint8)
