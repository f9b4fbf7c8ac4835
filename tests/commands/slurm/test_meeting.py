"""Where the ranks of a job meet."""

import socket

import pytest

from distkit.commands.slurm.meeting import address_of, choose_meeting
from distkit.errors import ConfigError
from distkit.runtime.local_ranks import LOOPBACK, free_port


def test_one_node_meets_on_loopback_and_more_on_the_interface_or_the_host_name() -> None:
    one, named, unnamed = choose_meeting(1, "nowhere0"), choose_meeting(2, "lo"), choose_meeting(2, "")
    assert (one.address, one.interface) == (named.address, named.interface) == (LOOPBACK, "lo")
    assert (unnamed.address, unnamed.interface) == (socket.gethostname(), "")


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"interface ib9\n.*lo"):
        address_of("ib9")


def test_ports_differ_and_lie_below_those_of_outgoing_connections() -> None:
    ports = {free_port(LOOPBACK) for _ in range(20)}
    assert len(ports) > 10
    assert all(10_000 <= port < 65_536 for port in ports)


def test_a_port_in_use_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken, socket.socket() as probe:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        probe.bind((LOOPBACK, 0))
        free = probe.getsockname()[1]
        probe.close()
        offered = iter([taken.getsockname()[1], free])
        monkeypatch.setattr("random.SystemRandom.randrange", lambda *_: next(offered))
        assert free_port(LOOPBACK) == free
