"""Processes, devices, seeds. Importing it does not import torch; `start` does."""

from __future__ import annotations

from distkit.runtime.accelerate_env import read_accelerate_env
from distkit.runtime.topology import Topology, node_name, rank_for_messages, read_topology

__all__ = ["Topology", "node_name", "rank_for_messages", "read_accelerate_env", "read_topology"]
