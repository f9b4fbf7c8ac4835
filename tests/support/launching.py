"""Real launchers as a user types them: `accelerate launch` and launch/local.sh, their ranks, and what they leave."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
from support.harness import LAUNCHER_VARIABLES, ROOT, Ended

LAUNCH = ROOT / "launch"
MARK = "DISTKIT_TEST_MARK"
#: A GPT that learns something in a second: two blocks of 32 channels.
TINY = [
    "--num-layers", "2", "--dim", "32", "--context-length", "32", "--global-batch-size", "4", "--eval-batch-size", "64",
    "--num-steps", "20", "--report-every", "10", "--timeout-seconds", "60", "--num-threads", "1",
]  # fmt: skip


def write_text(folder: Path) -> Path:
    """A text of a few thousand characters, with something to learn in it."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and again:\n" * 120)
    return text


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, its interpreter first in the path, without GPUs and without what an outer launcher said."""
    mine = {n: v for n, v in os.environ.items() if n not in LAUNCHER_VARIABLES and not n.startswith("ACCELERATE_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{mine.get('PATH', '')}"
    return {**mine, "PATH": path, "CUDA_VISIBLE_DEVICES": "", MARK: uuid.uuid4().hex, **(extra or {})}


@contextlib.contextmanager
def started(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], out: Path, *, own_group: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a command, with `OUT.out` and `OUT.err` as its streams; whatever is left of it is an error."""
    with open(out.with_suffix(".out"), "wb") as stdout, open(out.with_suffix(".err"), "wb") as stderr:
        process = subprocess.Popen(
            command, cwd=cwd, env=dict(env), stdout=stdout, stderr=stderr, start_new_session=own_group
        )
    try:
        yield process
    except BaseException:
        end(marked(env[MARK]))
        process.wait()
        raise
    process.wait(60)
    left = marked(env[MARK])
    deadline = time.monotonic() + 3
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [process for process in left if alive(process)]
    names = [" ".join(process.cmdline()) for process in left]
    end(left)
    assert not names, f"processes left behind: {names}"


def run(command: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float = 120) -> Ended:
    """A command to its end; its exit code and streams."""
    with started(command, cwd, env, cwd / "run") as process:
        process.wait(timeout)
    return ended(process, cwd / "run")


def ended(process: subprocess.Popen[bytes], out: Path) -> Ended:
    """How a process ended whose streams are in files."""
    streams = [out.with_suffix(suffix).read_text() for suffix in (".out", ".err")]
    return Ended(process.returncode, *streams)


def marked(mark: str) -> list[psutil.Process]:
    """Every process of this machine that has inherited `mark`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and alive(process):
                found.append(process)
    return found


def alive(process: psutil.Process) -> bool:
    """Whether it runs and is no zombie."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def end(processes: Sequence[psutil.Process]) -> None:
    """Kill them."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
