"""Run directories that somebody has damaged, by rules, and everything that reads one: `check` tries it all on one.

A case is a name and what it does to a run directory. The rules are: every JSON value replaced by each odd one, every
file by each odd kind of file, and every name that a run uses taken by each.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import stat
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from support.tiny import BASE, RECIPE, TinyConfig
from support.writing import rehash, sealed

from distkit.checkpoint.format import MANIFEST, STATE, step_name
from distkit.cli import parse
from distkit.commands import run as run_command
from distkit.config import CheckpointConfig
from distkit.entry import train
from distkit.errors import DistkitError
from distkit.load import load_run

LIMIT_SECONDS = 20
#: A run of 8 steps with checkpoints of 4 and 8, and the same one with 4 more.
CONFIG = replace(BASE, num_steps=8, eval_every=4, report_every=4, ema_decay=0.9,
                 checkpoint=CheckpointConfig(save_every=4, keep_last=None))  # fmt: skip
NEWEST = f"checkpoints/{step_name(8)}"
#: Would hurt a terminal, an encoder, or a reader from left to right.
UGLY = "\x1b[31m\x1b]0;title\x07\u202e\ud800\n"
ODD = {
    "null": None, "true": True, "minus": -1, "half": 1.5, "huge": 2**70, "nan": float("nan"), "empty": "", "ugly": UGLY,
    "list": [], "object": {}, "deep": [[[[{}]]]],
}  # fmt: skip
FILES = ("status.json", "config.json", "environment.json", "summary.json", "attempts.jsonl", "metrics.jsonl",
         "weights.safetensors", "ema.safetensors", "recipe/source.json", "recipe/tiny.py")  # fmt: skip
CHECKPOINT_FILES = tuple(f"{NEWEST}/{name}" for name in (MANIFEST, STATE, "shard-00000-of-00001-000.safetensors"))


@dataclass(frozen=True)
class Case:
    """What is done to a run directory.

    Attributes:
        name: of the test.
        damage: does it; its arguments are the directory, and one outside of it.
        of_checkpoint: the newest checkpoint is damaged, if anything: what `verify` says of it, a resume says, too.
    """

    name: str
    damage: Callable[[Path, Path], object]
    of_checkpoint: bool = False


# --- rules


def replaced(value: Any, path: tuple[str | int, ...], new: object) -> Any:
    """`value` with `new` at `path`."""
    value = copy.deepcopy(value)
    inner = value
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = new
    return value


def paths_in(value: object, prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to each value in `value`; of a list the first one, of an object that has many names two."""
    parts: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        named = len(value) > 9 and len({json.dumps(shape_of(part)) for part in value.values()}) == 1
        parts = list(value.items())[: 2 if named else None]
    elif isinstance(value, list):
        parts = list(enumerate(value))[:1]
    for name, part in parts:
        yield (*prefix, name)
        yield from paths_in(part, (*prefix, name))


def shape_of(value: object) -> object:
    """The names in `value`, without what they hold."""
    return {name: shape_of(part) for name, part in value.items()} if isinstance(value, dict) else type(value).__name__


def json_cases(run: Path) -> Iterator[Case]:
    """Each value of each JSON file, each odd one in its place."""
    for name in (*FILES[:6], "recipe/source.json", *CHECKPOINT_FILES[:2]):
        first = (run / name).read_text().splitlines()[0] if name.endswith("jsonl") else (run / name).read_text()
        value = json.loads(first)
        for path in paths_in(value):
            if len(path) > 1 and "config" in (path[0] if len(path) > 2 else "", short(name).partition(".")[0]):
                continue  # a configuration is read in one way, whatever the field
            few = name in ("config.json", "environment.json", "summary.json") or "groups" in path
            for kind in list(ODD)[sum(map(ord, str(path))) % 4 :: 4] if few else ODD:
                yield Case(
                    f"{short(name)}-{'.'.join(map(str, path))}-{kind}",
                    put(name, value, path, ODD[kind]),
                    of_checkpoint=name in CHECKPOINT_FILES,
                )


def short(name: str) -> str:
    """`checkpoints/step-000000008/state.json` -> `state.json`."""
    return name.rpartition("/")[2]


def put(name: str, value: object, path: tuple[str | int, ...], odd: object) -> Callable[[Path, Path], None]:
    """Write `value` with `odd` at `path` into the file `name`; a checkpoint gets the checksums that fit."""

    def damage(run: Path, _outside: Path) -> None:
        new = replaced(value, path, odd)
        file = run / name
        if name.endswith(MANIFEST):
            file.write_bytes(sealed(new))
        elif name.endswith("jsonl"):
            file.write_text(json.dumps(new) + "\n" + file.read_text())
        else:
            file.write_text(json.dumps(new))
        if name.endswith(STATE):
            rehash(run / NEWEST, STATE)

    return damage


