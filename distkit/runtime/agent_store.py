"""A part of the elastic agent's store that no earlier attempt has written to.

torchrun's agent hosts one store for as long as it lives, and starts ranks again with it (`--max-restarts`, nodes that
come and go). What the ranks before have left in it looks like what ranks of now say: they would wait for processes that
are gone. Nothing in the environment tells one attempt from another: TORCHELASTIC_RESTART_COUNT counts the failures of
one node, and differs between nodes.

So rank 0 makes up a name. Each other rank leaves a word that nobody has used before, and waits for an answer to it;
rank 0 answers the words it finds, among them old ones, until every rank has said that it knows the name.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid
from typing import TYPE_CHECKING

from distkit.errors import RankSilentError, shorten

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

POLL_SECONDS = 0.02


def is_served_by_agent() -> bool:
    """True where the launcher's store may hold what earlier ranks wrote."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agree_on_name(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> str:
    """A name that all ranks of this attempt know, and none before; all ranks call it together.

    Raises:
        RankSilentError: on rank 0, ranks have not come within `timeout`.
        RuntimeError: on others, rank 0 has not (torch's own).
    """
    word = uuid.uuid4().hex
    if rank == 0:
        _answer_all(store, word, world_size, timeout)
        return word
    store.set(f"word/{rank}", word)
    store.wait([f"answer/{word}"], timeout)
    name: str = store.get(f"answer/{word}").decode()
    store.set(f"knows/{name}/{rank}", "")
    return name


def _answer_all(store: Store, name: str, world_size: int, timeout: datetime.timedelta) -> None:
    end = time.monotonic() + timeout.total_seconds()
    missing, answered = list(range(1, world_size)), set[bytes]()
    while missing:
        for rank in missing:
            if store.check([f"word/{rank}"]) and (word := store.get(f"word/{rank}")) not in answered:
                store.set(f"answer/{word.decode()}", name)
                answered.add(word)
        missing = [rank for rank in missing if not store.check([f"knows/{name}/{rank}"])]
        if missing and time.monotonic() > end:
            raise RankSilentError(f"ranks {shorten(map(str, missing))} did not come within {timeout}")
        time.sleep(POLL_SECONDS if missing else 0)
