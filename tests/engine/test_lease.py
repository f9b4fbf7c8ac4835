"""One run directory, one run: with real processes."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from distkit.engine import lease as module
from distkit.engine.lease import LEASE, Lease, holder
from distkit.errors import ConfigError

#: Answers one line a command: `acquire [AT]` (`AT` in seconds since 1970), `release`, `holder`, `fork`, `read`.
WORKER = """
import errno, fcntl, os, sys, time
from pathlib import Path
from distkit.errors import ConfigError
from distkit.engine import lease

if sys.argv[2:] == ["no-locks"]:
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.lockf, lease.RECHECK_SECONDS = lockf, 0.1
held, run_dir = None, Path(sys.argv[1])
for line in sys.stdin:
    command, *args = line.split()
    answer = "done"
    try:
        if command == "acquire":
            while args and time.time() < float(args[0]):
                continue
            held = lease.Lease.acquire(run_dir)
            answer = f"held, before: {held.taken_over_from}"
        elif command == "release":
            held.release()
        elif command == "holder":
            answer = str(lease.holder(run_dir))
        elif command == "fork":
            child = os.fork()
            if child == 0:
                held.release()
                os.closerange(0, 1)
                time.sleep(60)
                os._exit(0)
            answer = str(child)
    except ConfigError as error:
        answer = f"refused: {error}".replace("\\n", " ")
    print(answer, flush=True)
