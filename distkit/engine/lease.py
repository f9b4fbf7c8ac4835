"""One run per run directory: the one that trains in it holds the lease. No torch: commands also ask for the holder.

The lease is a POSIX record lock (fcntl(2), F_SETLK) on `lease.json`. The kernel drops it however the
holder dies; forked data workers do not inherit it; NFS supports it. The content of the file only names the holder.

A POSIX lock is also dropped when its process closes *any* descriptor of the file. So the holder must never open
`lease.json` again, not even to read or copy it; this module does not, and other processes may.

Where the file system has no locks, the record in the file is the lease: see `_claim_by_record`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import cast

import psutil

from distkit.errors import ConfigError, say
from distkit.files import open_regular, write_bytes
from distkit.json_files import JsonError, is_count, is_number, parse_object

LEASE = "lease.json"
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
LOCKED = frozenset({errno.EAGAIN, errno.EACCES})
RECORD_BYTES = 4096
#: How long to wait for the name of a holder that has just started, and for `holder`, which locks for an instant.
PATIENCE_SECONDS = 1.0
#: Without locks: how long a process waits before it checks whether another one has overwritten its record.
RECHECK_SECONDS = 0.5
POLL_SECONDS = 0.01
#: The start time of a process is derived from the boot time, which follows corrections of the clock.
CLOCK_TOLERANCE_SECONDS = 2.0


@dataclass(frozen=True)
class Holder:
    """Who wrote a lease: host, process, its start (seconds since 1970), SLURM job or None, since when (ISO 8601)."""

    host: str
    pid: int
    started: float
    job: str | None
    since: str

    def __str__(self) -> str:
        job = "" if self.job is None else f", SLURM job {self.job}"
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    @property
    def is_here(self) -> bool:
        """True when it is, or was, a process of this host."""
        return self.host == socket.gethostname()

    def may_be_alive(self) -> bool:
        """True when this process runs on this host, and for every other host, which cannot be asked."""
        if not self.is_here:
            return True
        try:
            process = psutil.Process(self.pid)
            zombie: bool = process.status() == psutil.STATUS_ZOMBIE
            return not zombie and abs(process.create_time() - self.started) <= CLOCK_TOLERANCE_SECONDS
        except psutil.NoSuchProcess:
            return False

    def how_to_stop(self) -> str:
        """The command that ends it."""
        if self.job is not None:
            return f"scancel {self.job}"
        return f"kill {self.pid}" if self.is_here else f"kill {self.pid} on {self.host}"


class Lease:
    """The right to write a run directory: from `acquire` until `release`, or the end of the process.

    Attributes:
        path: the lease file.
        holder: this process, as the file names it.
        taken_over_from: the holder before, if it died without releasing the lease; else None.
    """

    def __init__(self, path: Path, descriptor: int | None, holder: Holder, before: bytes) -> None:
        self.path = path
        self.holder = holder
        #: An empty file was left by a process that had not become its holder yet.
        self.taken_over_from = None if not before.strip() else str(_parse(before) or "an unknown process")
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, run_dir: Path) -> Lease:
        """Take the lease of `run_dir`, a directory that exists. One process of a run calls it: rank 0.

        Raises:
            ConfigError: another run holds it, in this process or another; or its file cannot be written.
        """
        path = run_dir.resolve() / LEASE
        with _guard:
            other = _held_here(path)
            if other is not None:
                raise ConfigError(f"this process already has a run in {run_dir}", expected="one run per directory",
                                  got=other.holder, fix=f"--run-dir {run_dir}-2, or end that run first")  # fmt: skip
            try:
                lease = _take(run_dir, path)
            except OSError as error:
                raise ConfigError(f"cannot take the lease of {run_dir}", expected="a directory that you can write to",
                                  got=error, fix="--run-dir DIR") from error  # fmt: skip
            _held[path] = lease
        if lease.taken_over_from is not None:
            message = f"took over {run_dir} from {lease.taken_over_from}, which no longer runs"
            say(f"distkit: warning: {message}")
        return lease

    def release(self) -> None:
        """Release the directory. Does nothing the second time, or in a forked child: the parent still holds it."""
        with _guard:
            if _held_here(self.path) is not self:
                return
            del _held[self.path]
            try:
                self._remove()
            except OSError as error:
                say(f"distkit: warning: cannot remove {self.path}: {error}")
            finally:
                if self._descriptor is not None:
                    os.close(self._descriptor)

    def _remove(self) -> None:
        if self._descriptor is None:
            if _parse(_read(self.path)) == self.holder:
                self.path.unlink(missing_ok=True)
            return
        # still locked: whoever gets the lock next finds an empty file, or that its name is another file's
        os.ftruncate(self._descriptor, 0)
        if _is_named(self.path, self._descriptor):
            self.path.unlink(missing_ok=True)


_held: dict[Path, Lease] = {}
_guard = threading.Lock()


def holder(run_dir: Path) -> str | None:
    """Describe the process that holds the lease of `run_dir` now; None when there is none.

    It asks for a shared lock, which a holder's lock refuses without the holder noticing, and releases it at once.
    Nothing is written. If in doubt the lease counts as held: an unreadable file, or another host without locks.
    """
    path = run_dir.resolve() / LEASE
    with _guard:
        held = _held_here(path)
        if held is not None:
            return str(held.holder)
        try:
            descriptor = open_regular(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return f"possibly another process: {error}"
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            record = _parse(_read(descriptor))
            if error.errno in LOCKED:
                return str(record or "a process that has just started")
            return str(record) if record is not None and record.may_be_alive() else None
        finally:
            os.close(descriptor)
    return None


def _held_here(path: Path) -> Lease | None:
    """The lease of `path` that this process holds; a forked child inherits the table and not the locks."""
    lease = _held.get(path)
    return lease if lease is not None and lease.holder.pid == os.getpid() else None


def _take(run_dir: Path, path: Path) -> Lease:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT, 0o644)
        lease = None
        try:
            refused = _lock(descriptor)
            # the one before may have removed the file between open and lock: then its name is another file's
            if refused is None and _is_named(path, descriptor):
                before, me = _read(descriptor), _this_process()
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _to_json(me), 0)
                os.fsync(descriptor)
                lease = Lease(path, descriptor, me, before)
                return lease
        finally:
            if lease is None:
                os.close(descriptor)
        if refused in NO_LOCKS:
            return _claim_by_record(run_dir, path)
        if refused in LOCKED:
            record = _parse(_read(path))
            if (record is not None and record.may_be_alive()) or time.monotonic() >= deadline:
                raise _refusal(run_dir, record)
            time.sleep(POLL_SECONDS)


def _lock(descriptor: int) -> int | None:
    """Lock the whole file without waiting; the error number when another process has it, or where no locks are."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS | LOCKED:
            return error.errno
        raise
    return None


