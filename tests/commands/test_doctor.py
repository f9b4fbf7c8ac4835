"""`distkit doctor`: a healthy machine passes, and each planted fault is found. The faults are real ones: small disks,
bound ports, control groups, affinities, signals. Most run in forks, which take no second to import torch."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from support.harness import ROOT, free_port, run_ranks
from support.launching import LAUNCH, environment
from support.launching import run as run_command
from support.writing import write_checkpoint

from distkit.checkpoint.format import step_name
from distkit.commands import run
from distkit.commands.checks import cgroup
from distkit.commands.checks.finding import Finding
from distkit.commands.checks.footprint import parse_params
from distkit.commands.checks.meeting import Report
from distkit.commands.checks.report import as_text, merge
from distkit.commands.checks.table import CHECKS
from distkit.commands.checks.together import judge_skew
from distkit.commands.checks.versions import numbers

pytestmark = pytest.mark.distributed
#: One data worker, so that a machine with few cores and little shared memory is healthy; no GPU.
USUAL = ["--device", "cpu", "--data-workers", "1", "--timeout-seconds", "20"]
Fault = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one rank printed, as JSON, and its exit code."""

    code: int
    findings: list[dict[str, object]]

    def of(self, name: str, level: str) -> str:
        """Messages and remedies of the findings of `name` with `level`, a line each."""
        chosen = [one for one in self.findings if (one["name"], one["level"]) == (name, level)]
        return "\n".join(f"{one['message']} -> {one['remedy']}" for one in chosen)

    def problems(self) -> list[tuple[object, object]]:
        return [(one["name"], one["level"]) for one in self.findings if one["level"] != "ok"]


def doctor(
    folder: Path,
    *argv: str,
    fault: Fault | None = None,
    on_rank: int | None = None,
    world_size: int = 1,
    env: Mapping[str, str] | None = None,
) -> list[Seen]:
    """`distkit doctor --json` on each rank, with `fault` done before (on one of them)."""
    seen = run_ranks(_doctor, world_size, str(folder), [*USUAL, *argv], fault, on_rank, env=env, timeout=60)
    return [Seen(code, json.loads(text)["findings"] if text else []) for code, text in seen]


def _doctor(folder: str, argv: Sequence[str], fault: Fault | None, on_rank: int | None) -> tuple[int, str]:
    os.chdir(folder)
    if fault is not None and on_rank in (None, int(os.environ.get("RANK", "0"))):
        fault()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = run(["doctor", "--json", *argv])
    return code, out.getvalue()