"""


class Worker:
    """A process of its own that is told what to do."""

    def __init__(self, run_dir: Path, *args: str) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(run_dir), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SLURM_JOB_ID": "77"},
        )
        self.pid = self._popen.pid

    def tell(self, command: str) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(command + "\n")
        self._popen.stdin.flush()

    def hear(self) -> str:
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().strip()

    def any_rank(self, command: str) -> str:
        self.tell(command)
        return self.hear()

    def kill(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        for stream in (self._popen.stdin, self._popen.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def start(*args: str) -> Worker:
        workers.append(Worker(tmp_path, *args))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


@pytest.fixture(autouse=True)
def nothing_is_held() -> Iterator[None]:
    yield
    for lease in list(module._held.values()):
        lease.release()


def record(host: str, pid: int, started: float) -> str:
    return json.dumps({"host": host, "pid": pid, "started": started, "job": None, "since": "2020-01-01T00:00:00+00:00"})


def test_the_file_names_the_holder_and_goes_with_it(tmp_path: Path, start: Callable[..., Worker]) -> None:
    worker = start()
    assert worker.any_rank("acquire") == "held, before: None"
    written = json.loads((tmp_path / LEASE).read_text())
    assert written["pid"] == worker.pid
    assert written["job"] == "77"
    assert abs(written["started"] - psutil.Process(worker.pid).create_time()) < 1
    worker.any_rank("release")
    worker.any_rank("release")
    assert list(tmp_path.iterdir()) == []


def test_the_second_is_refused_and_told_whom_to_stop(tmp_path: Path, start: Callable[..., Worker]) -> None:
    worker = start()
    worker.any_rank("acquire")
    with pytest.raises(ConfigError) as caught:
        Lease.acquire(tmp_path)
    since = json.loads((tmp_path / LEASE).read_text())["since"]
    message = str(caught.value)
    assert f"process {worker.pid} on {os.uname().nodename}, SLURM job 77, since {since}" in message
    assert f"--run-dir {tmp_path}-2, or scancel 77, or wait" in message
    assert caught.value.exit_code == 2
    worker.any_rank("release")
    Lease.acquire(tmp_path)


@pytest.mark.parametrize(("kind", "rounds"), [("locks", 150), ("no-locks", 4)])
def test_of_two_at_once_exactly_one_wins(kind: str, rounds: int, start: Callable[..., Worker]) -> None:
    pair = [start(*([kind] if kind == "no-locks" else [])) for _ in range(2)]
    assert {worker.any_rank("holder") for worker in pair} == {"None"}
    winners = set()
    for turn in range(rounds):
        # a hair's breadth apart, now one first, now the other
        moment = time.time() + 0.005
        for place, worker in enumerate(pair):
            worker.tell(f"acquire {moment + (turn % 5) * (place ^ turn % 2) * 2e-5}")
        answers = [worker.hear() for worker in pair]
        held = [answer.startswith("held") for answer in answers]
        assert sum(held) == 1, answers
        winner, loser = pair[held.index(True)], answers[held.index(False)]
        assert f"got:      process {winner.pid} on" in loser
        assert answers[held.index(True)] == "held, before: None"
        winners.add(winner.pid)
        winner.any_rank("release")
    assert kind == "no-locks" or len(winners) == 2


@pytest.mark.parametrize("args", [(), ("no-locks",)])
def test_a_killed_holder_is_replaced_at_once(
    tmp_path: Path, start: Callable[..., Worker], args: tuple[str, ...]
) -> None:
    first, second = start(*args), start(*args)
    first.any_rank("acquire")
    first.kill()
    assert second.any_rank("holder") == "None"
    answer = second.any_rank("acquire")
    assert answer.startswith(f"held, before: process {first.pid} on")
    assert json.loads((tmp_path / LEASE).read_text())["pid"] == second.pid


def test_a_forked_child_neither_keeps_nor_releases_it(tmp_path: Path, start: Callable[..., Worker]) -> None:
    worker = start()
    worker.any_rank("acquire")
    child = int(worker.any_rank("fork"))
    try:
        with pytest.raises(ConfigError, match=f"process {worker.pid} "):
            Lease.acquire(tmp_path)
        worker.kill()
        assert psutil.pid_exists(child)
        before = Lease.acquire(tmp_path).taken_over_from
        assert before is not None
        assert f"process {worker.pid} " in before
    finally:
        os.kill(child, signal.SIGKILL)


def test_one_process_has_one_run_in_a_directory(tmp_path: Path, start: Callable[..., Worker]) -> None:
    lease = Lease.acquire(tmp_path)
    with pytest.raises(ConfigError, match="this process already has a run"):
        Lease.acquire(tmp_path / ".." / tmp_path.name)
    assert "this process" not in str(holder(tmp_path))
    # neither of the two has opened, and so unlocked, the file
    assert start().any_rank("acquire").startswith("refused")
    lease.release()
    Lease.acquire(tmp_path).release()


def test_asking_for_the_holder_disturbs_nobody(tmp_path: Path, start: Callable[..., Worker]) -> None:
    assert holder(tmp_path) is None
    assert holder(tmp_path / "gone") is None
    first, second = start(), start()
    first.any_rank("acquire")
    for _ in range(5):
        assert f"process {first.pid} on" in str(holder(tmp_path))
        assert f"process {first.pid} on" in first.any_rank("holder")
    assert second.any_rank("acquire").startswith("refused")
    first.kill()
    assert holder(tmp_path) is None
    assert json.loads((tmp_path / LEASE).read_text())["pid"] == first.pid


def test_who_only_asks_does_not_keep_a_run_out(tmp_path: Path, start: Callable[..., Worker]) -> None:
    worker = start()
    (tmp_path / LEASE).touch()
    with open(tmp_path / LEASE, "rb") as file:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        worker.tell("acquire")
        time.sleep(0.2)
    assert worker.hear() == "held, before: None"


def test_a_lock_without_a_name_yet_is_a_lock(tmp_path: Path, start: Callable[..., Worker]) -> None:
    worker = start()
    with open(tmp_path / LEASE, "wb") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert worker.any_rank("holder") == "a process that has just started"
        assert "a process that has just started" in worker.any_rank("acquire")


def test_a_file_removed_between_open_and_lock_is_not_taken(
    tmp_path: Path, start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = module._lock, []

    def removed_first(descriptor: int) -> int | None:
        if not calls:
            (tmp_path / LEASE).unlink()
        calls.append(descriptor)
        return lock(descriptor)

    monkeypatch.setattr(module, "_lock", removed_first)
    lease = Lease.acquire(tmp_path)
    assert len(calls) == 2
    assert start().any_rank("acquire").startswith("refused")
    lease.release()
    assert start().any_rank("acquire") == "held, before: None"


@pytest.mark.parametrize("args", [(), ("no-locks",)])
@pytest.mark.parametrize(
    "content",
    [b"\x00" * 300, b"[1, 2]", b'{"host": "n"', b'{"host": 1, "pid": "x", "started": 0, "job": 0, "since": 0}', b"\xff",
     b"[" * 4096, record("x", 10**30, 0.0).encode()],
    ids=range(7),
)  # fmt: skip
def test_garbage_in_the_file_keeps_nobody_out(
    tmp_path: Path, start: Callable[..., Worker], content: bytes, args: tuple[str, ...]
) -> None:
    (tmp_path / LEASE).write_bytes(content)
    worker = start(*args)
    assert worker.any_rank("holder") == "None"
    assert worker.any_rank("acquire") == "held, before: an unknown process"
    assert json.loads((tmp_path / LEASE).read_text())["pid"] == worker.pid


def test_an_empty_file_was_nobodys(tmp_path: Path) -> None:
    (tmp_path / LEASE).touch()
    assert Lease.acquire(tmp_path).taken_over_from is None


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(module, "RECHECK_SECONDS", 0.1)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_living_record_keeps_others_out(tmp_path: Path, start: Callable[..., Worker]) -> None:
    worker = start("no-locks")
    worker.any_rank("acquire")
    assert f"process {worker.pid} on" in str(holder(tmp_path))
    with pytest.raises(ConfigError, match=f"process {worker.pid} on"):
        Lease.acquire(tmp_path)
    worker.any_rank("release")
    lease = Lease.acquire(tmp_path)
    assert worker.any_rank("acquire").startswith("refused")
    lease.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_pid_used_anew_is_dead(tmp_path: Path) -> None:
    me = psutil.Process()
    (tmp_path / LEASE).write_text(record(os.uname().nodename, me.pid, me.create_time() - 100))
    assert holder(tmp_path) is None
    assert str(me.pid) in str(Lease.acquire(tmp_path).taken_over_from)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_another_host_is_believed(tmp_path: Path) -> None:
    path = tmp_path / LEASE
    path.write_text(record("elsewhere", 1, 0.0))
    assert "process 1 on elsewhere" in str(holder(tmp_path))
    with pytest.raises(ConfigError, match=f"kill 1 on elsewhere, or rm {path} if that run is dead"):
        Lease.acquire(tmp_path)
    path.unlink()
    lease = Lease.acquire(tmp_path)
    # and what another host wrote since is not removed
    path.write_text(record("elsewhere", 1, 0.0))
    lease.release()
    assert path.exists()


def test_with_locks_a_record_of_another_host_is_only_a_name(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text(record("elsewhere", 1, 0.0))
    assert holder(tmp_path) is None
    assert "on elsewhere" in str(Lease.acquire(tmp_path).taken_over_from)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ConfigError, match=r"(?s)cannot take the lease of .*Read-only.*--run-dir DIR"):
        Lease.acquire(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LEASE).symlink_to("precious")
    with pytest.raises(ConfigError, match="cannot take the lease"):
        Lease.acquire(tmp_path)
    assert "possibly another process" in str(holder(tmp_path))
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_full_disk_is_named_and_leaves_nothing_locked(
    tmp_path: Path, start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ConfigError, match="No space left"):
            Lease.acquire(tmp_path)
    assert start().any_rank("acquire") == "held, before: None"


def test_a_release_that_fails_is_told_and_frees_the_lock(
    tmp_path: Path, start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lease = Lease.acquire(tmp_path)

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", stale)
        lease.release()
    assert "cannot remove" in capsys.readouterr().err
    assert start().any_rank("acquire").startswith("held")


def test_no_torch() -> None:
    code = "import sys, distkit.engine.lease, distkit.runtime.faults; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
