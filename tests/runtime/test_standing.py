import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.harness import run_ranks

from distkit.runtime.standing import standing


def watched(seconds: float) -> list[tuple[bool, str]]:
    """What the main thread stands in after `seconds`, noted by another thread."""
    found: list[tuple[bool, str]] = []

    def look() -> None:
        time.sleep(seconds)
        found.append(standing(dist.get_world_size() if dist.is_initialized() else 1))

    threading.Thread(target=look).start()
    return found


def test_the_line_of_the_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "my_recipe.py").write_text("import time\ndef read_sample():\n    time.sleep(0.6)\n")
    sys.path.insert(0, str(tmp_path))
    try:
        from my_recipe import read_sample  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    found = watched(0.3)
    read_sample()
    assert found == [(False, "in read_sample (my_recipe.py:3)")]


def test_a_line_of_a_library_says_who_called_it() -> None:
    found = watched(0.3)
    threading.Event().wait(0.6)
    [(waits, sentence)] = found
    assert not waits
    assert sentence.startswith("in wait (threading.py:")
    assert ", called from test_a_line_of_a_library_says_who_called_it (test_standing.py:" in sentence


def in_a_collective() -> tuple[bool, str]:
    dist.init_process_group("gloo")
    found = watched(0.4)
    if dist.get_rank() == 1:
        time.sleep(0.8)
    dist.all_reduce(torch.ones(3, 2))
    dist.destroy_process_group()
    return found[0]


@pytest.mark.distributed
def test_a_collective_is_waited_in() -> None:
    (waits, sentence), working = run_ranks(in_a_collective, 2)
    assert waits
    assert sentence.startswith("in all_reduce")
    assert ", called from in_a_collective (test_standing.py:" in sentence
    assert not working[0]
    assert working[1].startswith("in in_a_collective (test_standing.py:")
