"""The network between ranks: interfaces by name, the address of rank 0, and its port."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping

import psutil

from distkit.commands.checks.finding import Context, Finding
from distkit.runtime.local_ranks import free_port, listener

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interface(context: Context) -> list[Finding]:
    """Whether the interfaces that gloo and NCCL are told to use exist, and whether they must be told."""
    present = {name: stats.isup for name, stats in psutil.net_if_stats().items()}
    real = sorted(name for name, up in present.items() if up and name != "lo")
    listed = ", ".join(real) or "lo"
    found = []
    for variable in VARIABLES:
        missing = [name for name in _named(context.env, variable) if not _matches(variable, name, present)]
        if missing:
            found.append(Finding("interface", "error",
                                 f"{variable}={context.env[variable]}: no interface {', '.join(missing)} is up here",
                                 f"export {variable}={real[0] if real else 'lo'} (there are: {listed})"))  # fmt: skip
    if found or context.num_nodes == 1 or _is_loopback(str(context.topology.master_addr)):
        return found or [
            Finding("interface", "ok", f"{listed} ({_said(context.env) or 'none is named for the ranks'})")
        ]
    if "GLOO_SOCKET_IFNAME" not in context.env and _is_loopback(socket.gethostname(), unknown=True):
        message = "the name of this host stands for a loopback address: gloo on other nodes cannot reach it"
        return [Finding("interface", "error", message, f"export GLOO_SOCKET_IFNAME={real[0] if real else 'NAME'}")]
    if len(real) > 1 and not _said(context.env):
        message = f"this host has several networks ({listed}), and none is named for the ranks"
        return [Finding("interface", "warning", message, "export GLOO_SOCKET_IFNAME=NAME NCCL_SOCKET_IFNAME=NAME")]
    return [Finding("interface", "ok", f"{listed} ({_said(context.env) or 'none is named for the ranks'})")]


def _said(env: Mapping[str, str]) -> str:
    return ", ".join(f"{variable}={env[variable]}" for variable in VARIABLES if env.get(variable))


def _named(env: Mapping[str, str], variable: str) -> list[str]:
    """The names that a variable asks for; NCCL's `^NAME` only excludes some."""
    text = env.get(variable, "")
    return [] if text.startswith("^") else [name for name in text.split(",") if name]


def _matches(variable: str, name: str, present: Mapping[str, bool]) -> bool:
    """gloo takes whole names; NCCL takes beginnings of names, or whole ones after `=`."""
    if variable.startswith("GLOO") or name.startswith("="):
        return present.get(name.removeprefix("="), False)
    return any(up and there.startswith(name) for there, up in present.items())


def _is_loopback(host: str, *, unknown: bool = False) -> bool:
    """Whether a name stands for this machine only; `unknown` where it has no address. gloo then takes the loopback."""
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return unknown


def rendezvous(context: Context) -> list[Finding]:
    """Whether the address of rank 0 has a meaning here and, on rank 0, whether it may listen there."""
    topology, env = context.topology, context.env
    host = topology.master_addr or env.get("MASTER_ADDR", "127.0.0.1")
    port = topology.master_port or (int(env["MASTER_PORT"]) if env.get("MASTER_PORT", "").isdecimal() else None)
    if port is None:
        return [Finding("rendezvous", "ok", "one process needs no port")]
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        return [Finding("rendezvous", "error", f"MASTER_ADDR={host} has no address here: {error.strerror}",
                        "export MASTER_ADDR=the address of the node of rank 0")]  # fmt: skip
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not topology.is_main_process:
        return [Finding("rendezvous", "ok", f"{host}:{port}")]
    mine = {str(address.address).partition("%")[0] for of in psutil.net_if_addrs().values() for address in of}
    if not addresses & mine and not any(address.startswith("127.") for address in addresses):
        return [Finding("rendezvous", "error", f"MASTER_ADDR={host} is not this node, where rank 0 runs",
                        f"export MASTER_ADDR={socket.gethostname()}, or start rank 0 there")]  # fmt: skip
    return _port(host, port)


def _port(host: str, port: int) -> list[Finding]:
    """Listen there for an instant, as rank 0 will."""
    try:
        with socket.create_server(("", port)):
            return [Finding("rendezvous", "ok", f"{host}:{port}")]
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return [Finding("rendezvous", "error", f"port {port} cannot be opened: {error.strerror}",
                            "export MASTER_PORT=a port above 1023")]  # fmt: skip
    who = listener(port)
    return [Finding("rendezvous", "error", f"port {port} is in use" + (f" by {who}" if who else ""),
                    f"export MASTER_PORT={free_port()}")]  # fmt: skip
