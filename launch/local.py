"""What launch/local.sh runs: starts the ranks, hands signals on, waits, and ends with the first failure's code.

With --max-restarts it starts them again after a failure that the run's directory calls retryable.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

try:
    from distkit.commands.parser import run_dir_of
    from distkit.commands.slurm.outcome import GO_ON, decide, read_before
    from distkit.errors import ConfigError, Stopped
    from distkit.runtime.local_ranks import free_port, rank_environment, without_launcher
except ModuleNotFoundError as error:
    message = f"{sys.executable} has no {error.name}\n  type:     PYTHON=.venv/bin/python launch/local.sh -n 2 RECIPE"
    print(f"launch/local.sh: {message}", file=sys.stderr)
    sys.exit(2)

USAGE = "launch/local.sh -n 2 recipes/gpt.py --preset tiny --text FILE"
RESTARTING = "launch/local.sh -n 2 --max-restarts 3 recipes/gpt.py --preset tiny --text FILE --run-dir runs/NAME"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
ORPHANS_SECONDS = 2.0
#: A shell's exit code for a process that was ended by a signal is above it.
KILLED = 128


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run `-n N [--max-restarts N] RECIPE [FLAG…]` or `-n N -m MODULE [ARGUMENT…]`; the exit code."""
    if argv and argv[0] in ("-h", "--help"):
        lines = Path(__file__).with_suffix(".sh").read_text().splitlines()
        print("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[1:] if line.startswith("#")))
        return 0
    try:
        num_ranks, max_restarts, recipe = parse(argv)
        run_dir = restarted_run(max_restarts, recipe)
        grace = number(env, "GRACE_SECONDS", "30", least=0, most=86_400)
        port = number(env, "MASTER_PORT", "29500", least=1, most=65_535) if "MASTER_PORT" in env else None
        signals = Signals()

        def attempt() -> int:
            meeting, outer = port or free_port(), without_launcher(env)
            environments = [outer | rank_environment(rank, num_ranks, meeting) for rank in range(num_ranks)]
            return Ranks(grace, signals).run([sys.executable, *recipe], environments)

        if run_dir is None:
            return attempt()
        return restart(attempt, signals, run_dir, max_restarts, env.get("SLURM_JOB_ID"))
    except ConfigError as error:
        print(f"launch/local.sh: {error}", file=sys.stderr)
        return error.exit_code


def restart(attempt: Callable[[], int], signals: Signals, run_dir: Path, max_restarts: int, job: str | None) -> int:
    """Make attempts until one ends well, or another one would not help; the exit code of the last.

    A run that was told to stop stays stopped: who told it decides what comes next.

    Raises:
        ConfigError: the run's files cannot be read.
    """
    for number in itertools.count(1):
        before = read_before(run_dir)
        code = attempt()
        signals.wait(0)
        if code in (0, ConfigError.exit_code, Stopped.exit_code) or signals.told:
            return code
        decision = decide(run_dir, before, job=job or None, num_requeues=number - 1, max_requeues=max_restarts,
                          killed=code > KILLED)  # fmt: skip
        say(f"attempt {number} of {max_restarts + 1}: {decision.why}")
        if decision.exit_code != GO_ON:
            return code
    raise AssertionError("unreachable: the numbers do not end")


def restarted_run(max_restarts: int, recipe: Sequence[str]) -> Path | None:
    """The directory of a run that is started again; None where none is.

    Raises:
        ConfigError: the run's flags do not name it.
    """
    run_dir = run_dir_of(recipe)
    if not max_restarts:
        return None
    if run_dir is None:
        raise ConfigError("--max-restarts needs --run-dir", expected="a directory in which an attempt finds the run",
                          got=" ".join(recipe), fix=RESTARTING)  # fmt: skip
    return Path(run_dir)


def parse(argv: Sequence[str]) -> tuple[int, int, list[str]]:
    """The number of ranks; how often they may be started again; the recipe, or -m and a module, and what follows.

    Raises:
        ConfigError: with what to type.
    """
    option, count, *recipe = [*argv[:2], "", ""][:2] + list(argv[2:])
    if option != "-n" or not count.isdecimal() or not 1 <= int(count) <= 4096:
        raise ConfigError("how many ranks?", expected="-n N first, N at least 1", got=" ".join(argv[:2]) or "nothing",
                          fix=USAGE)  # fmt: skip
    max_restarts = 0
    if recipe[:1] == ["--max-restarts"]:
        text, recipe = [*recipe[1:2], ""][0], recipe[2:]
        if not text.isdecimal():
            raise ConfigError("how many restarts?", expected="a whole number, 0 or more, after --max-restarts",
                              got=text or "nothing", fix=RESTARTING)  # fmt: skip
        max_restarts = int(text)
    module = recipe[:1] == ["-m"] and len(recipe) > 1
    if not module and (not recipe or not Path(recipe[0]).is_file()):
        raise ConfigError("which recipe?", expected="a Python file, or -m MODULE, after -n N",
                          got=recipe[0] if recipe else "nothing", fix=USAGE)  # fmt: skip
    return int(count), max_restarts, recipe


def number(env: Mapping[str, str], name: str, example: str, *, least: int, most: int) -> int:
    """A whole number, `least` to `most`, from the environment.

    Raises:
        ConfigError: it is none.
    """
    text = env.get(name, example)
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ConfigError(f"{name}={text}", expected=f"a whole number from {least} to {most}", got=text,
                          fix=f"{name}={example}")  # fmt: skip
    return int(text)


class Signals:
    """The signals of this process as bytes, so that none is missed between a look at the ranks and the next wait.

    Attributes:
        told: one has come that is handed on to the ranks.
    """

    def __init__(self) -> None:
        self.told = False
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for name in (*FORWARDED, signal.SIGCHLD):
            # nohup's wish holds
            if name != signal.SIGHUP or signal.getsignal(name) != signal.SIG_IGN:
                signal.signal(name, lambda *_: None)

    def wait(self, seconds: float | None) -> bytes:
        """Those that have come, for at most so long; None: for ever."""
        ready, _, _ = select.select([self._receiver], [], [], seconds)
        received = self._receiver.recv(4096) if ready else b""
        self.told = self.told or any(number in FORWARDED for number in received)
        return received


class Ranks:
    """Processes that end together.

    Args:
        grace: seconds that they may take after a SIGTERM, or after one of them has failed.
        signals: of this process.
    """

    def __init__(self, grace: float, signals: Signals) -> None:
        self.grace = grace
        self.signals = signals
        self.deadline: float | None = None
        self.processes: list[subprocess.Popen[bytes]] = []
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.exit_code = 0
        self.killed = False
        self.first = ""
        self.error_files: list[Path] = []

    def run(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
        """Start one process an environment and wait for all; 0, or the code of the first that failed."""
        with tempfile.TemporaryDirectory(prefix="distkit-") as folder:
            self.error_files = [Path(folder) / f"{rank}.json" for rank in range(len(environments))]
            return self._run(command, environments)

    def _run(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
        guardian = Guardian(self.grace)
        try:
            for rank, environment in enumerate(environments):
                environment = {**environment, "TORCHELASTIC_ERROR_FILE": str(self.error_files[rank])}
                # a session of its own: it can be ended with all that it started, and a terminal's Ctrl-C comes once
                process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
                guardian.watch(process.pid)
                self.processes.append(process)
                self.running[rank] = process
            while self.running:
                endless = self.deadline is None or self.killed
                rest = None if endless else max(0.0, (self.deadline or 0.0) - time.monotonic())
                self.forward(self.signals.wait(rest))
                self.reap()
                if rest == 0.0 and self.running:
                    ranks = ", ".join(str(rank) for rank in self.running)
                    say(f"still running after {self.grace} s, so killed: rank {ranks}")
                    self.kill()
        finally:
            if not self.running:
                self.wait_for_orphans()
            self.kill()
            for process in self.processes:
                process.wait()
            guardian.dismiss()
            self.say_cause()
        return self.exit_code

    def say_cause(self) -> None:
        """Why the run failed: what the ranks found, which may be another one than the first to end; last on stderr."""
        for path in self.error_files if self.first else ():
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                self.first = json.loads(path.read_text())["message"]["message"]
                break
        if self.first:
            say(self.first)

    def forward(self, received: bytes) -> None:
        """Send each signal to every rank."""
        for name in received:
            if name in FORWARDED:
                for process in self.running.values():
                    os.kill(process.pid, name)  # Popen's own would reap a rank that has just ended
            if name == signal.SIGTERM:
                self.hurry()

    def reap(self) -> None:
        """Note the ranks that have ended."""
        for rank, process in list(self.running.items()):
            # not reaped yet: the other ranks read in /proc how it ended
            end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is None:
                continue
            del self.running[rank]
            if end.si_status and not self.exit_code:
                exited = end.si_code == os.CLD_EXITED
                # as a shell would say it
                self.exit_code = end.si_status if exited else 128 + end.si_status
                if self.exit_code != 75:
                    how = f"exit code {end.si_status}" if exited else signal.strsignal(end.si_status)
                    self.first = f"rank {rank} failed first: {how}"
                # the others notice by themselves, and say what happened
                self.hurry()

    def hurry(self) -> None:
        """From now on the ranks have `grace` seconds."""
        if self.deadline is None:
            self.deadline = time.monotonic() + self.grace

    def wait_for_orphans(self) -> None:
        """What ended ranks have started (workers, say) gets a moment to notice it, and to clean up."""
        for process in self.processes:
            process.wait()
        deadline = time.monotonic() + ORPHANS_SECONDS
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                while time.monotonic() < deadline:
                    os.killpg(process.pid, 0)
                    time.sleep(0.01)

    def kill(self) -> None:
        """End every rank with all that it has started."""
        self.killed = True
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


class Guardian:
    """A process that ends the ranks if this one is killed: with a SIGTERM, so that a run is saved, and after `grace`
    seconds with SIGKILL.
    """

    def __init__(self, grace: float) -> None:
        receiver, self._sender = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(receiver)
            return
        os.close(self._sender)
        signal.set_wakeup_fd(-1)
        os.setsid()  # what ends the launcher must not end it
        for name in FORWARDED:
            signal.signal(name, signal.SIG_IGN)
        text = b""
        while chunk := os.read(receiver, 4096):
            text += chunk
        if not text.endswith(b"dismissed"):
            end_groups([int(word) for word in text.split()], grace)
        os._exit(0)

    def watch(self, pid: int) -> None:
        """Watch over one more rank, which leads a process group."""
        os.write(self._sender, f"{pid} ".encode())

    def dismiss(self) -> None:
        """All ranks have ended."""
        os.write(self._sender, b"dismissed")
        os.close(self._sender)
        os.waitpid(self._pid, 0)


def end_groups(groups: Sequence[int], grace: float) -> None:
    """End process groups: SIGTERM, at most `grace` seconds, SIGKILL."""
    left = send(signal.SIGTERM, groups)
    deadline = time.monotonic() + grace
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = send(0, left)
    send(signal.SIGKILL, left)


def send(number: int, groups: Sequence[int]) -> list[int]:
    """Send a signal (0: none) to process groups; those that exist."""
    there = []
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
            there.append(group)
    return there


def say(message: str) -> None:
    """One line on stderr."""
    print(f"launch/local.sh: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
