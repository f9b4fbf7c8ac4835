"""Facts about the machine and the software, for environment.json. No secrets: no environment variable is copied."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from distkit.runtime.process import Runtime
from distkit.version import __version__

PACKAGES = ("torch", "torchvision", "accelerate", "numpy", "safetensors", "deepspeed")


def describe_environment(runtime: Runtime) -> dict[str, object]:
    """Versions, devices, world size, launcher and the git revision of the working directory, ready for JSON."""
    device = runtime.device
    return {
        "distkit": __version__,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "num_threads": torch.get_num_threads(),
        "world_size": runtime.world_size,
        "local_world_size": runtime.topology.local_world_size,
        "launcher": runtime.topology.launcher,
        "git_revision": git_revision(Path.cwd()),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision(directory: Path) -> str | None:
    """Commit hash of `directory`, with `+changes` where tracked files differ; None outside of git."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
