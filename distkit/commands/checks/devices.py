"""Devices of this node, and whether its ranks have one each."""

from __future__ import annotations

from pathlib import Path

from distkit.commands.checks.finding import Context, Finding, in_words
from distkit.errors import LaunchError

NAME = "devices"


def devices(context: Context) -> list[Finding]:
    """GPUs that torch can use, against those that the driver has and the ranks that want one."""
    import torch

    from distkit.runtime.process import choose_device

    found = []
    if not torch.cuda.is_available() and any(Path("/dev").glob("nvidia[0-9]*")) and context.device != "cpu":
        hidden = context.env.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={hidden}" if hidden is not None else f"built for CUDA {torch.version.cuda}"
        found.append(Finding(NAME, "error", f"this node has NVIDIA GPUs that torch cannot use ({why})",
                             "nvidia-smi shows the driver; a torch for its CUDA, or --device cpu"))  # fmt: skip
        return found
    try:
        device = choose_device(context.device, context.topology)
    except LaunchError as error:
        what, *rest = str(error).splitlines()
        fix = next((line.partition(":")[2].strip() for line in rest if "type:" in line), "--device cpu")
        return [Finding(NAME, "error", what, fix)]
    if device.type != "cuda":
        what = "no GPU is used" if context.device == "cpu" else "no GPU"
        return [Finding(NAME, "ok", f"{what}: ranks run on {device.type}")]
    count = torch.cuda.device_count()
    names = {torch.cuda.get_device_name(index) for index in range(count)}
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(count))
    message = f"{count} x {', '.join(sorted(names))}, {in_words(memory)}"
    if len(names) > 1:
        found.append(Finding(NAME, "warning", f"{message}: the slowest sets the pace",
                             "CUDA_VISIBLE_DEVICES for those of one kind"))  # fmt: skip
    idle = count - context.local_world_size
    if idle > 0 and context.topology.world_size > 1:
        found.append(Finding(NAME, "warning", f"{message}: {idle} of them without a rank",
                             f"{count} ranks per node"))  # fmt: skip
    return found or [Finding(NAME, "ok", message)]
