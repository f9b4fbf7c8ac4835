"""Real ranks and real command lines, started from a process that has torch imported already.

A fork server imports torch and distkit once (seconds); every rank is then a fork of it (milliseconds). Nothing else is
shared: each rank has its own process, environment, gloo groups and exit code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pickle
import runpy
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from distkit.data import sources
from distkit.runtime.local_ranks import rank_environment

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "cifar10.py"
SHARED_DATA = ROOT.parent / "shared" / "data"

_context = multiprocessing.get_context("forkserver")
# Installed modules only: the server knows no path of ours. It must start no thread.
_context.set_forkserver_preload(
    [
        "accelerate",
        "torch._dynamo",
        "torch.distributed.distributed_c10d",
        "torch.nn.parallel",
        "distkit.assemble",
        "distkit.debug",
        "distkit.engine.fit",
        "distkit.models",
        "distkit.entry",
    ]
)
sys.path.insert(0, str(Path(__file__).parents[1]))

#: Where this process looks for ports: below those that Linux gives to outgoing connections (32768 and up), and apart
#: from the ports of other pytest workers.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ports = itertools.cycle(range(12_000 + 1_000 * (_WORKER % 16), 13_000 + 1_000 * (_WORKER % 16)))
#: Images of the synthetic train and test split in `run_recipe_cli`; a user's 2,000 take seconds to evaluate.
SMALL_SYNTHETIC = {"num_train": 400, "num_test": 40}

#: What a launcher of an outer process would say; ranks must not inherit it.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    """A TCP port that nobody listens on, and that no other pytest worker will choose."""
    for port in _ports:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: the ports go round")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one command line ended."""

    returncode: int
    stdout: str
    stderr: str


def run_ranks(
    function: Callable[..., object],
    world_size: int,
    *args: object,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> list:  # type: ignore[type-arg]  # whatever `function` returns
    """Call `function(*args)` in `world_size` processes with torchrun's environment; their results in rank order.

    Raises:
        AssertionError: a rank raised (with its traceback), or did not end within `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{rank}.pickle" for rank in range(world_size)]
        _start_and_wait([(_call, (function, args, str(path))) for path in results], world_size, env or {}, timeout)
        loaded = [pickle.loads(path.read_bytes()) if path.exists() else ("no result", None) for path in results]
    failures = [f"rank {rank}:\n{error}" for rank, (error, _) in enumerate(loaded) if error]
    assert not failures, "\n".join(failures)
    return [value for _, value in loaded]


def run_recipe_cli(
    argv: Sequence[str],
    cwd: Path,
    *,
    recipe: Path = RECIPE,
    world_size: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float = 180,
    stdin: str = "",
) -> list[Ended]:
    """Run `python RECIPE *argv` on `world_size` ranks in `cwd` with `SMALL_SYNTHETIC` data; how each ended."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(world_size)]
        calls = [(_main, (str(recipe), list(argv), str(cwd), str(out), str(err), stdin)) for out, err in outs]
        codes = _start_and_wait(calls, world_size, env or {}, timeout)
        return [Ended(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, outs, strict=True)]


def _start_and_wait(
    calls: Sequence[tuple[Callable[..., None], tuple[object, ...]]],
    world_size: int,
    env: Mapping[str, str],
    timeout: float,
) -> list[int]:
    """Start one process a call, wait for all, leave none behind; their exit codes."""
    port = free_port()
    processes: list[BaseProcess] = []
    try:
        for rank, (target, args) in enumerate(calls):
            settings = {**rank_environment(rank, world_size, port), **env}
            process = _context.Process(target=_enter, args=(settings, target, args))
            process.start()
            processes.append(process)
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        assert not late, f"ranks {late} did not end within {timeout} s"
        return [process.exitcode or 0 for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _enter(env: Mapping[str, str], target: Callable[..., None], args: tuple[object, ...]) -> None:
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(env)
    target(*args)


def _call(function: Callable[..., object], args: tuple[object, ...], result: str) -> None:
    try:
        answer = ("", function(*args))
    except BaseException:
        answer = (traceback.format_exc(), None)
    Path(result).write_bytes(pickle.dumps(answer))


def _main(recipe: str, argv: list[str], cwd: str, out: str, err: str, stdin: str) -> None:
    """Become `python RECIPE *argv`, with the streams in files."""
    os.chdir(cwd)
    for path, stream in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    read, write = os.pipe()
    os.write(write, stdin.encode())
    os.close(write)
    os.dup2(read, 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # lives as long as the process
    sources.synthetic.__kwdefaults__.update(SMALL_SYNTHETIC)
    sys.argv = [recipe, *argv]
    sys.path.insert(0, str(Path(recipe).resolve().parent))  # as `python FILE` does
    try:
        with contextlib.suppress(KeyboardInterrupt):
            runpy.run_path(recipe, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
