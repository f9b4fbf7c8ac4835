"""Ranks of one attempt agree on a part of a store in which earlier attempts have left what they wrote."""

import datetime
import threading
from collections.abc import Callable

import pytest
from support.harness import free_port
from torch.distributed import TCPStore

from distkit.errors import RankSilentError
from distkit.runtime.agent_store import agree_on_name, is_served_by_agent

TIMEOUT = datetime.timedelta(seconds=20)


@pytest.fixture
def client() -> Callable[[], TCPStore]:
    """New ends of one store, as ranks have them."""
    port = free_port()
    host = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

    def connect() -> TCPStore:
        assert host.port == port
        return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)

    return connect


def agree(client: Callable[[], TCPStore], ranks: range, world_size: int) -> dict[int, str]:
    """What the ranks agree on, each in a thread; those that are left out do not come."""
    names: dict[int, str] = {}

    def join(rank: int) -> None:
        names[rank] = agree_on_name(client(), rank, world_size, TIMEOUT)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_each_attempt_has_a_name_of_its_own_whatever_the_last_one_left(client: Callable[[], TCPStore]) -> None:
    seen = set()
    # later ranks first, and fewer or more of them the next time
    for world_size in (3, 3, 2, 4):
        names = agree(client, range(world_size - 1, -1, -1), world_size)
        assert len(names) == world_size
        seen.add(*set(names.values()))
    assert len(seen) == 4


def test_ranks_that_died_while_they_waited_confuse_nobody(client: Callable[[], TCPStore]) -> None:
    store = client()
    for rank in (1, 2):
        store.set(f"word/{rank}", f"of the dead {rank}")
    names = agree(client, range(3), 3)
    assert len(set(names.values())) == 1


def test_a_rank_that_does_not_come_is_named(client: Callable[[], TCPStore]) -> None:
    with pytest.raises(RankSilentError, match="ranks 1, 2 did not come"):
        agree_on_name(client(), 0, 3, datetime.timedelta(seconds=0.1))


def test_who_serves_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, served in ((None, False), ("False", False), ("True", True)):
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        if value is not None:
            monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", value)
        assert is_served_by_agent() is served