def mount(where: str, options: str, *after: str) -> None:
    """A small disk at `where`, which this process alone sees; then shell commands."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
    for command in ("mount --make-rprivate /", f"mount -t tmpfs -o {options} tmpfs {where}", *after):
        subprocess.run(command, shell=True, check=True, timeout=20)


def can_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    tried = subprocess.run("unshare --mount mount -t tmpfs tmpfs /mnt", shell=True, capture_output=True, timeout=20)
    return tried.returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="mounting a small disk needs root")


# healthy machines


def test_one_process_on_a_healthy_machine(tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, "--params", "1M")
    assert (seen.code, seen.problems()) == (0, [])
    names = [check.name for check in CHECKS if check.scope != "all"]
    assert [one["name"] for one in seen.findings] == names
    assert all(one["nodes"] == [socket.gethostname()] for one in seen.findings)
    assert "5 x 11.4 MiB" in seen.of("checkpoints", "ok")
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_make_one_screen_and_their_sum_is_right(tmp_path: Path) -> None:
    first, second = doctor(tmp_path, world_size=2)
    assert (first.code, second.code, second.findings) == (0, 0, [])
    assert [one["name"] for one in first.findings] == [check.name for check in CHECKS]
    assert first.problems() == []
    assert {tuple(one["ranks"]) for one in first.findings if one["name"] == "signals"} == {(0, 1)}  # type: ignore[arg-type]
    assert re.search(
        r"gloo: right sum over 2 ranks; 16 MiB in [\d.]+ ms, .*iB/s on the bus", first.of("all-reduce", "ok")
    )
    assert list(tmp_path.iterdir()) == []


# the network


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        (seen,) = doctor(tmp_path, env={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    assert seen.code == 1
    assert seen.problems() == [("rendezvous", "error")]
    assert f"port {port} is in use by process {os.getpid()}" in seen.of("rendezvous", "error")
    assert "export MASTER_PORT=" in seen.of("rendezvous", "error")


@pytest.mark.slow
def test_a_port_in_use_ends_both_ranks(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ranks = doctor(tmp_path, "--timeout-seconds", "2", world_size=2, env={"MASTER_PORT": port})
    assert [seen.code for seen in ranks] == [1, 1]
    assert f"port {port} is in use" in ranks[0].of("rendezvous", "error")
    assert ranks[0].problems() == [("rendezvous", "error"), ("all-reduce", "warning")]
    assert "rank 1 cannot meet the others" in ranks[1].of("rendezvous", "error")


def test_a_rendezvous_elsewhere(tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, env={"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"})
    assert "MASTER_ADDR=192.0.2.1 is not this node" in seen.of("rendezvous", "error")
    (seen,) = doctor(tmp_path, env={"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"})
    assert "no-such-host.invalid has no address here" in seen.of("rendezvous", "error")


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_a_wrong_interface(variable: str, tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, env={variable: "ib7"})
    assert (seen.code, seen.problems()) == (1, [("interface", "error")])
    assert f"{variable}=ib7: no interface ib7 is up here -> export {variable}=" in seen.of("interface", "error")
    (seen,) = doctor(tmp_path, env={variable: "lo"})
    assert f"{variable}=lo" in seen.of("interface", "ok")


@pytest.mark.slow
def test_a_wrong_interface_on_two_ranks_keeps_them_from_trying_to_exchange(tmp_path: Path) -> None:
    first, second = doctor(tmp_path, world_size=2, env={"GLOO_SOCKET_IFNAME": "ib7"})
    assert (first.code, second.code, second.findings) == (1, 0, [])
    assert first.problems() == [("interface", "error"), ("all-reduce", "warning")]


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (seen,) = doctor(tmp_path, "--timeout-seconds", "1", env=env)
    assert seen.code == 1
    assert "nothing came from rank 1, 2 in 1 s" in seen.of("rendezvous", "error")


@pytest.mark.slow
def test_rank_0_that_does_not_come_is_missed(tmp_path: Path) -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (seen,) = doctor(tmp_path, "--timeout-seconds", "1", env=env)
    assert seen.code == 1
    assert "rank 1 cannot meet the others" in seen.of("rendezvous", "error")


@pytest.mark.slow
def test_a_rank_that_ends_in_an_exchange_holds_up_nobody(tmp_path: Path) -> None:
    port, env = free_port(), {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    settings = {**env, "RANK": "1", "MASTER_PORT": str(port)}
    code = (
        "import os, sys; import torch.distributed as dist; dist.all_gather_object = lambda *_: os._exit(7)\n"
        f"from distkit.commands import run; sys.exit(run(['doctor', *{USUAL}]))"
    )
    other = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **settings}, cwd=ROOT)
    try:
        (seen,) = doctor(tmp_path, env={**env, "RANK": "0", "MASTER_PORT": str(port)})
        assert other.wait(30) == 7
    finally:
        other.kill()
        other.wait()
    assert seen.code == 1
    assert "the check itself failed" in seen.of("nodes", "error")
    assert "nothing came from rank 1 after the exchange began" in seen.of("rendezvous", "error")


# the launcher and SLURM


def test_one_process_where_several_were_asked_for(tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, env={"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"})
    assert seen.code == 1
    assert "accelerate launch was asked for several processes and started one" in seen.of("launch", "error")
    (seen,) = doctor(tmp_path, env={"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"})
    assert (seen.code, seen.problems()) == (1, [("launch", "error")])
    assert "SLURM gave this job 4 tasks, but this process was started alone -> srun" in seen.of("launch", "error")


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, "srun started 2 tasks on this node, and each of them is a launcher"),
        ({"SLURM_STEP_NUM_NODES": "2"}, "2 nodes with 2 ranks each, and WORLD_SIZE=2 -> torchrun --nnodes 2"),
    ],
)
def test_wrong_tasks_per_node(env: dict[str, str], says: str, tmp_path: Path) -> None:
    first, second = doctor(tmp_path, world_size=2, env={**SLURM, **env})
    assert (first.code, second.code) == (1, 0)
    assert says in first.of("launch", "error")
    assert "not tried" in first.of("all-reduce", "warning")


def test_tasks_that_a_launcher_does_not_use(tmp_path: Path) -> None:
    env = {**SLURM, "SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NTASKS": "1"}
    (seen,) = doctor(tmp_path, env=env)
    assert (seen.code, seen.problems()) == (0, [("launch", "warning")])
    assert "SLURM was asked for 8 tasks per node, and this node has 1 rank" in seen.of("launch", "warning")


def test_nodes_that_a_step_does_not_use(tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, env={**SLURM, "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS": "1"})
    assert (seen.code, seen.problems()) == (0, [("launch", "warning")])
    assert "this step uses 1 of the 4 nodes of its job" in seen.of("launch", "warning")


def test_one_launcher_per_node_under_srun_is_right(tmp_path: Path) -> None:
    env = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURMD_NODENAME": "node9"}
    first, _ = doctor(tmp_path, world_size=2, env=env)
    assert (first.code, first.problems()) == (0, [])
    assert first.findings[0]["nodes"] == ["node9"]
    assert "in SLURM job 7" in first.of("launch", "ok")


def test_cpus_that_srun_did_not_take_from_the_job(tmp_path: Path) -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_CPUS_PER_TASK": "4096"}
    for more in ({}, {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}):
        (seen,) = doctor(tmp_path, env={**env, **more})
        assert (seen.code, seen.problems()) == (0, [("launch", "warning")])
        assert "4096 CPUs per task" in seen.of("launch", "warning")
        assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in seen.of("launch", "warning")


# limits of the node


@needs_mount
def test_little_shared_memory(tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, fault=partial(mount, "/dev/shm", "size=8m"))
    assert (seen.code, seen.problems()) == (1, [("shared memory", "error")])
    assert "/dev/shm has 8 MiB free: data workers hand over" in seen.of("shared memory", "error")
    (seen,) = doctor(tmp_path, fault=partial(mount, "/dev/shm", "size=100m"))
    assert (seen.code, seen.problems()) == (0, [("shared memory", "warning")])
    assert "1 data worker may hold 128 MiB" in seen.of("shared memory", "warning")


def one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def test_too_few_cores_for_the_workers(tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, "--data-workers", "4", fault=one_core)
    assert seen.code == 0
    assert seen.problems()[0] == ("cores", "warning")
    assert "1 of " in seen.of("cores", "warning")
    assert "--data.num-workers 1" in seen.of("cores", "warning")
    first, _ = doctor(tmp_path, world_size=2, fault=one_core)
    assert "at most 1 rank per node" in first.of("cores", "warning")


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))


def test_workers_against_the_limit_of_open_files(tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, "--data-workers", "64", fault=few_files)
    assert "100 files may be open, and 64 data workers need about" in seen.of("limits", "error")
    assert seen.code == 1


def small_address_space() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**42, 2**42))


def test_a_limited_address_space(tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, fault=small_address_space)
    assert (seen.code, seen.problems()) == (0, [("limits", "warning")])
    assert "4 TiB" in seen.of("limits", "warning")


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A real control group of 1 GiB below this process's own."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
        group = Path("/sys/fs/cgroup/memory" + line.split(":", 2)[2]) / f"doctor-{os.getpid()}"
        group.mkdir()
    except (OSError, StopIteration):
        pytest.skip("no control group of memory can be made here")
    try:
        (group / "memory.limit_in_bytes").write_text(str(2**30))
        yield group
    finally:
        group.rmdir()


def enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def test_workers_against_the_limit_of_memory(memory_group: Path, tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, "--data-workers", "16", fault=partial(enter, memory_group))
    assert seen.code == 1
    assert "1 rank with 16 data workers need about" in seen.of("memory", "error")
    assert "the limit here is 1 GiB" in seen.of("memory", "error")


def test_a_save_in_the_background_that_memory_does_not_allow(tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, "--params", "1T")
    assert seen.problems() == [("memory", "warning"), ("checkpoints", "error")]
    assert "the copy of 10.9 TiB for a save in the background" in seen.of("memory", "warning")


@pytest.mark.parametrize(("path", "cpus", "memory"), [("/a/b", 1.5, 2**30), ("/elsewhere", None, None)])
def test_limits_of_version_2_are_read_up_to_the_root(
    path: str, cpus: float | None, memory: int | None, tmp_path: Path
) -> None:
    """The files that the kernel would write, in a folder, because this may be a machine with version 1."""
    group = tmp_path / "mount" / "a" / "b"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text(f"{2**30}\n")
    (group / "cpu.max").write_text("150000 100000\n")
    (group.parent / "cpu.max").write_text("max 100000\n")
    (group / "pids.max").write_text("100\n")
    (group / "pids.current").write_text("40\n")
    (tmp_path / "cgroup").write_text(f"0::{path}\n")
    (tmp_path / "mountinfo").write_text(f"41 31 0:38 / {tmp_path}/mount rw,relatime - cgroup2 cgroup2 rw\n")
    found = cgroup.limits(tmp_path)
    assert (found.cpus, found.memory) == (cpus, memory)
    assert found.processes == ((100, 40) if path == "/a/b" else None)


# the directory of the checkpoints


@needs_mount
@pytest.mark.parametrize(
    ("options", "after", "argv", "says"),
    [
        ("size=1m", "head -c 2M /dev/zero > {disk}/fill || true", [], "No space left on device -> free space"),
        ("size=64m", "true", ["--params", "124M"], "64 MiB free, and 5 checkpoints of 1.39 GiB need 6.93 GiB"),
        ("size=64m,nr_inodes=1", "true", [], "cannot create a folder: No space left on device"),
        ("size=200m,nr_inodes=20", "true", ["--params", "1M"], "inodes free, and the checkpoints need 55"),
        ("size=1m", "mount -o remount,ro {disk}", [], "cannot create a folder: Read-only file system -> it is mounted"),
    ],
)
def test_a_disk_that_cannot_hold_the_checkpoints(
    options: str, after: str, argv: list[str], says: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    fault = partial(mount, str(disk), options, after.format(disk=disk))
    (seen,) = doctor(tmp_path, "--run-dir", str(disk / "run"), *argv, fault=fault)
    assert (seen.code, seen.problems()) == (1, [("checkpoints", "error")])
    assert says in seen.of("checkpoints", "error")


def test_a_folder_where_nothing_can_be_renamed(tmp_path: Path) -> None:
    folder = tmp_path / "append-only"
    folder.mkdir()
    chattr = shutil.which("chattr")
    if chattr is None or subprocess.run([chattr, "+a", folder], capture_output=True, timeout=20).returncode != 0:
        pytest.skip("chattr +a does not work here")
    try:
        (seen,) = doctor(tmp_path, "--run-dir", str(folder))
    finally:
        subprocess.run([chattr, "-a", folder], check=True, timeout=20)
    assert (seen.code, seen.problems()) == (1, [("checkpoints", "error")])
    assert "cannot rename a folder: Operation not permitted" in seen.of("checkpoints", "error")


def test_a_file_where_the_run_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    (seen,) = doctor(tmp_path)
    assert "a file lies where a folder belongs" in seen.of("checkpoints", "error")


@needs_mount
def test_a_folder_that_a_rank_does_not_share(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    fault = partial(mount, str(tmp_path / "runs"), "size=4m")
    first, second = doctor(tmp_path, world_size=2, fault=fault, on_rank=1)
    assert (first.code, second.code) == (1, 0)
    assert first.problems() == [("shared folder", "error")]
    assert "rank 1 cannot see what rank 0 writes there" in first.of("shared folder", "error")


def test_the_size_comes_from_a_run_that_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "checkpoints"
    for step in (10, 20):
        write_checkpoint(folder, step, {"model/weight": torch.zeros(1000)})
    (seen,) = doctor(tmp_path)
    assert "free for 3 x " in seen.of("checkpoints", "ok")  # 3 newest, the best, the one being written; 2 are there
    assert f"as {step_name(20)}" in seen.of("checkpoints", "ok")
    (tmp_path / "runs" / "config.json").write_text('{"checkpoint": {"keep_last": null}}')
    (seen,) = doctor(tmp_path, "--checkpoint", str(folder / step_name(10)))
    assert (seen.code, seen.problems()) == (0, [("checkpoints", "warning")])
    assert "every checkpoint is kept" in seen.of("checkpoints", "warning")
    (seen,) = doctor(tmp_path, "--keep", "7")
    assert "free for 6 x " in seen.of("checkpoints", "ok")


# signals


def ignore_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def block_usr1() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])


def test_signals_that_do_not_come(tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, fault=ignore_hangup)
    assert (seen.code, seen.problems()) == (0, [("signals", "warning")])
    assert "SIGHUP: ignored by what started this process (nohup" in seen.of("signals", "warning")
    (seen,) = doctor(tmp_path, fault=block_usr1)
    assert (seen.code, seen.problems()) == (1, [("signals", "error")])
    assert "SIGUSR1: blocked" in seen.of("signals", "error")


@pytest.mark.slow
def test_a_signal_that_one_of_two_ranks_ignores(tmp_path: Path) -> None:
    first, _ = doctor(tmp_path, world_size=2, fault=ignore_hangup, on_rank=1)
    assert first.problems() == [("signals", "warning")]
    assert [one["ranks"] for one in first.findings if one["name"] == "signals"] == [[0], [1]]


def test_torchrun_dies_of_usr1_unless_it_is_told(tmp_path: Path) -> None:
    (seen,) = doctor(tmp_path, env={"TORCHELASTIC_RUN_ID": "x"})
    assert "torchrun dies of SIGUSR1" in seen.of("signals", "warning")
    (seen,) = doctor(tmp_path, env={"TORCHELASTIC_RUN_ID": "x", "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1"})
    assert seen.problems() == []


# the screen and the arguments


def be_another_node_with_another_clock() -> None:
    """Its name is this process's alone; a clock cannot be: time namespaces leave CLOCK_REALTIME as it is."""
    assert ctypes.CDLL(None, use_errno=True).unshare(0x4000000) == 0  # CLONE_NEWUTS
    socket.sethostname("node2")
    real = time.time
    time.time = lambda: real() + 70.0  # type: ignore[assignment]


