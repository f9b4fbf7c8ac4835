"""What can happen to a run: a signal or SIGKILL to a rank in a phase, or a file STOP; and the step at which it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distkit.commands.trial import events
from distkit.errors import ConfigError, nearest

#: Signals that ask for a stop, and the one that cannot be heard; as DISTKIT_FAULT names them.
ACTIONS = ("term", "usr1", "int", "hup", "kill")
PHASES = ("start-up", "data", "step", "evaluation", "save")
STOP_FILE = "stop-file"
#: Each signal and each phase once.
DEFAULT = ("usr1:start-up", "term:data", "hup:step", "int:evaluation", "term:save", "kill:step", "kill:save", STOP_FILE)
ALL = (*(f"{action}:{phase}" for action in ACTIONS for phase in PHASES), STOP_FILE)


@dataclass(frozen=True)
class Case:
    """What happens to which rank; `phase` is empty for a file STOP, which is for all ranks."""

    action: str
    phase: str
    rank: int

    @property
    def name(self) -> str:
        """As `--cases` takes it."""
        return f"{self.action}:{self.phase}" if self.phase else self.action

    @property
    def folder(self) -> str:
        """Where its run is."""
        return f"{self.action}-{self.phase}-rank{self.rank}" if self.phase else self.action

    @property
    def is_kill(self) -> bool:
        """The rank cannot save; the run fails, and may be continued."""
        return self.action == "kill"

    def fault(self, step: int) -> str:
        """DISTKIT_FAULT for it. A kill in a save comes when this rank's files are written and nothing is committed.

        For a file STOP it only slows the steps down: the file is looked for once a second.
        """
        if not self.phase:
            return ",".join(f"step:{self.rank}:{slow}:slow" for slow in range(step, step + 4))
        point = "before_vote" if self.is_kill and self.phase == "save" else self.phase
        return f"{point}:{self.rank}:{step}:{self.action}"


def parse_cases(names: Sequence[str], nproc: int) -> list[Case]:
    """`term:step`, `kill:save:0` or `stop-file` -> cases, each once; without a rank, ranks 0, 1, … take turns.

    Raises:
        ConfigError: no such case or rank.
    """
    return list(dict.fromkeys(_parse(name, index % nproc, nproc) for index, name in enumerate(names)))


def _parse(text: str, rank: int, nproc: int) -> Case:
    if text == STOP_FILE:
        return Case(STOP_FILE, "", 0)
    action, phase, number = [*text.split(":", 2), "", ""][:3]
    if f"{action}:{phase}" not in ALL:
        raise ConfigError(f"--cases has no case {text!r}", got=text, fix=f"--cases {nearest(text, ALL) or DEFAULT[1]}",
                          expected=f"SIGNAL:PHASE or SIGNAL:PHASE:RANK with {', '.join(ACTIONS)} and "
                          f"{', '.join(PHASES)}; or {STOP_FILE}")  # fmt: skip
    if number and not (number.isdecimal() and int(number) < nproc):
        raise ConfigError(f"--cases {text}: there is no such rank", expected=f"0 to {nproc - 1}", got=number,
                          fix=f"--cases {action}:{phase}:{nproc - 1}")  # fmt: skip
    return Case(action, phase, int(number) if number else rank)


@dataclass(frozen=True)
class Landmarks:
    """What the undisturbed run did when: its last step, and the steps after which it evaluated and saved."""

    last: int
    evaluations: Sequence[int]
    saves: Sequence[int]

    @classmethod
    def of(cls, run_dir: Path) -> Landmarks:
        """Read from the run's metrics."""
        steps: dict[object, list[int]] = {"train": [], "eval": [], "checkpoint": []}
        for event in events(run_dir):
            if event["event"] in steps and "error" not in event and isinstance(step := event["step"], int):
                steps[event["event"]].append(step)
        return cls(max(steps["train"], default=0), steps["eval"], sorted(steps["checkpoint"]))

    def step_of(self, case: Case) -> int | None:
        """Where `case` happens: behind the first save, so that there is something to resume from, and before the end.

        None where the run has no such phase.
        """
        first = min(self.saves, default=0)
        if case.phase == "start-up":
            return 0
        if case.phase in ("evaluation", "save"):
            return _inside(self.evaluations if case.phase == "evaluation" else self.saves, first, self.last)
        if not case.phase:
            return min(first + 1, self.last)
        # as far behind a save as there is: most is lost there
        candidates = range(first + 1, self.last)
        return max(candidates, key=lambda step: (self.since_save(step), -step), default=self.last)

    def since_save(self, step: int) -> int:
        """Steps between `step` and the newest save before it."""
        return step - max((saved for saved in self.saves if saved < step), default=0)


def _inside(steps: Sequence[int], first: int, last: int) -> int | None:
    """One of `steps` between first and last; else any."""
    return next((step for step in steps if first < step < last), max(steps, default=None))
