"""The directory of a run: config.json, environment.json, status.json, attempts.jsonl, summary.json."""

from __future__ import annotations

import datetime
import hashlib
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Literal, cast

from distkit.checkpoint.retention import list_checkpoints, sweep
from distkit.checkpoint.verify import step_of_weights
from distkit.engine.attempts import FILE as ATTEMPTS
from distkit.engine.attempts import append_ended, clock_time, last_number, object_in, read_status
from distkit.engine.lease import Lease
from distkit.engine.submission import original_of
from distkit.errors import CheckpointError, ConfigError, Stopped, TrainingError
from distkit.files import TEMPORARY, overwrite_json, remove_temporaries, sync_folder, write_bytes, write_json

State = Literal["running", "completed", "preempted", "failed"]
#: In recipe/: where the file beside it was copied from, and its sha256.
SOURCE = "source.json"
#: What a run writes beside its checkpoints, and its folders; anything else in place of one would be met in the middle
#: of a run, and a link would lead out of its directory.
FILES = ("config.json", "environment.json", "status.json", ATTEMPTS, "summary.json", "metrics.jsonl",
         "weights.safetensors", "ema.safetensors")  # fmt: skip
FOLDERS = ("checkpoints", "recipe", "submissions", "tensorboard", "wandb")
EXIT_CODES = {"completed": 0, "preempted": Stopped.exit_code}


