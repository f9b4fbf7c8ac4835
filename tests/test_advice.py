"""What a message tells to type is typed, word for word: it gets past what was refused (C7).

Each wrong command line goes through the function that the command line calls, in this process, or on two ranks. Every
alternative of its `type:` line is tried.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from support import tiny
from support.harness import ROOT, run_ranks, run_recipe_cli

from distkit.cli.parse import spell
from distkit.entry import launch
from distkit.load import read_recipe
from distkit.recipe import Recipe
from distkit.runtime.process_state import unchanged_process

TINY = ROOT / "tests" / "support" / "tiny.py"
RECIPES: dict[str, Callable[[], Recipe]] = {  # type: ignore[type-arg]
    "tiny": lambda: tiny.RECIPE,
    "gpt": lambda: read_recipe(ROOT / "recipes" / "gpt.py"),
    "cifar10": lambda: read_recipe(ROOT / "recipes" / "cifar10.py"),
    "no test set": lambda: replace(tiny.RECIPE, build_dataset=lambda config, split: (
        tiny.Vectors(split, 0.0) if split == "train" else None)),
    "another best": lambda: replace(tiny.RECIPE, best=("loss", "min")),
}  # fmt: skip
#: Flags that make a run of each short, where the advice lets it begin.
SHORT: dict[str, list[str]] = {
    "gpt": ["--text", "text.txt", "--num-layers", "1", "--dim", "32", "--context-length", "16",
            "--global-batch-size", "4", "--num-epochs", "None", "--num-steps", "1", "--device", "cpu"],
    "cifar10": ["--data.source", "folder", "--data.root", "images", "--num-epochs", "None", "--num-steps", "1",
                "--global-batch-size", "4", "--device", "cpu", "--precision", "fp32", "--no-compile"],
}  # fmt: skip
QUICK = ["--num-steps", "4", "--schedule.warmup-steps", "0"]
WRONG: dict[str, list[str]] = {
    "tiny": [
        "--optim.lrr 1", "--optin.lr 1", "--optim.lr fast", "--optim.lr -0.1", "--num-steps 0", "--num-steps x",
        "--precision bf61", "--preset defualt", "--no-determinstic", "--compile False", "--compile=False",
        "--global-batch-size 10 --microbatch-size 4", "--global-batch-size 97 --microbatch-size 2",
        "--global-batch-size 200", "--global-batch-size 100 --microbatch-size 10", "--global-batch-size 0",
        "--microbatch-size 0", "--microbatch-size 3", "--seed -1", "--report-every 0", "--eval-every 0",
        "--eval-batch-size 0", "--num-threads 0", "--num-threads 9999", "--ema-decay 1.5", "--max-grad-norm 0",
        "--max-grad-norm 1 --max-grad-value 1", "--num-epochs 1 --num-steps 3", "--timeout-seconds 0",
        "--start-timeout-seconds -1", "--watchdog-seconds 0", "--peak-tflops 0", "--on-nan maybe",
        "--max-skips 3", "--on-nan rollback --checkpoint.no-enabled", "--on-nan skip --optim.name lbfgs",
        "--compile-scope blocks", "--compile-mode max-autotune", "--optim.name adamww",
        "--optim.name adam --optim.momentum 0.9", "--optim.name sgd --optim.eps 1", "--schedule.name cosin",
        "--schedule.name constant --schedule.min-lr-ratio 0.1", "--schedule.name multi_step",
        "--schedule.name plateau", "--schedule.warmup-steps 20", "--schedule.warmup-epochs 9",
        "--optim.name lbfgs --precision fp16", "--optim.name lbfgs --max-grad-norm 1",
        "--checkpoint.save-every 5", "--checkpoint.enabled --checkpoint.keep-last 0",
        "--checkpoint.enabled --checkpoint.async maybe",
        "--checkpoint.enabled --checkpoint.keep-last None --checkpoint.keep-every 5", "--checkpoint.max-failures 0",
        "--run-dir file", "--run-dir taken --resume never", "--run-dir .", "--resume w.safetensors",
        "--resume.weights-only", "--device cuda", "--device gpu", "--precision tf32", "--strategy fdsp",
        "--data.placement worker", "--data.placement workers", "--data.num-workers 2", "--data.on-corrupt skip",
        "--data.num-workers 0", "--data.prefetch-depth 0", "--observe.also consol", "--debug --run-dir d",
        "--debug --resume nowhere", "--debug --observe.tensorboard", "--debug.num-steps 2 --debug.overfit-batches 1",
        "--fsdp.replicas 2", "--zero.offload optimizer", "--strategy zero1 --optim.name muon",
        "--activation-checkpointing.mode maybe", "--help optimiser", "--dropout", "--preset", "stray",
        "--dropout 0.1 0.2", "--config taken/config.json --sed 3", "--optim.name sparse_adam",
    ],
    "gpt": ["--sequence-length 8", "--context-length 4000", "--context-length 300", "--contxt-length 8",
            "--dim 30", "--vocab-size 2", "--num-heads 5"],
    "cifar10": ["--data.root nowhere --data.source folder", "--data.source imagenet", "--label-smoothing 2",
                "--model fastnet --norm group", "--data.source cifar", "--flip False", "--model resnet",
                "--data.source folder --data.root gap"],
    "no test set": ["--eval-every 2", "--schedule.name plateau --eval-every 2"],
    "another best": ["--schedule.name plateau --eval-every 2 --schedule.metric accuracy"],
}  # fmt: skip
CASES = [(recipe, line) for recipe, lines in WRONG.items() for line in lines]
#: What only a person can fill in.
OPEN = re.compile(r"\b(VALUE|DIR|FILE|FOLDER|RUN|N|NAME|RECIPE|OTHER)\b|…")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text('{"sed": 3}')
    (tmp_path / "file").write_text("")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    save_file({name: value.clone() for name, value in tiny.build_model(tiny.BASE).state_dict().items()},
              tmp_path / "w.safetensors")  # fmt: skip
    for folder, splits in (("images", ("train", "test")), ("gap", ("train",))):
        for split in splits:
            for number in range(8):
                where = tmp_path / folder / split / f"class{number % 2}"
                where.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((32, 32, 3), number, dtype=np.uint8)).save(where / f"{number}.png")
    (tmp_path / "gap" / "test" / "class0").mkdir(parents=True)
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "gap" / "test" / "class0" / "x.png")
    return tmp_path


def alternatives(advice: str) -> list[str]:
    """The parts of a `type:` line, of which each alone should do."""
    return [part.strip() for part in re.split(r", or | or |; ", advice) if part.strip()]


def applied(argv: list[str], part: str, said: str) -> list[str] | None:
    """The command line that `part` asks for; None for a command of the shell, and for what only a person can do."""
    if OPEN.search(part) or not part.startswith(("--", "leave out ", "no ")):
        return None
    if "shows every option" in part:
        return part.split()[:-3]
    if part.startswith(("leave out ", "no ")):
        return without(argv, re.findall(r"--[\w.-]+", part))
    words = part.split()
    typed = [w for n, w in enumerate(words) if w.startswith("--") or words[n - 1].startswith("--")]
    unknown = re.match(r"distkit: error: (--\S+) is not an option", said)
    if unknown is not None:
        return [typed[0] if word.partition("=")[0] == unknown[1] else word for word in argv]
    options = [word for word in typed if word.startswith("--")]
    return [*without(argv, [*options, *map(other_way, options)]), *typed]


def other_way(option: str) -> str:
    """`--compile` for `--no-compile`, and back."""
    section, _, name = option.removeprefix("--").rpartition(".")
    name = name.removeprefix("no-") if name.startswith("no-") else f"no-{name}"
    return "--" + (f"{section}.{name}" if section else name)


def without(argv: Sequence[str], options: Sequence[str]) -> list[str]:
    """`argv` without these options and their values."""
    kept, drops = [], False
    for word in argv:
        drops = spell(word).partition("=")[0] in options if word.startswith("--") else drops
        if not drops:
            kept.append(word)
    return kept


def advice_in(said: str) -> str:
    found = re.search(r"^  type: +(.*)$", said, re.MULTILINE)
    return found[1] if found else ""


def run_here(recipe: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with unchanged_process():
        try:
            code = launch(RECIPES[recipe](), argv)
        except SystemExit as left:
            code = int(left.code or 0)
    return code, capsys.readouterr().err


def leads_on(recipe: str, argv: list[str], capsys: pytest.CaptureFixture[str], depth: int) -> str:
    """ "" where a command line is accepted, at once or after more advice; else what refuses it last."""
    code, said = run_here(recipe, argv, capsys)
    if code != 2:
        return ""
    for part in alternatives(advice_in(said)) if depth else []:
        typed = applied(argv, part, said)
        if typed is None or not leads_on(recipe, typed, capsys, depth - 1):
            return ""  # a person has to know the rest
    return f"{shlex.join(argv)}: {said}"


@pytest.mark.parametrize(("recipe", "line"), CASES, ids=[f"{recipe} {line}" for recipe, line in CASES])
def test_advice_is_accepted(recipe: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It gets past the check that gave it, and does not lead in a circle."""
    argv = [*SHORT.get(recipe, []), *shlex.split(line)]
    code, said = run_here(recipe, argv, capsys)
    assert code == 2, said
    first, advice = said.splitlines()[0], advice_in(said)
    assert advice, said
    for number, part in enumerate(alternatives(advice)):
        typed = applied(argv, part, said)
        if typed is None:
            continue
        again, told = run_here(recipe, in_directory(typed, f"past-{number}"), capsys)
        assert again != 2 or told.splitlines()[0] != first, f"{shlex.join(typed)}: {told}"
        assert not leads_on(recipe, in_directory(typed, f"on-{number}"), capsys, 3)