@needs_mount
def test_a_clock_that_is_wrong_on_one_node(tmp_path: Path) -> None:
    env = {"GLOO_SOCKET_IFNAME": "lo"}
    first, _ = doctor(tmp_path, world_size=2, fault=be_another_node_with_another_clock, on_rank=1, env=env)
    said = first.of("clocks", "error")
    assert re.search(r"the clock of node2 is (69|7[0-9])\.\d s ahead of rank 0's.* -> timedatectl on node2", said), said
    assert first.code == 1


def test_clocks_are_judged_by_the_node_that_is_farthest_off() -> None:
    (agree,) = judge_skew({"node1": 0.0, "node2": -0.4})
    assert (agree.level, agree.message) == ("ok", "they agree within 1 s on 2 nodes")
    (drifts,) = judge_skew({"node1": 0.0, "node2": -2.5})
    assert (drifts.level, drifts.message.partition(":")[0]) == (
        "warning",
        "the clock of node2 is 2.5 s behind rank 0's",
    )
    (wrong,) = judge_skew({"node1": 0.0, "node2": 0.3, "node3": 3600.0})
    assert (wrong.level, wrong.message.partition(":")[0]) == (
        "error",
        "the clock of node3 is 3600.0 s ahead of rank 0's",
    )


def test_equal_findings_are_one_line_and_others_name_their_ranks() -> None:
    good, bad = Finding("memory", "ok", "much"), Finding("memory", "error", "little", "buy some")
    again = Finding("versions", "ok", "torch")
    reports = [Report(0, "node1", [again, good]), Report(1, "node1", [again, bad]), Report(2, "node2", [again, good])]
    rows = [row.split() for row in as_text(merge(reports)).splitlines()]
    assert rows == [
        ["ok", "versions", "node1,", "node2", "torch"],
        ["ok", "memory", "node1,", "node2", "rank", "0,", "2", "much"],
        ["error", "memory", "node1", "rank", "1", "little"],
        ["->", "buy", "some"],
        ["1", "error,", "0", "warnings"],
    ]


