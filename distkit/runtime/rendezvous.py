"""How ranks find each other: at the store that rank 0, or its launcher, opens at MASTER_ADDR:MASTER_PORT.

Every wait here ends in time, and says who came. torch waits for ever for a listener that is no store and never answers,
whatever the timeout; so what may wait does it in a thread.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from queue import Empty, SimpleQueue
from typing import TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is public, and only listed elsewhere
from torch.distributed.distributed_c10d import PrefixStore, Store

from distkit.errors import RankSilentError, RendezvousError, shorten
from distkit.runtime.agent_store import agree_on_name, is_served_by_agent
from distkit.runtime.local_ranks import free_port, is_loopback, listener
from distkit.runtime.topology import Topology

T = TypeVar("T")
#: The launch's stores and the numbers of the runs in them, kept for further runs of this process: were one closed with
#: its run, a rank that is sooner in the next run would meet the old store and wait in it for ever.
_stores: dict[Topology, tuple[Store, Iterator[int]]] = {}
ALL = "all ranks are here"
#: How long rank 0 keeps the store open for the others to read that ranks are missing.
FAREWELL_SECONDS = 1.0
#: What torch may take beyond its own timeout to say that it could not connect.
CONNECT_SECONDS = 2.0
LONGER = "--start-timeout-seconds if ranks start further apart"


def in_time(work: Callable[[], T], seconds: float) -> T:
    """What `work` returns or raises, in a thread that is left alone when it takes longer.

    Raises:
        TimeoutError: it does.
    """
    done: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, name="distkit-rendezvous", daemon=True).start()
    try:
        value, error = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # it is None only where `work` returns None


def open_store(topology: Topology, seconds: float) -> Store:
    """This rank's end of the launch's store; rank 0 opens the store itself where the launcher has none.

    Raises:
        RendezvousError: it cannot be opened, or not be reached within `seconds`.
    """
    host, port = str(topology.master_addr), int(topology.master_port or 0)
    opens = topology.is_main_process and not is_served_by_agent()
    who, where = f"rank {topology.rank} on {socket.gethostname()}", f"{host}:{port}"

    def connect() -> Store:
        own = socket_on_loopback(host, port) if opens and is_loopback(host) else None
        return TCPStore(host, port, topology.world_size, opens, timeout=timedelta(seconds=seconds),
                        wait_for_workers=False, multi_tenant=True, master_listen_fd=own)  # fmt: skip

    try:
        return in_time(connect, seconds + CONNECT_SECONDS)
    except (TimeoutError, RuntimeError, ValueError) as error:  # torch's DistNetworkError among them
        if opens:
            raise RendezvousError(f"{who} cannot listen at {where}: {why_not(host, port)}") from error
        raise RendezvousError(f"{who}: {nobody(host, port, seconds)}") from error


def socket_on_loopback(host: str, port: int) -> int | None:
    """A socket for the store, which would listen on every network by itself; None where the port is in use."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family).detach()
    except OSError:
        return None  # a store of this process has it, or torch says why not


def why_not(host: str, port: int) -> str:
    """Why rank 0 cannot listen there, and what to do."""
    try:
        with socket.create_server(("", port)):
            in_use = False
    except OSError as refusal:
        in_use = refusal.errno == errno.EADDRINUSE
        if not in_use:
            return f"{refusal.strerror}; set MASTER_PORT to a port above 1023, such as {free_port()}"
    holder = listener(port)
    if in_use and not holder.startswith(f"process {os.getpid()} "):
        by = f" by {holder}" if holder else ""
        return f"the port is in use{by}; set MASTER_PORT to a free one, such as {free_port()}"
    return f"{host} does not lead here; set MASTER_ADDR to this node ({socket.gethostname()}), where rank 0 is"


def nobody(host: str, port: int, seconds: float) -> str:
    """Why a rank did not find rank 0 there within `seconds`, and what to do."""
    where = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=1.0):
            message = f"what listens at {where} is not rank 0: it has not answered for {seconds:g} s"
            return f"{message}; set MASTER_PORT to a port that is free on {host}"
    except TimeoutError:
        reason = "no answer: the host is down, or packets are dropped"
    except OSError as error:
        reason = error.strerror or str(error)
    return (
        f"no rank 0 at {where} in {seconds:g} s ({reason}); MASTER_ADDR and MASTER_PORT must lead from each node to "
        f"that of rank 0, through its firewall; {LONGER}"
    )