def in_directory(argv: list[str], name: str) -> list[str]:
    """In a run directory of its own, where none is named and one is written."""
    own = any(word.startswith(("--debug", "--run-dir", "--help")) for word in argv)
    return argv if own else [*argv, "--run-dir", name]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "line",
    ["--global-batch-size 97", "--global-batch-size 15", "--global-batch-size 97 --microbatch-size 5",
     "--global-batch-size 100 --microbatch-size 10", "--global-batch-size 1", "--global-batch-size 98"],
)  # fmt: skip
def test_advice_for_two_ranks_is_accepted(line: str, tmp_path: Path) -> None:
    argv = [*QUICK, "--run-dir", "run", *shlex.split(line)]
    ended = run_recipe_cli(argv, tmp_path, recipe=TINY, world_size=2)
    assert [each.returncode for each in ended] == [2, 2]
    for number, part in enumerate(alternatives(advice_in(ended[0].stderr))):
        ranks = re.match(r"start at most (\d+) ranks", part)
        typed = argv if ranks else applied(argv, part, ended[0].stderr)
        assert typed is not None, part
        again = run_recipe_cli([*typed, "--run-dir", f"{number}"], tmp_path, recipe=TINY,
                               world_size=int(ranks[1]) if ranks else 2)  # fmt: skip
        assert {each.returncode for each in again} == {0}, f"{part}: {again[0].stderr}"


def test_help_may_be_cut_off(tmp_path: Path) -> None:
    """`| head -1` closes the pipe: no BrokenPipeError, now or at exit."""
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(TINY))} --help all | head -1"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout
    assert done.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("flags", [["--run-dir", "hidden/run"], ["--resume", "hidden/run"]])
def test_what_may_not_be_looked_at_is_not_called_absent(flags: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:  # unlike pytest's, its parents are open to all
        os.chmod(name, 0o777)
        (Path(name) / "hidden" / "run").mkdir(parents=True)
        (Path(name) / "hidden").chmod(0o700)
        assert run_ranks(as_nobody, 1, flags, name) == [(2, "Permission denied")]


def as_nobody(argv: list[str], folder: str) -> tuple[int, str]:
    """The exit code of a command line of another user, and what the message says it got."""
    os.chdir(folder)
    os.seteuid(65534)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = launch(tiny.RECIPE, argv)
    os.seteuid(0)
    found = re.search(r"got: +(.*)", said.getvalue())
    return code, found[1] if found else said.getvalue()