def test_a_finding_has_a_remedy_unless_all_is_well() -> None:
    for level, remedy in (("ok", "x"), ("warning", ""), ("fatal", "x")):
        with pytest.raises(ValueError, match=r"remedy|no level"):
            Finding("memory", level, "m", remedy)  # type: ignore[arg-type]


def test_sizes_and_versions_are_read() -> None:
    assert [parse_params(text) for text in ("5", "124M", "1.5b", "2K")] == [5, 124_000_000, 1_500_000_000, 2_000]
    assert numbers("2.15.0+cu132") == (2, 15, 0)
    assert numbers("2.9") < numbers("2.11.0")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--params", "many"], "--params 124M"),
        (["--params", "1M", "--checkpoint", "x"], "not allowed with"),
        (["--checkpoint", "nowhere"], "nothing there"),
        (["--data-workers", "-1"], "0 or more"),
        (["--keep", "0"], "1 or more"),
        (["now"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", *argv]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert len(told.splitlines()) < 10


# command lines as they are typed

LINE = [sys.executable, "-m", "distkit", "doctor", *USUAL]


def typed(tmp_path: Path, *command: str, **env: str) -> tuple[int, str]:
    done = run_command(command, tmp_path, {**environment(env), "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [[str(LAUNCH / "local.sh"), "-n", "2"], ["torchrun", "--nproc-per-node", "2"]],
    ids=["local", "torchrun"],
)
def test_one_screen_under_a_launcher(launcher: list[str], tmp_path: Path) -> None:
    code, screen = typed(tmp_path, *launcher, *LINE[1:])
    assert code == 0, screen
    assert screen.count("all-reduce") == 1
    assert "right sum over 2 ranks" in screen
    assert screen.splitlines()[-1].startswith("0 errors, ")
    code, screen = typed(tmp_path, *launcher, *LINE[1:], GLOO_SOCKET_IFNAME="ib7")
    assert code == 1, screen
    assert screen.count("GLOO_SOCKET_IFNAME=ib7: no interface ib7") == 1


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_instead_of_two(tmp_path: Path) -> None:
    launcher = ["accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    code, screen = typed(tmp_path, *launcher, *LINE[1:])
    assert code == 1
    assert "accelerate launch was asked for several processes and started one" in screen


@pytest.mark.slow
def test_nohup_and_taskset(tmp_path: Path) -> None:
    code, screen = typed(
        tmp_path, "nohup", "taskset", "-c", str(min(os.sched_getaffinity(0))), *LINE, "--data-workers", "3"
    )
    assert code == 0, screen
    assert "SIGHUP: ignored" in screen
    assert "1 of " in screen
