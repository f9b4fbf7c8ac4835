"""Whether values are NaN or infinite: of live tensors without waiting for the device, of copies on the host at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

#: Elements that are added up at a time.
CHUNK = 2**20


def magnitudes(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The sum of absolute values of each tensor, 0-dim float32: NaN or infinite where one of its elements is.

    One kernel for many tensors on a GPU, and nothing waits. Not the Euclidean norm: squares of finite values overflow.
    The order of the results is not that of `tensors`.
    """
    by_dtype: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    sums: list[Tensor] = []
    for dtype, same in by_dtype.items():
        narrow = dtype in (torch.float16, torch.bfloat16)
        sums += torch._foreach_norm(same, 1, dtype=torch.float32 if narrow else None)
    return [value.float() for value in sums]


def largest_magnitude(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """The largest of `magnitudes`, 0-dim float32 on `device`; 0 where there is no tensor."""
    sums = magnitudes(tensors)
    return torch.stack(sums).amax().to(device) if sums else torch.zeros((), device=device)


def is_finite(values: Tensor, *, infinity: bool = False) -> bool:
    """Whether no element is NaN or infinite, or, with `infinity`, whether none is NaN. Waits for the device.

    Args:
        values: any dtype and shape; integers are always finite.
        infinity: infinite values are allowed.
    """
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point() or not values.numel():
        return True
    if values.itemsize == 1:
        values = values.float()
    chunks = torch.split(values.reshape(-1), CHUNK)
    # NaN and infinity survive in a sum, which is read several times faster than element by element
    suspects = torch.stack([chunk.sum(dtype=torch.float32) for chunk in chunks]).isfinite().logical_not()
    if not suspects.any():
        return True
    bad = torch.isnan if infinity else _not_finite
    return not any(bool(bad(chunks[index]).any()) for index in suspects.nonzero().flatten().tolist())


def _not_finite(values: Tensor) -> Tensor:
    return values.isfinite().logical_not()
