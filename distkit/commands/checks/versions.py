"""Versions, and combinations of them that are known not to work."""

from __future__ import annotations

import platform
import re
from importlib import metadata

from distkit.commands.checks.finding import Context, Finding
from distkit.version import __version__

NAME = "versions"
SHOWN = ("torchvision", "accelerate", "deepspeed")


def versions(context: Context) -> list[Finding]:
    """Requirements of distkit, and pairs of packages that break each other."""
    import torch

    installed = {name: version for name in (*SHOWN, "transformers") if (version := _version(name))}
    found = [*_requirements(), *_pairs(installed), *_launcher(context, installed)]
    shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed)
    listed = f"distkit {__version__}, Python {platform.python_version()}, torch {torch.__version__}, {shown}"
    return found or [Finding(NAME, "ok", listed)]


def _requirements() -> list[Finding]:
    """What distkit's own metadata asks for, without the extras."""
    found: list[Finding] = []
    try:
        requirements = metadata.requires("distkit") or []
    except metadata.PackageNotFoundError:
        return found
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)
        if match is None:
            continue
        name, least = match.groups()
        version = _version(name)
        if version is None or numbers(version) < numbers(least):
            found.append(Finding(NAME, "error", f"{name} {version or 'is missing'}; distkit needs {least} or later",
                                 f"pip install '{name}>={least}'"))  # fmt: skip
    return found


def _pairs(installed: dict[str, str]) -> list[Finding]:
    import torch

    found = []
    torch_version, vision = numbers(torch.__version__), numbers(installed.get("torchvision", "0"))
    if vision >= (0, 29) and torch_version < (2, 14):
        message = f"torchvision {installed['torchvision']} needs torch 2.14 or later, and this is {torch.__version__}"
        found.append(Finding(NAME, "error", message, "pip install 'torch>=2.14', or torchvision 0.26 for torch 2.11"))
    if torch.version.cuda is None and "+cu" in _build_of_torchvision():
        message = f"torch {torch.__version__} is built for the CPU and torchvision {_build_of_torchvision()} for CUDA: "
        found.append(Finding(NAME, "error", message + "operator torchvision::nms does not exist",
                             "install torch and torchvision from the same index"))  # fmt: skip
    if "deepspeed" in installed and "transformers" not in installed:
        message = "deepspeed is installed without transformers, which Accelerate imports for it: no --strategy zero*"
        found.append(Finding(NAME, "warning", message, "pip install 'distkit[deepspeed]'"))
    if torch_version[:2] == (2, 11):
        message = "torch 2.11 with torch.compile: a result of an autograd.Function that is changed in place in its "
        found.append(Finding(NAME, "warning", message + "forward gets gradients of zero",
                             "a later torch, or no --compile for models with such a function"))  # fmt: skip
    return found


def _launcher(context: Context, installed: dict[str, str]) -> list[Finding]:
    accelerate = context.topology.launcher == "accelerate" and context.topology.world_size == 1
    if accelerate and context.launch_error is None:
        message = f"accelerate {installed.get('accelerate')} with one process: SIGTERM ends the launcher, not the run"
        return [Finding(NAME, "warning", message, "python RECIPE for one process")]
    return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _build_of_torchvision() -> str:
    """`0.29.2+cu132`, from its files: the import takes more than a second."""
    try:
        text = metadata.distribution("torchvision").locate_file("torchvision/version.py").read_text()
    except (metadata.PackageNotFoundError, OSError):
        return ""
    match = re.search(r"__version__ = '([^']*)'", text)
    return match[1] if match else ""


def numbers(version: str) -> tuple[int, ...]:
    """`2.15.0+cu132` -> (2, 15, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
