"""The batch script of a submission: what sbatch reads in it, and what bash does."""

import subprocess
from pathlib import Path

import pytest
from support.harness import ROOT

from distkit.commands.slurm.job import Job, by_option, seconds_of, write_script
from distkit.commands.slurm.site import Site
from distkit.errors import ConfigError

TEMPLATE = (ROOT / "slurm" / "train.sbatch").read_text()


def job(**fields: object) -> Job:
    known = {"nodes": 2, "gpus": 8, "ranks": 8, "time": "4:00:00", "name": "gpt-1", "output": Path("runs/1/job-%j.out")}
    return Job(**{**known, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60),
        ("4:30", 4 * 60 + 30),
        ("4:00:30", 4 * 3600 + 30),
        ("1-12", 36 * 3600),
        ("1-12:30", 36 * 3600 + 30 * 60),
        ("1-12:30:15", 36 * 3600 + 30 * 60 + 15),
    ],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["4h", "", "0", "0:00", "-1", "1:2:3:4", "1-", "1-1:1:1:1", " 4", "4\n", "UNLIMITED"])
def test_what_is_no_time_limit(text: str) -> None:
    with pytest.raises(ConfigError, match="--time"):
        job(time=text)


@pytest.mark.parametrize(
    ("option", "says"),
    [("mem=64G", "no option"), ("--mem 64G", "no option"), ("--nodes=3", "contradicts"), ("--array=1", "contradicts")],
)
def test_options_that_are_refused(option: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        job(options=[option])


def test_directives_of_the_job_the_site_and_the_person() -> None:
    site = Site(partition="gpu", gpus="--gres=gpu:{gpus}", options=("--exclusive",))
    assert job(name="a b", options=["--mem=64G"]).directives(site) == [
        "--job-name='a b'", "--nodes=2", "--time=4:00:00", f"--chdir={Path.cwd()}", "--output=runs/1/job-%j.out",
        "--partition=gpu", "--gres=gpu:8", "--exclusive", "--mem=64G",
    ]  # fmt: skip
    assert not any(word.startswith("--time") for word in job(time=None).directives(Site()))


def test_the_template_keeps_what_is_its_own_and_gets_its_arguments(tmp_path: Path) -> None:
    template = TEMPLATE.replace("USR1@120", "USR1@300").replace("--job-name=distkit", "--job-name distkit")
    text = write_script(template, ["--job-name=mine", "--nodes=2"], ["export A=1"], [["--ranks", "1"], ["it's a.py"]])
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:USR1@300" in header
    assert [line for line in header if "job-name" in line] == ["#SBATCH --job-name=mine"]
    assert [line for line in header if "output" in line] == ["#SBATCH --output=%x-%j.out"]
    assert text.index("#SBATCH --nodes=2") < text.index("export A=1") < text.index("set -- ")
    # all that follows is the template's
    assert text.endswith(template[template.index("set -euo pipefail") :])
    said = f'{text[: text.index("set -euo")]}\nprintf "%s|" "$A" "$@"'
    assert subprocess.run(["bash", "-c", said], capture_output=True, text=True).stdout == "1|--ranks|1|it's a.py|"
    subprocess.run(["bash", "-n", "-c", text], check=True)


def test_flags_are_laid_out_by_option() -> None:
    assert by_option(["--optim.betas", "0.9", "0.95", "--compile", "--seed=1"]) == [
        ["--optim.betas", "0.9", "0.95"], ["--compile"], ["--seed=1"],
    ]  # fmt: skip
    assert by_option([]) == []


@pytest.mark.parametrize("option", ["--nodes=1", "--time=9:00:00", "--array=1-4", "-N1", "-N", "--wrap=hostname"])
def test_a_sites_options_do_not_undo_what_was_asked_for(option: str, tmp_path: Path) -> None:
    job = Job(nodes=2, gpus=0, ranks=1, time="4:00:00", name="mine", output=tmp_path / "out")
    assert job.directives(Site(options=("--exclusive", "--nice=3")))[-2:] == ["--exclusive", "--nice=3"]
    with pytest.raises(ConfigError, match="in the site's options contradicts"):
        job.directives(Site(options=(option,)))
