"""What asks a run to stop or to save, other than signals: files in its directory, the job's end, the launcher's."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

#: Wishes that are not numbers of signals.
STOP_FILE, JOB_END, NO_LAUNCHER = 1001, 1002, 1003
#: Left between the end of the last save and the end of the job.
MARGIN_SECONDS = 30.0


@dataclass
class Watch:
    """What the heartbeat of a rank looks at once a beat.

    Attributes:
        directory: where STOP and SAVE are looked for; None on ranks other than 0.
        job_end: when the job ends, seconds since 1970; None where that is not known, and on other ranks.
        launcher: the process that started this one, to notice its end; None where there is none.
        save_seconds: the longest save so far.
        wants_save: a file SAVE is there.
    """

    directory: Path | None = None
    job_end: float | None = None
    launcher: int | None = None
    save_seconds: float = 0.0
    wants_save: bool = False
    _unit: tuple[int, float] = field(default_factory=lambda: (0, time.monotonic()), init=False)
    #: Seconds that the last units took (a step, or a batch of an evaluation); the first ones compile.
    _recent: deque[float] = field(default_factory=lambda: deque([0.0], maxlen=16), init=False)

    def look(self, unit: int) -> int:
        """Why the run should stop, or 0; `unit` is the number of the one in progress."""
        now = time.monotonic()
        if unit != self._unit[0]:
            self._recent.append(now - self._unit[1])
            self._unit = unit, now
        if self.launcher is not None and os.getppid() != self.launcher:
            return NO_LAUNCHER
        if self.directory is None:
            return 0
        with suppress(OSError):
            # a folder of that name could not be removed when it has been obeyed
            self.wants_save = (self.directory / "SAVE").is_file()
            if (self.directory / "STOP").is_file():
                return STOP_FILE
        reserve = MARGIN_SECONDS + 2 * self.save_seconds + max(self._recent)
        return JOB_END if self.job_end is not None and time.time() > self.job_end - reserve else 0

    def done_with(self, name: str) -> None:
        """Remove the file `name`, which has been obeyed."""
        self.wants_save = self.wants_save and name != "SAVE"
        if self.directory is not None:
            (self.directory / name).unlink(missing_ok=True)

    def time_left(self) -> float:
        """Seconds until the job ends; infinite where that is not known."""
        return float("inf") if self.job_end is None else self.job_end - time.time()


def slurm_job_end() -> float | None:
    """When this SLURM job ends, seconds since 1970; None outside of one, and where SLURM does not say."""
    job, said = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_END_TIME", "")
    if job is None or said.isdigit():
        return float(said) if job is not None else None
    if shutil.which("squeue") is None:
        return None
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        command = ["squeue", "--noheader", "--format=%e", f"--jobs={job}"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return time.mktime(time.strptime(text.strip(), "%Y-%m-%dT%H:%M:%S"))
    return None
