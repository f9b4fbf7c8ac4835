"""Every command of slurm/README.md, as it stands there, on a real SLURM; small models, and no GPU."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from support.harness import ROOT
from support.launching import TINY, write_text
from support.slurm import Cluster, set_up

README = (ROOT / "slurm" / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
(SWEEP,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
SMALL = {
    "recipes/gpt.py": [*TINY, "--num-steps", "4", "--device", "cpu", "--precision", "fp32"],
    "recipes/cifar10.py": ["--preset", "quick", "--num-steps", "2", "--global-batch-size", "10", "--num-threads", "1",
                           "--device", "cpu", "--precision", "fp32"],
}  # fmt: skip


def prepare(project: Path, *site: str) -> None:
    """What the README takes for granted: a text, a sweep, images, a site."""
    write_text(project).rename(project / "FILE")
    (project / "SWEEP").write_text(SWEEP)
    for split in ("train", "test"):
        for number in range(20):
            image = project / "images" / split / f"class{number % 10}" / f"{number}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (number, 0, 0)).save(image)
    (project / "slurm" / "site.toml").unlink()
    lines = ['partition = "main"', 'gpus = ""', 'interface = "lo"', f'scratch = "{project}/disk"', *site]
    (project / "slurm" / "site.toml").write_text("\n".join(lines))


def shell(cluster: Cluster, project: Path, command: str) -> str:
    """What a command prints, typed in `project`."""
    return cluster.call("bash", "-c", command, cwd=project)


def submit(cluster: Cluster, project: Path, command: str) -> list[str]:
    """Type a command of the README, with a small model; the jobs that sbatch names."""
    for recipe, flags in SMALL.items():
        end = ";" if "; done" in command else "$"
        command = re.sub(rf"({recipe}[^;]*?)(?={end})", rf"\1 {' '.join(flags)}", command)
    return re.findall(r"(?i:submitted (?:batch )?job) (\d+)", shell(cluster, project, command))


def one(*words: str) -> str:
    (command,) = (line for line in COMMANDS if all(word in line for word in words))
    return command


def state(run: Path) -> tuple[str, int]:
    status = json.loads((run / "status.json").read_text())
    return status["state"], status["step"]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_the_commands_do_what_is_said(cluster: Cluster, project: Path) -> None:
    prepare(project)
    for split in ("train", "test"):
        shell(cluster, project, f"python -m distkit data pack images data/packed --split {split} --workers 1")
    ours = one("distkit submit").replace("--gpus-per-node 8", "--gpus-per-node 1")
    (submitted,) = submit(cluster, project, f"{ours} --run-dir runs/submitted")
    (train,) = submit(cluster, project, one("--nodes=2"))
    (staged,) = submit(cluster, project, one("--stage"))
    (sweep,) = submit(cluster, project, one("sweep.sbatch"))
    (debug,) = submit(cluster, project, one("debug.sbatch"))
    chained = project / "chained"
    set_up(chained)
    prepare(chained, 'continuation = "chain"')
    first, *rest = submit(cluster, chained, one("singleton"))
    assert train in shell(cluster, project, one("squeue --me"))

    done = [submitted, train, staged, *(f"{sweep}_{task}" for task in (1, 2, 3)), debug, first]
    assert {job: cluster.wait(job) for job in done} == dict.fromkeys(done, "COMPLETED")
    assert [cluster.wait(job) for job in rest] == ["CANCELLED"] * 2
    runs = project / "runs"
    assert "is completed, step 4" in shell(cluster, project, one("tail").replace("JOB", train))
    assert "completed at step 4" in shell(cluster, project, one("distkit show").replace("JOB", train))
    assert re.search(rf"runs/submitted +{submitted} +completed +4 of 4 ", shell(cluster, project, one("distkit jobs")))
    assert json.loads((runs / "gpt" / f"slurm-{train}" / "environment.json").read_text())["world_size"] == 2
    assert state(chained / "runs" / "mine") == ("completed", 4)
    config = json.loads((runs / "cifar10" / f"slurm-{staged}" / "config.json").read_text())
    assert config["data"]["root"].startswith(f"{project}/disk/")
    configs = [json.loads((runs / "gpt" / f"slurm-{sweep}_{task}" / "config.json").read_text()) for task in (1, 2, 3)]
    assert [(config["optim"]["lr"], config["seed"]) for config in configs] == [(1e-3, 0), (3e-4, 0), (3e-4, 2)]
    assert "nothing wrong" in (project / f"distkit-debug-{debug}.out").read_text()


def test_the_readme_has_no_command_that_no_test_types() -> None:
    typed = ["distkit submit", "distkit jobs", "--nodes=2", "--stage", "sweep.sbatch", "debug.sbatch", "singleton",
             "squeue --me", "tail", "distkit show", "--signal=USR1", "scontrol requeue", "scancel JOB"]  # fmt: skip
    assert sorted(one(words) for words in typed) == sorted(COMMANDS)


def test_the_scripts_are_clean() -> None:
    scripts = sorted(map(str, (ROOT / "slurm").glob("*.sbatch")))
    assert len(scripts) == 3
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*map(str, (ROOT / "slurm").glob("*.sbatch")), str(ROOT / ".ci" / "run")]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
