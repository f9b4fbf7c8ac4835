"""Run directories from others: no traceback, no hang, nothing written elsewhere, and verify agrees with resume."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import hostile
from support.hostile import CONFIG, Case, check
from support.tiny import RECIPE

from distkit.entry import train


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of 8 steps, with checkpoints of 4 and 8; nothing here waits for the disk."""
    run = tmp_path_factory.mktemp("pristine") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _descriptor: None)
        train(RECIPE, replace(CONFIG, run_dir=run))
        yield run


def all_cases(run: Path) -> list[Case]:
    """Every case, in an order that stays."""
    return [*hostile.json_cases(run), *hostile.file_cases()]


def try_all(cases: list[Case], run: Path, scratch: Path) -> None:
    """Each case on a copy of `run`; what goes wrong is collected under the names of the cases."""
    wrong = []
    for case in cases:
        folder = scratch / "case"
        folder.mkdir()
        try:
            check(case, run, folder)
        except (Exception, hostile.TooLongError) as error:
            wrong.append(f"{case.name}: {type(error).__name__} {error}")
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong)


#: One case in so many is tried each time, and one in so many in the long tests, in parts. SHARE of 1 tries all of them.
QUICK_SHARE, SHARE, PARTS = 24, 5, 4


def test_some_of_each_kind(pristine: Path, tmp_path: Path) -> None:
    cases = all_cases(pristine)
    assert len(cases) >= 500
    assert len({case.name for case in cases}) == len(cases)
    try_all(cases[::QUICK_SHARE], pristine, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_more_of_each_kind(part: int, pristine: Path, tmp_path: Path) -> None:
    cases = all_cases(pristine)
    try_all(cases[::SHARE][part::PARTS], pristine, tmp_path)