def symlink(path: Path, outside: Path) -> None:
    """A link to a good copy elsewhere."""
    if path.exists():
        path.rename(outside / path.name)
    else:
        (outside / path.name).write_bytes(b"precious")
    path.symlink_to(outside / path.name)


def folder_link(path: Path, outside: Path) -> None:
    """A link to a folder elsewhere."""
    remove(path)
    path.symlink_to(outside)


def content(data: bytes) -> Callable[[Path, Path], object]:
    """A file that holds `data`."""
    return lambda path, _: (remove(path), path.write_bytes(data))


def sparse(path: Path, _outside: Path) -> None:
    """A file of a terabyte, of which nothing is on the disk."""
    remove(path)
    path.touch()
    os.truncate(path, 2**40)


def remove(path: Path) -> None:
    """Whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "link": symlink,
    "dangling": lambda path, outside: (remove(path), path.symlink_to(outside / "nothing")),
    "loop": lambda path, _: (remove(path), path.symlink_to(path.name)),
    "fifo": lambda path, _: (remove(path), os.mkfifo(path)),
    "folder": lambda path, _: (remove(path), path.mkdir(), (path / "x").touch()),
    "folder-link": folder_link,
    "missing": lambda path, _: remove(path),
    "empty": content(b""),
    "sparse": sparse,
    "random": content(bytes(range(256)) * 40),
    "zeros": content(bytes(100_000)),
    "cut": lambda path, _: os.truncate(path, path.stat().st_size // 2) if path.exists() else content(b"{")(path, path),
    "deep": content(b"[" * 10**6),
    "deep-object": content(b'{"a":' * 500 + b"1" + b"}" * 500),
    "digits": content(b'{"step": ' + b"9" * 5001 + b"}\n"),
    "not-an-object": content(b"[1, 2]\n"),
    "nan": content(b"NaN\n"),
    "latin-1": content('{"state": "caf\xe9"}\n'.encode("latin-1")),
    "bom-16": content('{"step": 1}\n'.encode("utf-16")),
    "twice": content(b'{"state": "running", "step": 1, "state": "completed", "attempt": 1}\n'),
    "one-line": content(b'{"step": "' + b"x" * 3_000_000 + b'"}\n'),
}
#: Names that a run makes, or looks for, and that are not there.
FREE = ("checkpoints/.tmp-step-000000012", "checkpoints/step-000000012", "checkpoints/.trash-step-000000001", ".tmp-x",
        ".tmp-metrics.jsonl-1", "stacks-rank-0.txt", "lease.json", "STOP", "SAVE", "tensorboard", "submissions",
        f"{NEWEST}/extra", f"checkpoints/x{UGLY[:-1]}".replace("\ud800", "\udcff"))  # fmt: skip
FOLDERS = ("checkpoints", "recipe", NEWEST)
#: The commands that read checkpoints, and the others; `show` reads both.
OF_CHECKPOINTS = (
    "show RUN",
    "checkpoint list RUN",
    "checkpoint list RUN --json",
    "checkpoint show RUN --tensors",
    "checkpoint verify RUN --all",
    "checkpoint digest RUN",
    "checkpoint diff RUN PRISTINE",
    "checkpoint prune RUN --keep-last 1 --keep-best 1 --metric loss --mode min",
    "checkpoint export RUN OUT",
)
OF_RUNS = ("show RUN", "jobs RUN", "jobs RUN --json", "checkpoint list RUN")


def file_cases() -> Iterator[Case]:
    """Each file, folder and name that a run uses, each odd kind in its place."""
    for name in (*FILES, *CHECKPOINT_FILES, *FREE, *FOLDERS):
        for kind, make in KINDS.items():
            if (name in FOLDERS and kind in ("link", "cut")) or (name in FREE and kind == "missing"):
                continue

            def damage(run: Path, outside: Path, name: str = name, make: Callable[[Path, Path], object] = make) -> None:
                make(run / name, outside)

            known = name.encode("ascii", "backslashreplace").decode().replace("/", "_")
            yield Case(f"{short(known)}-{kind}", damage, of_checkpoint=name.startswith("checkpoints"))


# --- what is tried on each


class TooLongError(BaseException):
    """A case has not ended in time."""


@contextlib.contextmanager
def limited(seconds: float = LIMIT_SECONDS) -> Iterator[None]:
    """Raise TooLongError in the block after `seconds`."""

    def handle(_number: int, _frame: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Ended:
    """How one thing that was tried ended: an exit code, and what it printed."""

    code: int
    text: str


class Terminal(io.TextIOWrapper):
    """Takes what a terminal in UTF-8 takes."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)

    def text(self) -> str:
        """All that was written."""
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode()


