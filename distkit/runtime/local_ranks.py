"""Ranks on this machine: their environment, a port to meet at, and an end when their owner ends. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import select
import signal
import socket
import sys
import threading
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from distkit.errors import ConfigError

LOOPBACK = "127.0.0.1"
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST_PORT = 10_000
TRIES = 1000
#: What an outer launcher said of its own ranks.
OUTER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK",
         "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip


def die_with_parent(parent: int) -> None:
    """End this process when process `parent`, which started it, ends, however that happens (Linux prctl(2)).

    It holds through exec, so a command that is about to be started (`preexec_fn`) may call it.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_owner(owner: int) -> None:
    """The same for process `owner`, for whom this one works; it need not have started it.

    A child of Python's fork server has that server for a parent, and a thread waits for its owner (pidfd_open(2)).
    """
    if sys.platform != "linux":
        return
    if os.getppid() == owner:
        die_with_parent(owner)
        return
    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    except OSError:  # a kernel before 5.3, or a container that forbids it: torch's own look at the owner is left
        return
    else:
        threading.Thread(target=_outlive_nobody, args=(descriptor,), name="distkit-owner", daemon=True).start()


def _outlive_nobody(descriptor: int) -> None:
    poll = select.poll()  # select takes no descriptor above 1023
    poll.register(descriptor, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


def without_launcher(env: Mapping[str, str]) -> dict[str, str]:
    """`env` for ranks that are started anew, whatever started this process."""
    return {name: value for name, value in env.items() if name not in OUTER}


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets for one rank; nothing for a single process."""
    if world_size == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port),
    }  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether `host` stands for this machine alone, wherever it is looked up."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def stay_on_loopback(env: MutableMapping[str, str]) -> None:
    """Let gloo and NCCL listen for the ranks of this machine only, unless `env` names an interface."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if names else ():
        env.setdefault(variable, names[0])


def free_port(address: str = LOOPBACK) -> int:
    """A port that nobody listens on: at random, below those that the kernel gives to outgoing connections.

    It stays free for the seconds until the launcher takes it, unless another job chooses the same of some 20,000.

    Raises:
        ConfigError: none was found.
    """
    for _ in range(TRIES):
        port = random.SystemRandom().randrange(LOWEST_PORT, _first_outgoing_port())
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((address, port))
            return port
    raise ConfigError(f"no free port on {address or socket.gethostname()}", expected=f"one above {LOWEST_PORT}")


def _first_outgoing_port() -> int:
    try:
        first = int(PORT_RANGE.read_text().split()[0])
    except (OSError, ValueError):
        first = 32_768
    return first if first > LOWEST_PORT + TRIES else 65_536


def listener(port: int) -> str:
    """The process that listens at `port` of this machine, where this user may know it; else an empty string."""
    import psutil  # not where the batch script's Python runs

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid and not connection.raddr:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""
