"""A site's profile: what it may say, and the options that follow from it."""

from pathlib import Path

import pytest
from support.harness import ROOT

from distkit.commands.slurm.site import Site, read_site, sbatch_options
from distkit.errors import ConfigError


def test_the_profile_that_comes_along_is_the_default() -> None:
    assert read_site(ROOT / "slurm" / "site.toml") == Site()


def test_options_for_sbatch(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text('partition = "gpu"\naccount = "me"\ngpus = "--gres=gpu:a100:{gpus}"\noptions = ["--exclusive"]\n')
    words = ["--partition=gpu", "--account=me", "--gres=gpu:a100:4", "--exclusive"]
    assert sbatch_options(read_site(file), 4) == words
    assert sbatch_options(read_site(file), 0) == [*words[:2], "--exclusive"]
    assert sbatch_options(Site(gpus=""), 4) == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('partitoin = "gpu"', "partition"),
        ("partition = 3", "text in quotes"),
        ('modules = "cuda"', "a list of words"),
        ("modules = [1]", "a list of words"),
        ('container = [""]', "a list of words"),
        ("max_requeues = true", "a whole number"),
        ("max_requeues = -1", "0 or more"),
        ('continuation = "again"', "requeue or chain"),
        ('gpus = "--gres=gpu:8"', "{gpus}"),
        ('gpus = "--gres=gpu:{gpus}:{x}"', "{gpus}"),
        ('gpus = "--gres=gpu:{gpus"', "{gpus}"),
        ('gpus = "gpu:{gpus}"', "{gpus}"),
        ('options = ["exclusive"]', "begin with --"),
        ('srun = ["mpi=pmix"]', "begin with --"),
        ('environment = ["FOO BAR"]', "names of variables"),
        ("partition = ", "a TOML file"),
    ],
)
def test_a_mistake_is_named_with_the_file(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "site.toml"
    file.write_text(line)
    with pytest.raises(ConfigError) as error:
        read_site(file)
    assert says in str(error.value)
    assert str(file) in str(error.value)
    assert len(str(error.value).splitlines()) < 8


def test_no_profile_and_an_option_with_a_space(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no site profile"):
        read_site(tmp_path / "site.toml")
    with pytest.raises(ConfigError, match="has a space in it"):
        sbatch_options(Site(options=("--comment=two words",)), 0)
