"""A scheduler for one machine: it starts a recipe's run, does to it what clusters do, and starts it again until it is
done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distkit.checkpoint.retention import list_checkpoints
from distkit.commands.drill.cases import Case, Landmarks
from distkit.commands.show import read_json
from distkit.commands.trial import Ended, Runs, compare_metrics, events, nothing
from distkit.errors import ConfigError, Stopped, TrainingError, say

UNDISTURBED, AGAIN = "undisturbed", "undisturbed-again"
#: A run that is still not done after so many starts does not get anywhere.
MAX_STARTS = 4
NO_TEST_SET = "--eval-every is set, but the recipe has no test set"
NO_DEVICE = "CUDA devices, and"


@dataclass(frozen=True, kw_only=True)
class Drill(Runs):
    """How the runs of a drill are started.

    Args:
        num_steps: length of each, >= 6.
        timeout_seconds: for each start.
        evaluates: the recipe has a test set.
        on_cpu: the machine has fewer GPUs than ranks.
    """

    num_steps: int
    timeout_seconds: float
    evaluates: bool = True
    on_cpu: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 6:
            raise ConfigError("--steps is the length of a run", expected="6 or more: saves, and steps between them",
                              got=self.num_steps, fix="--steps 12")  # fmt: skip

    def own_flags(self, saving: Sequence[str] = ()) -> list[str]:
        """Every step is reported; saves at a third and two thirds, an evaluation in the middle; nobody else is told."""
        return [
            *("--num-steps", str(self.num_steps), "--report-every", "1"),
            *(("--eval-every", str(self.num_steps // 2)) if self.evaluates else ()),
            *("--checkpoint.enabled", "--checkpoint.save-every", str(self.num_steps // 3), *saving),
            *("--observe.no-wandb", "--observe.no-tensorboard", "--observe.also", "None"),
            *(("--device", "cpu") if self.on_cpu else ()),
        ]

    def start(self, name: str) -> Ended:
        """Run `name` to its end, or from where it stopped."""
        return self.run(name, self.own_flags(), timeout=self.timeout_seconds)

    def without_what_is_refused(self, name: str, ended: Ended) -> Drill | None:
        """The same without a test set, or on the CPU, where run `name` was refused for that; else None."""
        if ConfigError.exit_code not in ended.codes:
            return None
        words = "\n".join(self.last_words(name, 0))
        if self.evaluates and NO_TEST_SET in words:
            return replace(self, evaluates=False)
        if not self.on_cpu and NO_DEVICE in words and "--device" not in self.flags:
            return replace(self, on_cpu=True)
        return None


def run_undisturbed(drill: Drill) -> tuple[Drill, Ended]:
    """The run that all others are compared with, and the drill as this recipe and machine allow it.

    Raises:
        ConfigError: the recipe refuses its command line.
        TrainingError: it failed, or took too long.
    """
    ended = drill.start(UNDISTURBED)
    other = drill.without_what_is_refused(UNDISTURBED, ended)
    if other is not None:
        return run_undisturbed(other)
    if ended.hung:
        raise TrainingError(f"the undisturbed run did not end within {drill.timeout_seconds:g} s: fewer --steps, or a "
                            "longer --timeout-seconds")  # fmt: skip
    if any(ended.codes):
        raise drill.failure(UNDISTURBED, ended)
    return drill, ended


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a case.

    Attributes:
        step: at which it happened.
        codes, state: how the disturbed attempt ended: its ranks' exit codes, and the state in status.json.
        starts: of the run, until it was done.
        steps_lost: done again.
        seconds_lost: that the run took longer than the undisturbed one, all its starts together.
        failure: what did not hold, in a line; empty where the run ended as the undisturbed one did.
        differs: it ended with other bits or other metrics.
    """

    case: Case
    step: int
    codes: Sequence[int] = ()
    state: str = ""
    starts: int = 0
    steps_lost: int = 0
    seconds_lost: float = 0.0
    failure: str = ""
    differs: bool = False


