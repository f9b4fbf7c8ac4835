"""What the fork server of `harness` imports once for all ranks. No thread may be started here."""

import accelerate  # noqa: F401
import torch  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed  # noqa: F401
import tyro  # noqa: F401

import distkit.assemble  # noqa: F401
import distkit.debug  # noqa: F401
import distkit.engine.fit  # noqa: F401
import distkit.recipe  # noqa: F401
