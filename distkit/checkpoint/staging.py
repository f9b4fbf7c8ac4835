"""Host memory that a save copies into: large pages, pinned for the GPU, aligned for direct writes."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: cudaHostRegisterPortable: pinned for every GPU of the process.
PORTABLE = 1


@dataclass
class Staging:
    """Buffers for this rank's files, one each, reused from save to save."""

    buffers: list[Tensor] = field(default_factory=list)

    def buffer(self, index: int, nbytes: int, device: torch.device) -> Tensor:
        """A buffer of at least `nbytes`."""
        while len(self.buffers) <= index:
            self.buffers.append(allocate(max(nbytes, 1), device))
        if self.buffers[index].numel() < nbytes:
            self.buffers[index] = allocate(nbytes, device)
        return self.buffers[index]


class _Memory(mmap.mmap):
    """Memory of this process alone, in huge pages where Linux has them; pinned by CUDA as long as it lives."""

    _unpin: Callable[[], None] | None = None

    def pin(self, device: torch.device) -> None:
        """Let the GPU copy here directly.

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
    # private: Linux gives shared memory huge pages only if an administrator has enabled it
    memory = _Memory(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # a fault, and a segment of a direct write, for 2 MiB instead of 4 KiB
        memory.madvise(mmap.MADV_DONTFORK)  # a worker forked later would make the next save copy each page
    if device.type == "cuda":
        memory.pin(device)
    return torch.frombuffer(memory, dtype=torch.uint8)