@dataclass
class RunDirectory:
    """The files of one run. Every rank knows the path; rank 0 (`writes`) writes it and holds its lease;
    where rank 0 cannot, another one says why the run failed.

    Attributes:
        path: the directory.
        writes: this process writes it.
        fresh: the name was made up just now: another run that made up the same one must not share it.
        hosts: the node of each rank, in the order of ranks.
        attempt: how many times the run was started, this time included; `claim` finds it, for `open_directory` to tell
            the other ranks.
        num_steps: length of the run, once it is known.
    """

    path: Path
    writes: bool
    fresh: bool = False
    hosts: Sequence[str] = ()
    attempt: int = field(default=1, init=False)
    num_steps: int | None = field(default=None, init=False)
    _from_step: int | None = field(default=None, init=False)
    _began: str = field(default_factory=clock_time, init=False)
    lease: Lease | None = field(default=None, init=False)
    _failure_told: bool = field(default=False, init=False)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def recipe(self) -> Path:
        """Where the copy of the recipe's file lies."""
        return self.path / "recipe"

    def claim(self) -> None:
        """Take the lease of a directory that exists; without effect when it is held, or made later.

        Then the attempt before has ended, and gets its line if it could not write that itself.

        Raises:
            ConfigError: another process has it.
        """
        if self.writes and self.lease is None and self.path.is_dir():
            self.lease = Lease.acquire(self.path)
            append_ended(self.path)
            self.attempt = last_number(self.path) + 1

    def create(
        self,
        config: Mapping[str, object],
        environment: Mapping[str, object],
        recipe: tuple[str, Path] | None,
        *,
        saves: bool,
    ) -> None:
        """Make the directory and write what the run is; with `saves`, make sure that checkpoints can be written.

        Args:
            config, environment: for config.json and environment.json.
            recipe: its name, and its file, of which a copy is kept; None where it has no file.
            saves: the run writes checkpoints.

        Raises:
            ConfigError: it cannot be made or written, or another process has it.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=not self.fresh)
            check_files(self.path)
            if self.lease is None:
                self.claim()
                self._check_still_empty()
            remove_temporaries(self.path)
            if saves:
                self.checkpoints.mkdir(exist_ok=True)
                sync_folder(self.path)  # or a power cut leaves checkpoints that nothing leads to
                sync_folder(self.path.parent)
                sweep(self.checkpoints)
                probe(self.checkpoints)
            write_json(self.path / "config.json", config)
            write_json(self.path / "environment.json", environment)
            if recipe is not None:
                self._copy_recipe(*recipe)
        except OSError as error:
            raise ConfigError(f"cannot write the run directory {self.path}", expected="a writable directory",
                              got=error, fix="--run-dir DIR") from error  # fmt: skip

    def _copy_recipe(self, name: str, file: Path) -> None:
        """Keep the recipe's file as it is now, and where it came from; the copies of earlier attempts are replaced.

        The file of `distkit submit` is itself a copy.
        """
        text = file.read_bytes()
        self.recipe.mkdir(exist_ok=True)
        write_bytes(self.recipe / file.name, text)
        source = {"recipe": name, "file": str(original_of(self.path, file)), "sha256": hashlib.sha256(text).hexdigest()}
        write_json(self.recipe / SOURCE, source)

    def _check_still_empty(self) -> None:
        """The directory did not exist when it was looked at: what another process has begun in it since is not ours."""
        if self.holds_run():
            self.release()
            raise ConfigError(f"another run was started in {self.path} just now", expected="one run in a directory",
                              fix="the same command again, which continues it")  # fmt: skip

    def holds_run(self) -> bool:
        """True when a run was started here."""
        return holds_run(self.path)

    def completed_steps(self) -> int:
        """Steps of the run that was completed here, as status.json says; -1 when none was."""
        status = read_status(self.path)
        return cast(int, status.get("step", -1)) if status.get("state") == "completed" else -1

    def steps_of_weights(self) -> int:
        """The step whose weights weights.safetensors holds; -1 where it holds none."""
        try:
            return step_of_weights(self.path / "weights.safetensors")
        except CheckpointError:
            return -1

    def steps_of_summary(self) -> int:
        """The step of which summary.json tells; -1 where there is none."""
        step = object_in(self.path / "summary.json").get("step")
        return step if isinstance(step, int) else -1

    def release(self) -> None:
        """Let another process have the directory."""
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    def write_status(
        self, state: State, step: int, reason: str | None = None, *, retryable: bool | None = None
    ) -> None:
        """Say in status.json how the run stands.

        Raises:
            TrainingError: the disk is full or failing.
        """
        if state == "running":
            self._from_step = step
        status = {"state": state, "step": step, "reason": reason, "retryable": retryable, "cause": None,
                  "exit_code": EXIT_CODES.get(state)}  # fmt: skip
        self._write("status.json", {**status, **self._facts(ended=state != "running")}, overwrite_json)
        if self.writes and state != "running":
            append_ended(self.path)

    def write_failure(self, cause: Mapping[str, object], reason: str, step: int | None, *, exit_code: int = 1) -> None:
        """Say in status.json why the run failed, in the name of all ranks; makes the directory where there is none.

        The first cause of an attempt stays, and so does a completed run. Any rank may call this when rank 0 cannot.

        Args:
            cause: rank, host, phase, step, what_happened, what_to_do, retryable.
            reason: the same in a line.
            step: finished steps; None in start-up, when those of the attempt before count.
            exit_code: of the rank that was first.

        Raises:
            TrainingError: the disk is full or failing.
        """
        if self._failure_told:  # ranks that are cut off from each other find different causes: the first one stays
            return
        before = read_status(self.path)
        mine = before.get("attempt") == self.attempt
        if before.get("state") == "completed" or (mine and before.get("state") == "failed"):
            self._failure_told = True
            return
        rank = cause["rank"]
        failed_on = self.hosts[rank] if isinstance(rank, int) and rank < len(self.hosts) else None
        status = {"state": "failed", "step": before.get("step", 0) if step is None else step, "reason": reason,
                  "retryable": cause["retryable"], "cause": cause, "exit_code": exit_code}  # fmt: skip
        # another rank than 0 does not know all of them
        facts = self._facts() | ({name: before[name] for name in self._facts() if name in before} if mine else {})
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            overwrite_json(self.path / "status.json",
                           {**status, **facts, "failed_on": failed_on, "ended": clock_time()})  # fmt: skip
        except OSError as error:
            raise TrainingError(f"cannot write {self.path / 'status.json'}: {error.strerror or error}") from error
        self._failure_told = True
        if self.writes:
            append_ended(self.path)

    def _facts(self, *, ended: bool = False) -> dict[str, object]:
        """What status.json says of this attempt, however it ends."""
        return {
            "attempt": self.attempt,
            "num_steps": self.num_steps,
            "from_step": self._from_step,
            "hosts": list(dict.fromkeys(self.hosts)),
            "job": os.environ.get("SLURM_JOB_ID") or None,
            "ranks": len(self.hosts) or None,
            "failed_on": None,
            "began": self._began,
            "ended": clock_time() if ended else None,
        }

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write summary.json.

        Raises:
            TrainingError: the disk is full or failing.
        """
        self._write("summary.json", summary)

    def _write(
        self,
        name: str,
        value: Mapping[str, object],
        write: Callable[[Path, Mapping[str, object]], None] = write_json,
    ) -> None:
        if self.writes:
            try:
                write(self.path / name, value)
            except OSError as error:
                raise TrainingError(f"cannot write {self.path / name}: {error.strerror or error}") from error