def do(drill: Drill, case: Case, step: int, undisturbed: Ended) -> Outcome:
    """Let `case` happen at `step` of a new run, start it again until it is done, and compare."""
    name = case.folder
    run_dir = drill.folder / name
    # in a short run a save behind the steps may not have ended when they have
    flags = drill.own_flags(("--checkpoint.async", "off"))
    look = nothing if case.phase else stop_when_saved(run_dir)
    first = drill.run(name, flags, case.fault(step), timeout=drill.timeout_seconds, look=look)
    status, done, kept = read_json(run_dir / "status.json") or {}, steps_done(run_dir), newest(run_dir)
    outcome = Outcome(case=case, step=step, codes=first.codes, state=str(status.get("state", "")), starts=1,
                      steps_lost=max(0, done - kept), seconds_lost=first.seconds)  # fmt: skip
    failure = wrong_end(drill, outcome, first)
    if first.hung or not any(first.codes):
        return replace(outcome, failure=failure)
    last = first
    while any(last.codes) and not last.hung and outcome.starts < MAX_STARTS:
        last = drill.start(name)
        outcome = replace(outcome, starts=outcome.starts + 1, seconds_lost=outcome.seconds_lost + last.seconds)
    outcome = replace(outcome, seconds_lost=outcome.seconds_lost - undisturbed.seconds)
    if last.hung:
        return replace(outcome, failure=f"hung after the resume: ranks {last.hung} ran for {last.seconds:.0f} s")
    if any(last.codes):
        words = str(drill.failure(name, last)).splitlines()[-1]
        return replace(outcome, failure=f"not done after {outcome.starts} starts: {words}")
    lines = compare(drill.folder / UNDISTURBED, run_dir)
    return replace(outcome, failure=lines[0] if lines else failure, differs=bool(lines))


def wrong_end(drill: Drill, outcome: Outcome, ended: Ended) -> str:
    """What is wrong with how the disturbed attempt ended; empty where nothing is.

    A stop ends all ranks with 75 and "preempted". After a kill the others say "failed"; one rank alone says nothing.
    """
    if ended.hung:
        return f"hung: ranks {ended.hung} still ran after {drill.timeout_seconds:g} s"
    if not any(ended.codes):
        return f"went on to the end, as if nothing had happened in step {outcome.step}"
    code = Stopped.exit_code
    if not outcome.case.is_kill and any(one != code for one in ended.codes):
        return f"ended with exit codes {', '.join(map(str, ended.codes))}, and not with {code}"
    state = "preempted" if not outcome.case.is_kill else "failed" if drill.nproc > 1 else "running"
    if outcome.case.phase == "start-up" and outcome.case.is_kill and drill.nproc == 1:
        state = ""  # nothing was written yet
    return "" if outcome.state == state else f'status.json says "{outcome.state}", and not "{state}"'


def compare(undisturbed: Path, resumed: Path) -> list[str]:
    """The first metric line that differs; else whether the weights and the optimizer's state do."""
    lines = compare_metrics(undisturbed, resumed)
    digests = [json.loads((run / "summary.json").read_text())["state_digest"] for run in (undisturbed, resumed)]
    if not lines and digests[0] != digests[1]:
        lines = [f"the same metric lines, and another state_digest: {digests[0][:12]} and {digests[1][:12]}"]
    return lines


def steps_done(run_dir: Path) -> int:
    """The last step that a run is known to have done."""
    step = (read_json(run_dir / "status.json") or {}).get("step")
    reported = [event["step"] for event in events(run_dir) if isinstance(event["step"], int)]
    return max([*reported, step if isinstance(step, int) else 0], default=0)


def newest(run_dir: Path) -> int:
    """The step from which a run will go on; 0 where it begins again."""
    return max(list_checkpoints(run_dir / "checkpoints"), default=0)


def stop_when_saved(run_dir: Path) -> Callable[[], None]:
    """What writes the file STOP, once, when there is a checkpoint."""
    asked = False

    def look() -> None:
        nonlocal asked
        if not asked and list_checkpoints(run_dir / "checkpoints"):
            (run_dir / "STOP").touch()
            asked = True

    return look


def outcomes(drill: Drill, cases: Sequence[Case], undisturbed: Ended, *, keep: bool) -> Iterator[Outcome]:
    """One case after the other; the files of those that hold are removed, unless `keep`."""
    landmarks = Landmarks.of(drill.folder / UNDISTURBED)
    for number, case in enumerate(cases, 1):
        say(f"distkit drill: {case.name} ({number} of {len(cases)})")
        step = landmarks.step_of(case)
        if step is None:
            continue
        outcome = do(drill, case, step, undisturbed)
        if not outcome.failure and not keep:
            shutil.rmtree(drill.folder / case.folder, ignore_errors=True)
        yield outcome
