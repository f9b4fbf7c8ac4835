"""Machines that are not there: network namespaces behind a bridge, with hostnames and process numbers of their own.

Needs root, `ip` and `unshare`, and a kernel with namespaces, veth and bridge.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

INTERFACE = "eth0"


@dataclass(frozen=True)
class Network:
    """Nodes `node0`, `node1`, ... that reach each other at `address(i)` through a switch."""

    name: str

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def command(self, node: int, command: Sequence[str]) -> list[str]:
        """`command` on a node; all that it starts ends with it."""
        # the shell stays, so that the command is not process 1, which the kernel spares most signals
        script = f'hostname node{node}; "$@"; exit $?'
        apart = [
            "unshare",
            "--pid",
            "--fork",
            "--mount-proc",
            "--uts",
            "--kill-child=SIGKILL",
            "bash",
            "-c",
            script,
            "-",
        ]
        return ["ip", "netns", "exec", f"{self.name}-{node}", *apart, *command]

    def drop(self, node: int) -> None:
        """The switch no longer passes on what comes from or goes to the node, which sees a link as before."""
        ip("-n", f"{self.name}-s", "link", "set", f"port{node}", "nomaster")

    def restore(self, node: int) -> None:
        """It does again."""
        ip("-n", f"{self.name}-s", "link", "set", f"port{node}", "master", "bridge")

    def take_down(self, node: int) -> None:
        """The node's interface goes down."""
        ip("-n", f"{self.name}-{node}", "link", "set", INTERFACE, "down")

    def take_up(self, node: int) -> None:
        """It comes up."""
        ip("-n", f"{self.name}-{node}", "link", "set", INTERFACE, "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


def why_impossible() -> str:
    """Why there can be no such network here, or an empty string."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if missing := [name for name in ("ip", "unshare") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} not installed"
    try:
        with connected(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"


@contextlib.contextmanager
def connected(num_nodes: int) -> Iterator[Network]:
    """A network; afterwards it is gone."""
    network = Network(f"distkit{os.getpid()}")
    spaces = [f"{network.name}-{which}" for which in ("s", *range(num_nodes))]
    try:
        for space in spaces:
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        switch = spaces[0]
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for node, space in enumerate(spaces[1:]):
            port = f"port{node}"
            ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", space)
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", space, "addr", "add", f"{network.address(node)}/24", "dev", INTERFACE)
            ip("-n", space, "link", "set", INTERFACE, "up")
        yield network
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, timeout=30, check=False)
