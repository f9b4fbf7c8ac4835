"""What `distkit submit` leaves in a run directory: submissions/1, /2, …, each with the batch script and what it runs.

The job runs the copies there, so that an edit after the submission does not change it. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from distkit.engine.attempts import a_job, object_in
from distkit.json_files import a_text, known, list_of, mapping_of

FOLDER = "submissions"
FILE = "submission.json"


def submissions(run_dir: Path) -> list[Path]:
    """The folders of a run's submissions, oldest first."""
    folders = [path for path in (run_dir / FOLDER).glob("*") if path.name.isdecimal()]
    return sorted(folders, key=lambda path: int(path.name))


def newest_submission(run_dir: Path) -> Mapping[str, object]:
    """What submission.json of the newest one says: jobs, submitted (when), files and more; {} where there is none."""
    folders = submissions(run_dir)
    return _read(folders[-1]) if folders else {}


def jobs_of(submission: Mapping[str, object]) -> list[str]:
    """The jobs of a submission; [] before sbatch has named them."""
    return cast(list[str], submission.get("jobs", []))


def original_of(run_dir: Path, file: Path) -> Path:
    """The file of which `file` is a submission's copy; `file` itself where it is none."""
    for folder in submissions(run_dir.resolve()):
        files = cast(dict[str, str], _read(folder).get("files", {}))
        if file.is_relative_to(folder):
            return Path(files.get(str(file.relative_to(folder)), file))
    return file


def _read(folder: Path) -> Mapping[str, object]:
    return known(object_in(folder / FILE), {"jobs": list_of(a_job), "submitted": a_text, "files": mapping_of(a_text)})
