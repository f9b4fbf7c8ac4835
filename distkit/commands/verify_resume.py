"""`distkit verify-resume`: prove here that a recipe's run, killed and resumed, is the run never killed (C3)."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distkit.commands.parser import Parser, positive, split_flags
from distkit.commands.trial import Runs, compare_metrics, interruptible
from distkit.errors import ConfigError, TrainingError

#: One rank failed: how long the others may take to find out by themselves.
PATIENCE_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Trial(Runs):
    """What is compared.

    Args:
        num_steps: length of both runs, >= 3.
        kill_at: step after which every rank gets SIGKILL, in [2, num_steps): a step before it is saved.
    """

    num_steps: int
    kill_at: int

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def own_flags(self, saving: str) -> list[str]:
        """Flags of one run, whose kill is between two saves; `saving` in the background (`on`) or not (`off`)."""
        return [
            *("--num-steps", str(self.num_steps)),
            *("--report-every", str(max(1, self.num_steps // 8))),
            *("--checkpoint.save-every", str(max(1, self.kill_at * 2 // 3))),
            *("--checkpoint.keep-last", "None"),
            *("--checkpoint.async", saving),
        ]

    def survive(self, name: str) -> None:
        """A run, or its rest, that must end well.

        Raises:
            ConfigError: a rank refused its command line; with the end of its output.
            TrainingError: a rank failed; likewise.
        """
        ended = self.run(name, self.own_flags("on"), patience=PATIENCE_SECONDS)
        if any(ended.codes):
            raise self.failure(name, ended)


def verify_resume(trial: Trial) -> list[str]:
    """Run straight; run again with SIGKILL and resume; compare: lines that say what differs, [] if nothing does.

    Raises:
        TrainingError: a run failed by itself, the kill did not happen, or came before the first checkpoint.
    """
    # saving in the background must give the same; but a short run may be killed before such a save has ended
    trial.survive("straight")
    killed = trial.run("resumed", trial.own_flags("off"), f"step:*:{trial.kill_at}:kill", patience=PATIENCE_SECONDS)
    if -signal.SIGKILL not in killed.codes:
        raise TrainingError(f"no rank was killed at step {trial.kill_at}: exit codes {killed.codes}; is the run "
                            "shorter?")  # fmt: skip
    if not any((trial.folder / "resumed" / "checkpoints").glob("step-*")):
        raise TrainingError(f"nothing was saved before step {trial.kill_at}: there is nothing to resume from")
    trial.survive("resumed")
    straight, resumed = trial.folder / "straight", trial.folder / "resumed"
    return [*compare_metrics(straight, resumed), *compare_checkpoints(straight, resumed)]


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


def report(trial: Trial, keep: bool) -> str:
    """Do the trial and say how it went.

    Raises:
        ConfigError: the recipe refuses its command line (exit 2).
        TrainingError: the runs differ (exit 1), naming the first step and tensor.
    """
    started = time.perf_counter()
    try:
        with interruptible():
            lines = verify_resume(trial)
    except ConfigError:
        if not keep:
            shutil.rmtree(trial.folder, ignore_errors=True)
        raise
    except TrainingError as error:
        raise TrainingError(f"{error}\n  kept: {trial.folder}") from error
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
    keep = typed.folder is not None
    folder = typed.folder if keep else Path(tempfile.mkdtemp(prefix="distkit-verify-resume-"))
    try:
        trial = Trial(
            recipe=typed.recipe,
            flags=flags,
            nproc=typed.nproc,
            num_steps=typed.steps,
            kill_at=max(2, typed.steps * 2 // 3) if typed.kill_at is None else typed.kill_at,
            folder=folder,
        )
    except ConfigError:
        if not keep:
            folder.rmdir()
        raise
    return report(trial, keep)
