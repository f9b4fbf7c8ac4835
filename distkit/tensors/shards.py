"""A tensor sharded over several ranks (a DTensor or a FlatShard): this rank's part of it, and the whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distkit.tensors.flat_shard import FlatShard


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds, sharing its memory; a plain tensor is its own part."""
    if isinstance(tensor, FlatShard):
        return tensor.local
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor with all values, on every rank; all ranks together. A plain tensor is its own whole."""
    if isinstance(tensor, FlatShard):
        return tensor.whole()
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        mesh = tensor.device_mesh
        local = local_part(tensor)
        if local.device.type != mesh.device_type:  # offloaded: the mesh's ranks talk on the device
            tensor = DTensor.from_local(
                local.to(mesh.device_type), mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
            )
        return tensor.full_tensor()