def attempt(what: str, action: Callable[[], object]) -> Ended:
    """Do it; the error of a library function is printed as a command would print it."""
    out, err = Terminal(), Terminal()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with limited():
                code = action()
        except DistkitError as error:
            print(error, file=err)
            code = error.exit_code
        except SystemExit as error:
            code = error.code
    text = out.text() + err.text()
    assert "Traceback" not in text, f"{what}: {text}"
    bad = {each for each in text if not (each.isprintable() or each in "\n\t" or unicodedata.category(each) == "Zs")}
    assert not bad, f"{what}: {bad!a} in {text!a}"
    assert len(text) < 100_000, f"{what} prints {len(text):,} characters"
    return Ended(code if isinstance(code, int) else 0, text)


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything in `folder`, links not followed: kind and mode, time of change, content of small files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        regular = stat.S_ISREG(status.st_mode) and status.st_size < 10**7
        found[str(path)] = (status.st_mode, status.st_mtime_ns, path.read_bytes() if regular else b"")
    return found


def resumed_from(run: Path) -> str:
    """The checkpoint that the last attempt says it has gone on from."""
    notes = [json.loads(line).get("message", "") for line in (run / "metrics.jsonl").read_bytes().splitlines()[-40:]]
    return next((str(note).rpartition("/")[2] for note in reversed(notes) if str(note).startswith("resumed from")), "")


def read_recipe(run: Path, recipe: str | None) -> int:
    """Load a run by the file that it names, or by its copy of it: whatever the recipe is, its errors are of its own."""
    with contextlib.suppress(NameError):  # JSON in its place is Python, too
        load_run(run, recipe=recipe)
    return 0


def check(case: Case, pristine: Path, scratch: Path) -> None:
    """Damage a copy of `pristine` as `case` says, and try every reader and a resume on it.

    Raises:
        AssertionError: a traceback, a text that a terminal obeys, something written outside of the run directory, or
            `verify` and a resume that do not agree.
        TooLongError: one of them did not end in time.
    """
    run, outside, out = scratch / "run", scratch / "outside", scratch / "out"
    shutil.copytree(pristine, run, symlinks=True)
    for folder in (outside, out):
        folder.mkdir()
    (outside / "precious").write_bytes(b"precious")
    case.damage(run, outside)
    before = snapshot(outside) | snapshot(pristine)
    inside = snapshot(run)
    places = {"RUN": str(run), "PRISTINE": str(pristine), "OUT": str(out / "a.safetensors")}
    for line in OF_CHECKPOINTS if case.of_checkpoint else OF_RUNS:
        argv = [places.get(word, word) for word in line.split()]
        attempt(line, partial(run_command, argv))
    if case.name.startswith("config"):
        config = ["--config", str(run / "config.json")]
        attempt("--config", lambda: parse(TinyConfig, RECIPE.presets, config, "tiny.py", "") and 0)
    for recipe in (None, "copy") if case.name.startswith(("source", "recipe")) else ():
        attempt(f"load_run {recipe}", partial(read_recipe, run, recipe))
    attempt("load_run", lambda: load_run(run, "best" if case.of_checkpoint else "last", recipe=RECIPE) and 0)
    verified = attempt("verify", partial(run_command, ["checkpoint", "verify", str(run)]))
    newest = max((path.name for path in (run / "checkpoints").glob("step-*")), default="")
    assert snapshot(run) == inside, "a reader has written into the run directory"
    assert (out / "a.safetensors").exists() or not case.of_checkpoint or verified.code != 0

    resumed = attempt("resume", lambda: train(RECIPE, replace(CONFIG, num_steps=12, run_dir=run)) and 0)
    assert snapshot(outside) | snapshot(pristine) == before, "something was written outside of the run directory"
    if resumed.code == 0:
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["step"]) == ("completed", 12)
        assert (resumed_from(run) == newest) == (verified.code == 0), resumed.text
        assert verified.code == 0 or "warning: " in resumed.text
    elif case.of_checkpoint and verified.code == 0:
        raise AssertionError(f"verify: {verified.text}\nresume: {resumed.text}")
    else:
        assert len(resumed.text.splitlines()) < 10, resumed.text
