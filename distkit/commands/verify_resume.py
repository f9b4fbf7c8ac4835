"""`distkit verify-resume`: prove here that a recipe's run, killed and resumed, is the run never killed (C3)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distkit.commands.parser import Parser, positive, split_flags
from distkit.errors import ConfigError, TrainingError
from distkit.runtime.local_ranks import free_port, rank_environment

#: Fields of an event that tell time, and so differ between any two runs.
TIMED = frozenset({"samples_per_second", "data_wait_seconds", "seconds", "mfu"})
POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is compared.

    Args:
        recipe: the recipe's file.
        flags: more flags for it; they win over those of the trial.
        nproc: ranks on this machine, >= 1.
        num_steps: length of both runs, >= 3.
        kill_at: step after which every rank gets SIGKILL, in [2, num_steps): a step before it is saved.
        folder: where both runs are written; must not hold any.
    """

    recipe: Path
    flags: Sequence[str]
    nproc: int
    num_steps: int
    kill_at: int
    folder: Path

    def __post_init__(self) -> None:
        if not self.recipe.is_file():
            raise ConfigError(f"there is no recipe {self.recipe}", expected="a Python file",
                              fix="distkit verify-resume recipes/cifar10.py")  # fmt: skip
        if self.nproc < 1:
            raise ConfigError("--nproc is the number of ranks", expected="1 or more", got=self.nproc, fix="--nproc 2")
        if self.num_steps < 3:
            raise ConfigError("--steps is the length of both runs", expected="3 or more: one is saved, one killed",
                              got=self.num_steps, fix="--steps 40")  # fmt: skip
        if not 2 <= self.kill_at < self.num_steps:
            raise ConfigError(
                "--kill-at is a step between the first and the last",
                expected=f"2 to {self.num_steps - 1}",
                got=self.kill_at,
                fix=f"--kill-at {max(2, self.num_steps // 2)}",
            )
        for name in ("straight", "resumed"):
            if (self.folder / name).exists():
                raise ConfigError(f"{self.folder / name} exists", expected="a new directory",
                                  fix=f"--folder {self.folder}-2")  # fmt: skip

    def save_every(self) -> int:
        """Steps between saves, so that the kill is between two."""
        return max(1, self.kill_at * 2 // 3)

    def argv(self, name: str, saving: str) -> list[str]:
        """The command line of one run; `saving` in the background (`on`) or synchronously (`off`)."""
        every = str(self.save_every())
        mine = [
            *("--num-steps", str(self.num_steps)),
            *("--report-every", str(max(1, self.num_steps // 8))),
            *("--checkpoint.save-every", every),
            *("--checkpoint.keep-last", "None"),
            *("--checkpoint.async", saving),
        ]
        return [sys.executable, str(self.recipe), *mine, *self.flags, "--run-dir", str(self.folder / name)]


def verify_resume(trial: Trial) -> list[str]:
    """Run straight; run again with SIGKILL and resume; compare: lines that say what differs, [] if nothing does.

    Raises:
        TrainingError: a run failed by itself, the kill did not happen, or came before the first checkpoint.
    """
    # saving in the background must give the same; but a short run may be killed before such a save has ended
    run_ranks(trial, "straight", {}, saving="on")
    codes = run_ranks(trial, "resumed", {"DISTKIT_FAULT": f"step:*:{trial.kill_at}:kill"}, survives=False)
    if not any(code == -9 for code in codes):
        raise TrainingError(f"no rank was killed at step {trial.kill_at}: exit codes {codes}; is the run shorter?")
    if not any((trial.folder / "resumed" / "checkpoints").glob("step-*")):
        raise TrainingError(f"nothing was saved before step {trial.kill_at}: there is nothing to resume from")
    run_ranks(trial, "resumed", {}, saving="on")
    straight, resumed = trial.folder / "straight", trial.folder / "resumed"
    return [*compare_metrics(straight, resumed), *compare_checkpoints(straight, resumed)]


def run_ranks(
    trial: Trial, name: str, env: Mapping[str, str], *, survives: bool = True, saving: str = "off"
) -> list[int]:
    """Start the ranks of one run and wait for them; their exit codes. No process is left, whatever happens.

    Raises:
        ConfigError: a rank refused its command line; with the end of its output.
        TrainingError: a rank failed, though it should have survived; likewise.
    """
    processes: list[subprocess.Popen[bytes]] = []
    trial.folder.mkdir(parents=True, exist_ok=True)
    logs = [trial.folder / f"{name}-rank{rank}.log" for rank in range(trial.nproc)]
    port = free_port()
    try:
        for rank, log in enumerate(logs):
            with open(log, "ab") as file:
                settings = {**os.environ, **rank_environment(rank, trial.nproc, port), **env}
                processes.append(subprocess.Popen(trial.argv(name, saving), env=settings, stdout=file, stderr=file))
        while any(process.poll() is None for process in processes):
            if any(process.poll() not in (None, 0) for process in processes):
                wait_a_little(processes)
                break
            time.sleep(POLL_SECONDS)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    failed = next((rank for rank, code in enumerate(codes) if code != 0), None)
    if survives and failed is not None:
        lines = logs[failed].read_text(errors="replace").splitlines()[-6:]
        kind = ConfigError if codes[failed] == ConfigError.exit_code else TrainingError
        raise kind("\n".join([f"rank {failed} of the {name} run ended with {codes[failed]}:", *lines]))
    return codes


def wait_a_little(processes: Sequence[subprocess.Popen[bytes]], seconds: float = 20.0) -> None:
    """One rank failed: the others find out by themselves, or are killed after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)


def compare_metrics(straight: Path, resumed: Path) -> list[str]:
    """The first train or eval line that differs, times aside."""
    first, second = list(metric_lines(straight)), list(metric_lines(resumed))
    for one, other in zip(first, second, strict=False):
        if one != other:
            names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
            shown = ", ".join(f"{name} {one.get(name)!r} and {other.get(name)!r}" for name in names[:3])
            return [f"step {one['step']}: the first metric line that differs ({one['event']}): {shown}"]
    if len(first) != len(second):
        return [f"{len(first)} metric lines in the uninterrupted run, {len(second)} in the resumed one"]
    return []


def metric_lines(run_dir: Path) -> Iterator[dict[str, object]]:
    """Train and eval events without what tells time."""
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        event = json.loads(text)
        if event["event"] in ("train", "eval"):
            yield {name: value for name, value in event.items() if name not in TIMED}


def compare_checkpoints(straight: Path, resumed: Path) -> list[str]:
    """The first step at which both runs saved and the state differs, with its first tensors and values."""
    from distkit.checkpoint.format import step_name
    from distkit.checkpoint.retention import list_checkpoints
    from distkit.commands.tools.diff import diff

    folders = straight / "checkpoints", resumed / "checkpoints"
    steps = [list_checkpoints(folder) for folder in folders]
    if not steps[0] or steps[0] != steps[1]:
        return [f"checkpoints of steps {steps[0]} in the uninterrupted run, {steps[1]} in the resumed one"]
    for step in steps[0]:
        found = diff(folders[0] / step_name(step), folders[1] / step_name(step), limit=5)
        if not found.equal:
            return [f"step {step}: the first checkpoint that differs", *found.tensors, *found.values]
    return []


def interrupt(_number: int, _frame: object) -> None:
    """SIGTERM ends the ranks as Ctrl-C does: through the blocks that wait for them."""
    raise KeyboardInterrupt


def report(trial: Trial, keep: bool) -> str:
    """Do the trial and say how it went.

    Raises:
        ConfigError: the recipe refuses its command line (exit 2).
        TrainingError: the runs differ (exit 1), naming the first step and tensor.
    """
    started = time.perf_counter()
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        lines = verify_resume(trial)
    except ConfigError:
        if not keep:
            shutil.rmtree(trial.folder, ignore_errors=True)
        raise
    except TrainingError as error:
        raise TrainingError(f"{error}\n  kept: {trial.folder}") from error
    finally:
        signal.signal(signal.SIGTERM, before)
    if lines:
        raise TrainingError(
            "\n  ".join(["the resumed run differs from the uninterrupted one", *lines, f"kept: {trial.folder}"])
        )
    if not keep:
        shutil.rmtree(trial.folder)
    return (
        f"{trial.recipe}: killed at step {trial.kill_at} of {trial.num_steps} on {trial.nproc} "
        f"{'rank' if trial.nproc == 1 else 'ranks'} and resumed: weights, optimizer, generators and metrics match "
        f"the uninterrupted run, bit for bit ({time.perf_counter() - started:.0f} s)"
    )


def command(args: Sequence[str]) -> str:
    """Do the trial; its text, or a TrainingError (exit 1) that names the first step and tensor that differ."""
    own_args, flags = split_flags(args)
    parser = Parser(
        "distkit verify-resume",
        description="Run RECIPE straight, then again with SIGKILL to every rank and a resume, and compare weights, "
        "optimizer, random generators and metric lines. Exit codes: 0 bitwise equal, 1 not, 2 wrong arguments.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="its file; flags for it come last, after --")
    parser.add_argument("--nproc", type=positive, default=1, metavar="N", help="ranks on this machine (1)")
    parser.add_argument("--steps", type=positive, default=40, metavar="N", help="length of both runs (40)")
    parser.add_argument("--kill-at", type=positive, metavar="N", help="the step of the kill (two thirds of the run)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep both runs there (a temporary folder)")
    typed = parser.parse_args(own_args)
    trial = Trial(
        recipe=typed.recipe,
        flags=flags,
        nproc=typed.nproc,
        num_steps=typed.steps,
        kill_at=max(2, typed.steps * 2 // 3) if typed.kill_at is None else typed.kill_at,
        folder=Path(tempfile.gettempdir()) / f"distkit-verify-resume-{os.getpid()}"
        if typed.folder is None
        else typed.folder,
    )
    return report(trial, keep=typed.folder is not None)
