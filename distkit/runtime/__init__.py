"""Processes, devices, seeds. Importing it does not import torch; `start` does."""

from __future__ import annotations

from distkit.runtime.launcher import launched_strategy, merge_launcher_env
from distkit.runtime.topology import Topology, read_topology

__all__ = ["Topology", "launched_strategy", "merge_launcher_env", "read_topology"]
