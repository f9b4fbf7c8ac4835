import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from distkit.errors import ConfigError
from distkit.runtime import faults
from distkit.runtime.faults import ACTIONS, POINTS, VARIABLE, check_faults, fault


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def arm(text: str) -> None:
        monkeypatch.setenv(VARIABLE, text)
        check_faults()

    yield arm
    monkeypatch.delenv(VARIABLE, raising=False)
    check_faults()


def reached(*points: tuple[str, int, int]) -> list[bool]:
    """Which of the points raised."""
    raised = []
    for point in points:
        try:
            fault(*point)
            raised.append(False)
        except (RuntimeError, OSError):
            raised.append(True)
    return raised


def test_inert_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(faults, "_faults", None)
    for point in POINTS:
        fault(point, 0, 1)
    monkeypatch.setattr(faults, "check_faults", lambda: pytest.fail("the environment is read once"))
    begin = time.perf_counter()
    for _ in range(10_000):
        fault("step", 0, 1)
    assert time.perf_counter() - begin < 0.1


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_is_none(arm: Callable[[str], None], text: str) -> None:
    arm(text)
    assert check_faults() == ()


def test_point_rank_and_step_must_fit(arm: Callable[[str], None]) -> None:
    arm("staging:1:5:raise")
    places = [("staging", 0, 5), ("staging", 1, 4), ("half_shard", 1, 5), ("staging", 1, 5), ("staging", 1, 5)]
    assert reached(*places) == [False, False, False, True, False]  # once in a process


def test_any_rank_and_any_step(arm: Callable[[str], None]) -> None:
    arm("before_vote:*:5:raise, after_rename:0:*:enospc")
    assert reached(("before_vote", 3, 5), ("before_vote", 0, 5), ("before_vote", 0, 6)) == [True, False, False]
    assert reached(*(("after_rename", 0, step) for step in (1, 1, 2))) == [True, True, True]
    assert reached(("after_rename", 1, 3)) == [False]


def test_several_at_one_point_fire_one_after_the_other(arm: Callable[[str], None]) -> None:
    arm("staging:0:1:raise,staging:0:2:enospc")
    assert reached(("staging", 0, 1), ("staging", 0, 2)) == [True, True]


def test_of_many_threads_one_meets_it(arm: Callable[[str], None]) -> None:
    arm("half_shard:0:1:raise")
    met = []
    threads = [threading.Thread(target=lambda: met.extend(reached(("half_shard", 0, 1)))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(met) == 1


def test_enospc_looks_like_a_full_disk(arm: Callable[[str], None]) -> None:
    arm("before_fsync:0:1:enospc")
    with pytest.raises(OSError, match=r"No space left on device.*before_fsync") as caught:
        fault("before_fsync", 0, 1)
    assert caught.value.errno == errno.ENOSPC


def test_slow_sleeps_once_or_at_each_step(arm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    arm("staging:0:1:slow,in_retention:0:*:slow")
    for point in ("staging", "staging", "in_retention", "in_retention"):
        fault(point, 0, 1)
    assert naps == [2.0] * 3


@pytest.mark.parametrize(("action", "sent"), [("kill", None), ("hang", signal.SIGINT), ("hang", signal.SIGTERM)])
def test_kill_and_hang_end_by_signals(action: str, sent: signal.Signals | None) -> None:
    code = "from distkit.runtime.faults import fault\nprint('on', flush=True)\nfault('staging', 0, 1)\nprint('over')"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env={**os.environ, VARIABLE: f"staging:0:1:{action}"}, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        if sent is not None:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
            process.send_signal(sent)
        assert process.wait(10) == -(sent or signal.SIGKILL)
        assert process.stdout.read() == b""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("staging:0:1", r"a fault of 3 parts\n  expected: point:rank:step:action"),
        ("staging:0:1:kill,", "a fault of 1 parts"),
        ("staging:0:1:kill:2", "a fault of 5 parts"),
        (
            "stagin:0:1:kill",
            r"no point in 'stagin:0:1:kill'\n  expected: start-up, data, (?s:.*)type:     staging",
        ),
        ("staging:0:1:kil", rf"no action in (?s:.*){', '.join(ACTIONS)}(?s:.*)type:     kill"),
        ("staging:-1:1:kill", r"no rank in (?s:.*)0 or more, or \* for any"),
        ("staging:0:x:kill", "no step in"),
        ("staging:0:²:kill", "no step in"),
    ],
)
def test_what_is_malformed_is_named(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    monkeypatch.setattr(faults, "_faults", None)
    with pytest.raises(ConfigError, match=message):
        check_faults()
    with pytest.raises(ConfigError, match=message):
        fault("staging", 0, 1)