def check_files(run_dir: Path) -> None:
    """Refuse a run directory in which something else has the name of one of a run's files or folders.

    Raises:
        ConfigError: naming the first one.
    """
    for name in (*FILES, *FOLDERS):
        path, is_kind, kind = run_dir / name, *((S_ISREG, "file") if name in FILES else (S_ISDIR, "folder"))
        if os.path.lexists(path) and not is_kind(path.lstat().st_mode):
            got = f"a symbolic link to {os.readlink(path)}" if path.is_symlink() else None
            old = shlex.quote(f"{path}.old")
            raise ConfigError(f"{path} is not a regular {kind}", expected=f"the {kind} itself, or none", got=got,
                              fix=f"mv {shlex.quote(str(path))} {old}")  # fmt: skip


def new_path(recipe: str) -> Path:
    """runs/RECIPE/DATE_TIME, which does not exist."""
    parent = Path("runs") / recipe
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    taken = len(list(parent.glob(f"{stamp}*")))
    return parent / (stamp + (f"_{taken + 1}" if taken else ""))


def holds_run(path: Path) -> bool:
    """True for a directory in which a run was started, or that has the checkpoints of one.

    Raises:
        ConfigError: it may not be looked at, or its checkpoints cannot be listed.
    """
    refuse_hidden(path / "config.json", path)
    return (path / "config.json").exists() or bool(list_checkpoints(path / "checkpoints"))


def refuse_hidden(path: Path, run_dir: Path) -> None:
    """Refuse a run directory of which this user may not know whether `path` is there.

    Raises:
        ConfigError: naming the directory.
    """
    try:
        path.stat()
    except PermissionError as error:
        raise ConfigError(f"--run-dir {run_dir} may not be looked at", expected="a directory that you may read",
                          got=error.strerror, fix="--run-dir runs/NAME") from error  # fmt: skip
    except OSError:
        return  # nothing there, as the next check says


def probe(folder: Path) -> None:
    """Write and remove a file; OSError where that is not possible, before the first step and not at the first save."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{TEMPORARY}probe-") as file:
        file.write(b"distkit")


def check_usable(path: Path, *, resumes: bool) -> None:
    """Refuse a path that cannot hold a run, and, unless it `resumes`, one that already does.

    Raises:
        ConfigError: naming the directory and what to type.
    """
    refuse_hidden(path, path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--run-dir {path} is a file", expected="a directory, or a path that does not exist",
                          fix=f"--run-dir {path}-run")  # fmt: skip
    if not resumes and holds_run(path):
        raise ConfigError(
            f"--run-dir {path} already holds a run",
            expected="an empty directory, or a path that does not exist",
            got="--resume never",
            fix=f"--run-dir {path}-2, or --resume auto to go on with it",
        )
    parent = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"--run-dir {path} cannot be made", expected="a place where you may write",
                          got=f"{parent} is not writable", fix="--run-dir runs/NAME")  # fmt: skip
