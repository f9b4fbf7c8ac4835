"""Where the ranks of a job meet: an address on the network that they need, and a port that nobody else will take."""

from __future__ import annotations

import fcntl
import socket
import struct
from dataclasses import dataclass

from distkit.errors import ConfigError
from distkit.runtime.local_ranks import LOOPBACK, free_port

SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Meeting:
    """Address and port of the first node's launcher, and the interface over which ranks talk; "" for any."""

    address: str
    port: int
    interface: str


def choose_meeting(num_nodes: int, interface: str) -> Meeting:
    """Loopback for one node; for more, the address of `interface` on this, the first node, or else its host name.

    Raises:
        ConfigError: this node has no such interface, or no free port.
    """
    if num_nodes == 1:
        return Meeting(LOOPBACK, free_port(LOOPBACK), "lo")
    if not interface:
        return Meeting(socket.gethostname(), free_port(""), "")
    address = address_of(interface)
    return Meeting(address, free_port(address), interface)


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this machine.

    Raises:
        ConfigError: it has none; with the names of those there are.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(sock.fileno(), SIOCGIFADDR, request)[20:24])
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(f"{socket.gethostname()} has no address on network interface {interface}",
                              expected=f"one of {names}", fix='interface = "ib0" in slurm/site.toml') \
                from error  # fmt: skip
