"""A real SLURM of two nodes on this machine: its own munge, ports and folder; nothing of the machine's is touched."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil
from support.harness import ROOT, free_port
from support.launching import alive, environment

from distkit.runtime.local_ranks import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
MISSING = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
#: The nodes are processes of their own PID namespaces, as on machines of their own, and die as such.
NAMESPACES = os.geteuid() == 0
#: Two GPUs on each node, as far as SLURM can tell.
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"
CONFIG = """
ClusterName=distkit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SlurmdTimeout=5
ReturnToService=2
KillWait=20
GresTypes=gpu
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=16 Gres=gpu:2
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Controller, munge and nodes node1 and node2, from `start` to `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(Path(sys.executable).parent), SEARCHED])
        python_path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.env = {**environment(), "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "PYTHONPATH": python_path}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.hurried: dict[str, int] = {}

    def start(self) -> None:
        """Bring it up: within a second or two."""
        (self.folder / "state").mkdir()
        (self.folder / "key").touch(mode=0o600)
        (self.folder / "key").write_bytes(os.urandom(128))
        ports = [free_port() for _ in range(3)]
        config = CONFIG.format(host=socket.gethostname(), user=getpass.getuser(), folder=self.folder, ports=ports)
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text(GPUS)
        files = [f"--{name}={self.folder}/{file}" for name, file in (
            ("key-file", "key"), ("socket", "munge.socket"), ("pid-file", "munged.pid"), ("seed-file", "munge.seed"),
        )]  # fmt: skip
        self._daemon("munged", ["munged", "--foreground", "--force", *files])
        wait_for(lambda: (self.folder / "munge.socket").exists(), "munged's socket")
        self._daemon("slurmctld", ["slurmctld", "-D", "-c"])
        self.start_node("node1")
        self.start_node("node2")
        wait_for(lambda: self.call("sinfo", "-h", "-o", "%T %D", check=False) == "idle 2", "two idle nodes")

    def start_node(self, node: str) -> None:
        """Start a node; its processes end with it."""
        namespaces = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"] if NAMESPACES else []
        self._daemon(node, [*namespaces, "slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """What a power cut does to a node: everything on it is gone, and nobody is told."""
        self.daemons[node].kill()
        self.daemons.pop(node).wait()

    def _daemon(self, name: str, command: Sequence[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(command, env=self.env, stdout=out, stderr=out,
                                                  stdin=subprocess.DEVNULL, start_new_session=True,
                                                  preexec_fn=partial(die_with_parent, os.getpid()))  # fmt: skip

    def stop(self) -> None:
        """Cancel what runs, take it down, and leave no process."""
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            self.cancel_all()
        for name in reversed(self.daemons):
            for process in reversed(psutil.Process(self.daemons[name].pid).children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    process.terminate()
            self.daemons[name].terminate()
            try:
                self.daemons[name].wait(10)
            except subprocess.TimeoutExpired:
                self.daemons[name].kill()
                self.daemons[name].wait()

    def cancel_all(self) -> None:
        """Cancel what waits or runs, and wait until its last process is gone."""
        self.call("scancel", "--user", getpass.getuser(), check=False)
        wait_for(lambda: not self.call("squeue", "-h"), "an empty queue", 40)
        wait_for(lambda: not any("slurmstepd" in process.name() for process in self.processes()), "end of all steps")

    def processes(self) -> list[psutil.Process]:
        """What runs on the nodes, in jobs or for them; no zombies."""
        found = []
        for name, daemon in self.daemons.items():
            if name.startswith("node"):
                found += [child for child in psutil.Process(daemon.pid).children(recursive=True) if alive(child)]
        return found

    def call(
        self, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = True
    ) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(words, env={**self.env, **(env or {})}, cwd=cwd, capture_output=True, text=True,
                              timeout=60)  # fmt: skip
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """`sbatch WORDS` in `cwd`; the job's number."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, env=env)

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState, Restarts or ExitCode."""
        text = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in text.split()).get(name, "")

    def wait(self, job: str, timeout: float = 90) -> str:
        """The state in which a job ends; one that was requeued starts again soon."""

        def ended() -> bool:
            self.hurry(job)
            return self.field(job, "JobState") not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

        wait_for(ended, f"end of job {job}", timeout)
        return self.field(job, "JobState")

    def hurry(self, job: str) -> None:
        """Let a job that was requeued wait two seconds, not minutes: in the same second a node refuses it."""
        restarts = int(self.field(job, "Restarts") or 0)
        if restarts > self.hurried.get(job, 0) and self.field(job, "Reason") == "BeginTime":
            self.hurried[job] = restarts
            self.call("scontrol", "update", f"JobId={job}", "StartTime=now+2", check=False)


def set_up(project: Path) -> None:
    """What a person submits from: slurm/ and recipes/."""
    (project / "slurm").mkdir(parents=True)
    for file in (ROOT / "slurm").iterdir():
        (project / "slurm" / file.name).symlink_to(file)
    (project / "recipes").symlink_to(ROOT / "recipes")


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
    """Ask until it is true.

    Raises:
        AssertionError: not within `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"no {what} within {timeout} s"
        time.sleep(0.1)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster for the time of the block."""
    # a socket's path has 108 letters at most
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