def meet(topology: Topology, seconds: float, later_seconds: float) -> Store:
    """The store of this run, in which all ranks have met; all ranks together.

    Args:
        topology: this process among all.
        seconds: how long ranks wait for each other.
        later_seconds: the same for a further run of the same processes, which need not begin at one time.

    Raises:
        RendezvousError: they did not all come; which ones are missing, as far as that can be known.
    """
    if topology not in _stores:
        _stores[topology] = open_store(topology, seconds), count()
    store, runs = _stores[topology]
    run = next(runs)
    seconds = later_seconds if run else seconds
    store = PrefixStore(f"run-{run}", store)
    who = f"rank {topology.rank} on {socket.gethostname()}, at {topology.master_addr}:{topology.master_port}"

    def come() -> tuple[Store, str]:
        part = store
        if is_served_by_agent():
            name = agree_on_name(store, topology.rank, topology.world_size, timedelta(seconds=seconds))
            part = PrefixStore(name, store)
        return part, _come(part, topology, seconds)

    try:
        store, verdict = in_time(come, 2 * seconds + CONNECT_SECONDS)
    except RankSilentError as error:
        raise RendezvousError(f"{who}: {error}; {LONGER}") from error
    except TimeoutError:
        raise RendezvousError(f"{who}: the store there no longer answers; see what rank 0 says, and the network"
                              ) from None  # fmt: skip
    except RuntimeError as error:
        raise RendezvousError(f"{who}: rank 0 has left while ranks were still missing; see what it says") from error
    if verdict != ALL:
        if topology.is_main_process:
            time.sleep(FAREWELL_SECONDS)  # the others read it, too, and then the store closes
        raise RendezvousError(f"{who}: {verdict}")
    return store


def _come(store: Store, topology: Topology, seconds: float) -> str:
    """Say that this rank is here, and wait; ALL, or what is missing, the same for every rank that is here."""
    rank, world_size = topology.rank, topology.world_size
    me = f"{world_size} process {os.getpid()} on {socket.gethostname()}"
    first = store.compare_set(f"here/{rank}", "", me).decode()
    if first != me:
        words = f"{me.partition(' ')[2]} and {first.partition(' ')[2]} both say that they are rank {rank}"
        said = f"{words}; another launch uses this port: set MASTER_PORT to a free one"
        return store.compare_set("verdict", "", said).decode()
    if store.add("count", 1) == world_size:
        return store.compare_set("verdict", "", ALL).decode()
    try:
        store.wait(["verdict"], timedelta(seconds=seconds))
    except RuntimeError:  # DistStoreError: not in time; or the store is gone, and then the next call says so
        return store.compare_set("verdict", "", missing(_who_came(store, world_size), world_size, seconds)).decode()
    return store.get("verdict").decode()


def _who_came(store: Store, world_size: int) -> dict[int, int]:
    """Each rank that has come, and the number of ranks that it was told of."""
    return {
        rank: int(store.get(f"here/{rank}").split()[0]) for rank in range(world_size) if store.check([f"here/{rank}"])
    }


def missing(came: dict[int, int], world_size: int, seconds: float) -> str:
    """Which ranks did not come, and what to do."""
    other = next((rank for rank, said in came.items() if said != world_size), None)
    if other is not None:
        return (
            f"rank {other} was started as one of {came[other]} ranks, and this one as one of {world_size}; start all "
            "with the same number of ranks (WORLD_SIZE)"
        )
    absent = [rank for rank in range(world_size) if rank not in came]
    words = f"rank{'s' if len(absent) > 1 else ''} {shorten(map(str, absent))}"
    return (
        f"{len(came)} of {world_size} ranks came within {seconds:g} s; {words} did not; see their own output, start as "
        f"many ranks as WORLD_SIZE says; {LONGER}"
    )
