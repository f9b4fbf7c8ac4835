"""What the scheduler says of jobs: one call of squeue for all of them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping

#: A controller that does not answer makes squeue wait for minutes.
TIMEOUT_SECONDS = 20.0
#: Jobs in these states will not start (again) by themselves; SLURM still lists them for some minutes.
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
         "REVOKED", "TIMEOUT")  # fmt: skip


def ask_queue(jobs: Iterable[str]) -> Mapping[str, str] | None:
    """SLURM_JOB_ID -> `RUNNING`, `PENDING (Resources)`; without the jobs that the scheduler has forgotten.

    None where there is no squeue, or no answer.
    """
    wanted = sorted(set(jobs))
    if shutil.which("squeue") is None:
        return None
    if not wanted:
        return {}
    command = ["squeue", "--noheader", "--states=all", "--format=%A|%T|%r", f"--jobs={','.join(wanted)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    said = {}
    for line in done.stdout.splitlines():
        job, _, rest = line.strip().partition("|")
        state, _, reason = rest.partition("|")
        said[job] = state if reason in ("", "None") or state == "RUNNING" else f"{state} ({reason})"
    return said


def is_queued(said: str) -> bool:
    """True for a job that waits, runs or is about to end, by what `ask_queue` says of it."""
    return said.partition(" ")[0] not in ENDED
