"""What `distkit submit` leaves in a run directory: submissions/1, /2, …, each with the batch script and what it runs.

The job runs the copies there, so that an edit after the submission does not change it. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distkit.engine.attempts import read_object

FOLDER = "submissions"
FILE = "submission.json"


def submissions(run_dir: Path) -> list[Path]:
    """The folders of a run's submissions, oldest first."""
    folders = [path for path in (run_dir / FOLDER).glob("*") if path.name.isdecimal()]
    return sorted(folders, key=lambda path: int(path.name))


def read_submission(folder: Path) -> Mapping[str, object]:
    """What submission.json says; {} where it is not there yet, or cannot be read."""
    return read_object(folder / FILE)


def jobs_of(run_dir: Path) -> list[str]:
    """The jobs of a run's newest submission; [] where there is none."""
    folders = submissions(run_dir)
    jobs = read_submission(folders[-1]).get("jobs") if folders else None
    return [str(job) for job in jobs] if isinstance(jobs, list) else []


def original_of(run_dir: Path, file: Path) -> Path:
    """The file of which `file` is a submission's copy; `file` itself where it is none."""
    for folder in submissions(run_dir.resolve()):
        files = read_submission(folder).get("files")
        if file.is_relative_to(folder) and isinstance(files, dict):
            return Path(str(files.get(str(file.relative_to(folder)), file)))
    return file
