"""Ranks that cannot find each other end in time, and say where they looked, who came and what to do (C6)."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from support.harness import ROOT, free_port, run_ranks, run_recipe_cli

from distkit.config import TrainConfig
from distkit.errors import RendezvousError
from distkit.runtime import read_topology
from distkit.runtime.process import start
from distkit.runtime.rendezvous import in_time, meet, missing

TINY = ROOT / "tests" / "support" / "tiny.py"
HOST = socket.gethostname()
FLAGS = ["--run-dir", "run", "--start-timeout-seconds", "1"]
CONFIG = TrainConfig(num_steps=1, device="cpu", timeout_seconds=60, start_timeout_seconds=5)


def last_words(folder: Path, rank: int, port: int, host: str = "127.0.0.1", world_size: int = 2) -> str:
    """What `rank` says, started alone, before it ends with exit code 1."""
    env = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    (ended,) = run_recipe_cli(FLAGS, folder, recipe=TINY, env=env, timeout=60)
    assert ended.returncode == 1
    assert not (folder / "run").exists()
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


@contextmanager
def silent(*, full: bool = False) -> Iterator[int]:
    """The port of a program that never speaks; `full`: it takes no more connections, and Linux drops what comes."""
    with socket.create_server(("127.0.0.1", 0), backlog=0 if full else 8) as server:
        clients = [socket.socket() for _ in range(4 if full else 0)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]
        for client in clients:
            client.close()


def test_nobody_listens(tmp_path: Path) -> None:
    port = free_port()
    said = last_words(tmp_path, 1, port)
    assert f"rank 1 on {HOST}: no rank 0 at 127.0.0.1:{port} in 1 s (Connection refused)" in said
    assert "MASTER_ADDR and MASTER_PORT must lead" in said
    assert "--start-timeout-seconds" in said


def test_packets_are_dropped(tmp_path: Path) -> None:
    with silent(full=True) as port:
        said = last_words(tmp_path, 1, port)
    assert f"no rank 0 at 127.0.0.1:{port} in 1 s (no answer: the host is down, or packets are dropped)" in said


def test_the_name_is_unknown(tmp_path: Path) -> None:
    said = last_words(tmp_path, 1, free_port(), host="no-such-host.invalid")
    assert ": no rank 0 at no-such-host.invalid:" in said


def test_another_program_has_the_port_and_never_speaks(tmp_path: Path) -> None:
    with silent() as port:
        said = last_words(tmp_path, 1, port)
    assert f"rank 1 on {HOST}: what listens at 127.0.0.1:{port} is not rank 0: it has not answered for 1 s" in said
    assert "set MASTER_PORT to a port that is free on 127.0.0.1" in said


def test_another_program_has_rank_0_s_port(tmp_path: Path) -> None:
    with silent() as port:
        said = last_words(tmp_path, 0, port)
    assert f"rank 0 on {HOST} cannot listen at 127.0.0.1:{port}: the port is in use by process {os.getpid()}" in said
    assert "set MASTER_PORT to a free one, such as " in said


def test_rank_0_is_elsewhere(tmp_path: Path) -> None:
    said = last_words(tmp_path, 0, free_port(), host="no-such-host.invalid")
    assert f"no-such-host.invalid does not lead here; set MASTER_ADDR to this node ({HOST}), where rank 0 is" in said


@pytest.mark.distributed
def test_fewer_ranks_come_than_were_said(tmp_path: Path) -> None:
    ended = run_recipe_cli(FLAGS, tmp_path, recipe=TINY, world_size=2, env={"WORLD_SIZE": "4"})
    for rank, done in enumerate(ended):
        assert done.returncode == 1
        assert f"distkit: error (rank {rank}): rank {rank} on {HOST}, at 127.0.0.1:" in done.stderr
        assert "2 of 4 ranks came within 1 s; ranks 2, 3 did not; " in done.stderr


@pytest.mark.distributed
def test_an_interface_that_is_not_there(tmp_path: Path) -> None:
    ended = run_recipe_cli(FLAGS, tmp_path, recipe=TINY, world_size=2, env={"GLOO_SOCKET_IFNAME": "nowhere7"})
    for done in ended:
        assert done.returncode == 1
        assert "and cannot connect to them: " in done.stderr
        assert "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in done.stderr.splitlines()[-1]


def disagree() -> str:
    topology = read_topology(os.environ)
    try:
        meet(replace(topology, world_size=2 + topology.rank), 8.0, 8.0)
    except RendezvousError as error:
        return str(error)
    return "met"


@pytest.mark.distributed
def test_ranks_that_were_told_of_different_numbers() -> None:
    first, second = run_ranks(disagree, 2)
    assert first.partition(": ")[2] == second.partition(": ")[2]
    assert "ranks, and this one as one of " in first


def meet_as(ranks: dict[str, int]) -> str:
    topology = read_topology(os.environ)
    topology = replace(topology, rank=ranks[str(topology.rank)], world_size=3)
    try:
        meet(topology, 5.0, 5.0)
    except RendezvousError as error:
        return str(error)
    return "met"


@pytest.mark.distributed
def test_two_launches_at_one_port() -> None:
    for said in run_ranks(meet_as, 3, {"0": 0, "1": 1, "2": 1}):
        assert f" on {HOST} both say that they are rank 1; another launch uses this port" in said


def wait_in_collectives() -> list[float]:
    config, topology = replace(CONFIG, start_timeout_seconds=1.0), read_topology(os.environ)
    sums = []
    for run in range(2):
        if run and topology.rank == 1:
            time.sleep(1.5)  # a further run need not begin at one time
        runtime = start(config, topology)
        if topology.rank == 1:
            time.sleep(1.5)
        total = torch.ones(())
        dist.all_reduce(total)
        sums.append(total.item() + len(runtime.gather(None)))
        runtime.close()
    return sums


@pytest.mark.distributed
def test_the_timeout_of_the_start_is_not_that_of_the_run() -> None:
    assert run_ranks(wait_in_collectives, 2) == [[4.0, 4.0]] * 2


def test_in_time() -> None:
    assert in_time(lambda: 3, 5.0) == 3
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 // 0, 5.0)
    with pytest.raises(TimeoutError):
        in_time(lambda: time.sleep(5.0), 0.01)


def test_who_is_missing() -> None:
    assert "3 of 4 ranks came within 9 s; rank 2 did not; " in missing({0: 4, 1: 4, 3: 4}, 4, 9.0)
    assert missing({0: 2, 1: 3}, 2, 9.0).startswith("rank 1 was started as one of 3 ranks, and this one as one of 2; ")


def listening() -> list[str]:
    """The addresses at which this rank listens, once it has met the others."""
    runtime = start(CONFIG, read_topology(os.environ))
    connections = psutil.Process().net_connections("inet")
    addresses = [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]
    runtime.gather(None)
    runtime.close()
    return addresses


@pytest.mark.distributed
def test_ranks_of_one_machine_listen_on_loopback_only() -> None:
    first, second = run_ranks(listening, 2)
    assert len(first) > len(second) > 0  # the store
    assert {*first, *second} <= {"127.0.0.1", "::1"}
