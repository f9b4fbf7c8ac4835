"""One SLURM for the whole folder, and a folder to submit from for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.slurm import MISSING, Cluster, running_cluster, set_up


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if MISSING:
        pytest.skip(f"SLURM is not installed: no {', '.join(MISSING)}")
    with running_cluster() as running:
        yield running


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """What a person submits from; when the test is over, no job runs any more."""
    set_up(tmp_path)
    yield tmp_path
    cluster.cancel_all()