def _claim_by_record(run_dir: Path, path: Path) -> Lease:
    """Without locks: write a record unless a living process has one, and check it again after RECHECK_SECONDS.

    Of several that write at once, the last one wins and the others find its record. A process that is suspended for
    longer than that between reading and writing could become a second holder; only locks exclude this.
    """
    before = _read(path)
    record = _parse(before)
    if record is not None and record.may_be_alive():
        raise _refusal(run_dir, record, None if record.is_here else f"rm {path} if that run is dead")
    me = _this_process()
    write_bytes(path, _to_json(me))
    time.sleep(RECHECK_SECONDS)
    now = _parse(_read(path))
    if now != me:
        raise _refusal(run_dir, now)
    return Lease(path, None, me, before)


def _refusal(run_dir: Path, record: Holder | None, remedy: str | None = None) -> ConfigError:
    options = [f"--run-dir {run_dir}-2", record.how_to_stop() if record else None, remedy, "wait until it ends"]
    return ConfigError(f"--run-dir {run_dir} is in use by another run", expected="one run per directory",
                       got=record or "a process that has just started",
                       fix=", or ".join(option for option in options if option is not None))  # fmt: skip


def _this_process() -> Holder:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    started = psutil.Process().create_time()
    return Holder(socket.gethostname(), os.getpid(), started, os.environ.get("SLURM_JOB_ID") or None, since)


def _to_json(record: Holder) -> bytes:
    return json.dumps(asdict(record), indent=2).encode() + b"\n"


def _parse(content: bytes) -> Holder | None:
    """The record in a lease file; None when it holds none."""
    try:
        value = parse_object(content)
        host, pid, started, job, since = (value[name] for name in ("host", "pid", "started", "job", "since"))
    except (JsonError, KeyError):
        return None
    if not (isinstance(host, str) and is_count(pid) and is_number(started) and isinstance(since, str)):
        return None
    if not (job is None or isinstance(job, str)) or not 0 < cast(int, pid) < 2**31:
        return None
    return Holder(host, cast(int, pid), cast(float, started), job, since)


def _is_named(path: Path, descriptor: int) -> bool:
    """True when `path` is the file that `descriptor` has open."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(file: Path | int) -> bytes:
    """The content of a lease: by its descriptor, or by its path where this process does not hold it."""
    try:
        if isinstance(file, int):
            return os.pread(file, RECORD_BYTES, 0)
        with os.fdopen(open_regular(file, os.O_RDONLY), "rb") as opened:
            return opened.read(RECORD_BYTES)
    except OSError:
        return b""
