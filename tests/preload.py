"""What the fork server of `harness` imports once for all ranks. No thread may be started here."""

import accelerate  # noqa: F401
import torch
import torch._dynamo
import torch.distributed  # noqa: F401
import tyro  # noqa: F401

import distkit.assemble
import distkit.debug
import distkit.engine.fit
import distkit.recipe  # noqa: F401
