"""How a run ends when it fails (C6): one first cause for all ranks, in status.json and on the last line of stderr.

A rank that can still speak publishes its cause before it closes anything. A rank whose collective failed looks for a
published cause, then for a rank whose process is gone, stopped or silent, then for one that is behind. A run that is
stopped on purpose has not failed: see `distkit.engine.preemption`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from distkit.errors import (
    ConfigError,
    DistkitError,
    RankFailedError,
    RankSilentError,
    Stopped,
    TrainingError,
    masked,
    say,
)
from distkit.files import atomic_file
from distkit.runtime.position import PHASE, SAVING, STATE, STEP, WAITS, Peer, Phase, State

if TYPE_CHECKING:
    from distkit.engine.run_dir import RunDirectory
    from distkit.runtime.process import Runtime
    from distkit.runtime.signals import StopSignals

#: How long a rank looks for another's cause before it judges by what it sees: others need as long to publish theirs.
PATIENCE_SECONDS = 3.0
#: A rank without a beat for so long gives no sign of life.
SILENT_SECONDS = 3.5
#: What a collective says when its other end is gone, and when it does not answer; also NCCL and torch's store.
COLLECTIVE = ("gloo", "nccl", "by peer", "c10d")
LATE = ("timed out", "timeout")
RESUMES = "the same command resumes from the last checkpoint, if there is one"
SIGNALS_OF_A_CRASH = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


@dataclass(frozen=True)
class Cause:
    """Why a run failed: the rank that was first, None when all ranks found the same.

    `retryable`: the same command may do better the next time, for nothing in the run itself was wrong.
    """

    rank: int | None
    host: str | None
    phase: str
    step: int
    what_happened: str
    what_to_do: str
    exit_code: int = 1
    retryable: bool = False

    def __str__(self) -> str:
        return f"{self.what_happened}; {self.what_to_do}" if self.what_to_do else self.what_happened

    @property
    def is_configuration(self) -> bool:
        """True when nothing was started yet: such an error is printed and leaves no file."""
        return self.exit_code == ConfigError.exit_code and self.phase == "start-up"

    def to_json(self) -> dict[str, object]:
        """As status.json has it."""
        return {name: value for name, value in asdict(self).items() if name != "exit_code"}


class RunFailedError(DistkitError):
    """A run ended with `cause`; `error` is what this rank raised."""

    def __init__(self, cause: Cause, error: BaseException, rank: int) -> None:
        super().__init__(str(cause))
        self.cause, self.error = cause, error
        self.is_first = cause.rank in (None, rank)


@dataclass
class Ending:
    """What an end needs to know: the run's directory, once it is chosen.

    Attributes:
        ends_process: the process is there for the run: it may be ended while it hangs and all know the cause.
    """

    runtime: Runtime
    directory: RunDirectory | None = None
    ends_process: bool = True
    _forced: threading.Lock = field(default_factory=threading.Lock)

    def end_at_once(self, number: int) -> NoReturn:
        """What the second signal does, in its thread: the last save stands."""
        name, cells = signal.Signals(number).name, self.runtime.position.cells
        who = "the run" if self.runtime.world_size == 1 else f"rank {self.runtime.rank} on {os.uname().nodename}"
        phase, step = cells[PHASE], cells[STEP]
        what = f"{who} was ended at once by a second {name} {phase_words(phase, step)}"
        cause = Cause(self.runtime.rank, os.uname().nodename, phase_name(phase), step, what, RESUMES, 128 + number)
        record(cause, self.runtime, self.directory, None if phase == Phase.START_UP else finished_steps(phase, step))
        say(f"distkit: error: {cause}")
        leave(cause.exit_code)

    def force(self) -> None:
        """End this process from another thread: all know the cause, and it still waits for something else."""
        if not self._forced.acquire(blocking=False):
            return
        cause, position = Cause(**json.loads(self.runtime.heartbeat.cause or "")), self.runtime.position.cells
        step = None if position[PHASE] == Phase.START_UP else finished_steps(position[PHASE], position[STEP])
        self.write_stacks()
        record(cause, self.runtime, self.directory, step)
        say(f"distkit: error (rank {self.runtime.rank}): {cause}")
        if self.ends_process:
            leave(cause.exit_code)

    def write_stacks(self) -> None:
        """Write the stack of each thread into the run directory, or to stderr where there is none yet."""
        if self.directory is None or not self.directory.path.is_dir():
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            return
        with suppress(OSError), atomic_file(self.directory.path / stacks_name(self.runtime.rank)) as file:
            faulthandler.dump_traceback(file)


@contextmanager
def ending_together(runtime: Runtime, signals: StopSignals | None) -> Iterator[Ending]:
    """Inside, whatever ends this rank is told to all ranks and to status.json; afterwards the directory is released.

    Args:
        runtime: this process.
        signals: those that ask for a stop; None for a run that was started from Python.

    Raises:
        RunFailedError: for anything raised inside but Stopped.
    """
    ending = Ending(runtime, ends_process=signals is not None)
    if signals is not None:
        runtime.heartbeat.force = ending.force
        signals.call(runtime.heartbeat.wish, ending.end_at_once)
    try:
        yield ending
    except Stopped as stopped:
        write_error_file(str(stopped), {})
        runtime.close()
        raise
    except BaseException as error:
        cause = first_cause(error, runtime)
        record(cause, runtime, ending.directory)
        runtime.heartbeat.wait_until_all_know(2 * PATIENCE_SECONDS)
        raise RunFailedError(cause, error, runtime.rank) from error
    finally:
        runtime.heartbeat.close()
        if ending.directory is not None:
            ending.directory.release()


def first_cause(error: BaseException, runtime: Runtime) -> Cause:
    """The first cause of the run's end, the same on every rank that can speak; published when this returns.

    Without effect when it is known already. It waits for others at most a few seconds.
    """
    heartbeat = runtime.heartbeat
    runtime.position.cells[STATE] = State.ENDING
    text = heartbeat.ask()
    if text is None:
        late, waited = waits_for_others(error)
        finding = look_for_others(runtime, late) if waited else look_for_the_dead(runtime)
        text = heartbeat.ask(json.dumps(asdict(finding or own_cause(error, runtime))))
    assert text is not None  # there is a proposal at least
    return Cause(**json.loads(text))


def waits_for_others(error: BaseException) -> tuple[bool, bool]:
    """Whether `error` says that another rank was waited for too long, and whether it blames another rank at all."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    texts = [str(link).lower() for link in chain if isinstance(link, RuntimeError)]
    texts = [text for text in texts if any(words in text for words in COLLECTIVE)]
    late = any(words in text for text in texts for words in LATE)
    return late, bool(texts) or isinstance(error, RankFailedError)


def look_for_others(runtime: Runtime, late: bool) -> Cause | None:
    """The cause that another rank publishes in time; else the rank that is gone, stopped, silent or behind.

    Args:
        runtime: this process, whose collective failed.
        late: it waited for as long as --timeout-seconds, so that a rank that runs is to blame, too.
    """
    # a connection is closed by a rank that has given up, and may still be looking for the cause
    end = time.monotonic() + (PATIENCE_SECONDS if late else 3 * PATIENCE_SECONDS)
    while time.monotonic() < end:
        text = runtime.heartbeat.ask()
        if text is not None:
            return Cause(**json.loads(text))
        finding = look_for_the_dead(runtime)
        if finding is not None:
            return finding
        time.sleep(0.1)
    return look_for_the_silent(runtime, late)


def look_for_the_dead(runtime: Runtime) -> Cause | None:
    """The first rank of this host whose process has ended before its run was done."""
    for peer in unfinished(runtime):
        life, status = peer.process()
        if life == "gone":
            return dead(peer, status)
    return None


def look_for_the_silent(runtime: Runtime, late: bool) -> Cause | None:
    """A rank that is stopped, gives no sign of life, or (`late`) is behind the others."""
    running = unfinished(runtime)
    for peer in running:
        if peer.here:  # the thread that looks may hang in a store whose host is stopped
            peer.look()
    for peer in running:
        if peer.process()[0] == "stopped":
            what = f"{{rank}} is stopped (SIGSTOP) {{place}}, no sign of life since {clock(peer.seen)}"
            todo = f"kill -CONT {peer.pid} on {peer.host} before --timeout-seconds would let it continue; {RESUMES}"
            return cause_of(peer, place(peer), what, todo)
    for peer in running:
        if time.monotonic() - peer.seen > SILENT_SECONDS * runtime.heartbeat.beat_seconds:
            what = f"{{rank}}: no sign of life since {clock(peer.seen)}, last seen {{place}}"
            todo = f"see whether {peer.host} is up and reachable; {RESUMES}"
            return cause_of(peer, place(peer), what, todo)
    return look_for_the_stuck(running, runtime.heartbeat.me) if late and running else None


def look_for_the_stuck(suspects: list[Peer], me: Peer) -> Cause:
    """The rank among `suspects` that does not get on, or that no rank does because all wait for each other."""
    working = [peer for peer in suspects if not peer.cells[WAITS]]
    if not working and len(suspects) > 1 - (me in suspects):
        return all_wait(sorted({peer.rank: peer for peer in (*suspects, me)}.values(), key=lambda peer: peer.rank))
    peer = min(working or suspects, key=lambda peer: (stuck_at(peer)[::-1], peer.since))
    seconds, sentence = time.monotonic() - peer.since, f", {peer.sentence}" if peer.sentence else ""
    todo = (f"the stacks of its threads are in {stacks_name(peer.rank)} of the run directory; a longer "
            f"--watchdog-seconds and --timeout-seconds if it is only slow; {RESUMES}")  # fmt: skip
    return cause_of(peer, stuck_at(peer), f"{{rank}} has been {{place}} for {seconds:.0f} s{sentence}", todo)


def all_wait(ranks: list[Peer]) -> Cause:
    """The cause when every rank is in a collective: not in the same one, or it does not end."""
    calls: dict[str, list[str]] = {}
    for peer in ranks:
        calls.setdefault(f"{phase_words(*place(peer))} {peer.sentence}", []).append(str(peer.rank))
    what = "; ".join(f"{'rank' if len(who) == 1 else 'ranks'} {', '.join(who)} {call}" for call, who in calls.items())
    todo = "every rank must call the same collectives in the same order: is one of them under a condition?"
    if len(calls) == 1:
        todo = f"does the network between {', '.join(sorted({peer.host for peer in ranks}))} work? distkit doctor tells"
    phase, step = min(map(place, ranks), key=lambda where: where[::-1])
    return Cause(None, None, phase_name(phase), step, f"all ranks wait for each other: {what}", f"{todo}; {RESUMES}",
                 retryable=len(calls) == 1)  # fmt: skip


def stacks_name(rank: int) -> str:
    """The file in the run directory with the stacks of a rank that was ended while it hung."""
    return f"stacks-rank-{rank}.txt"


def unfinished(runtime: Runtime) -> list[Peer]:
    """The ranks that may be to blame: those that neither left in good order nor look for a cause themselves."""
    return [peer for peer in runtime.heartbeat.peers if peer.cells[STATE] == State.RUNNING]


def dead(peer: Peer, status: int | None) -> Cause:
    """The cause for a process that has ended; `status` as in waitpid(2), None when its launcher has taken that."""
    if status is None:
        what = "{rank} is gone, last seen {place}: it was killed, or ended without a word"
        todo = f"its own output or the launcher may say more; {RESUMES}"
    elif os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        known = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
        what, todo = f"{{rank}} was killed by {known} {{place}}", f"look for who sent it; {RESUMES}"
        if number == signal.SIGKILL:
            todo = f"possibly out of memory: {out_of_memory_hint()}; {RESUMES}"
        elif number in SIGNALS_OF_A_CRASH:
            todo = f"native code crashed: PYTHONFAULTHANDLER=1 shows where; {RESUMES}"
    else:
        what = f"{{rank}} ended with exit code {os.WEXITSTATUS(status)} {{place}}, before the run was done"
        todo = f"something it called ended its process (os._exit); {RESUMES}"
    exited = status is not None and os.WIFEXITED(status)
    return cause_of(peer, place(peer), what, todo, retryable=not exited)


def out_of_memory_hint() -> str:
    """What the memory control group of this process says of the kernel's out-of-memory killer."""
    with suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].rpartition(":")[2].lstrip("/")
        events = (Path("/sys/fs/cgroup") / group / "memory.events").read_text().split()
        kills = int(events[events.index("oom_kill") + 1])
        if kills:
            return f"the kernel has killed {kills} processes of its control group for memory"
    return "check the kernel log (dmesg)"


def own_cause(error: BaseException, runtime: Runtime) -> Cause:
    """What `error` says of this rank."""
    phase, step = Phase(runtime.position.cells[PHASE]), runtime.position.cells[STEP]
    alone, host = runtime.world_size == 1, os.uname().nodename
    who = "the run" if alone else f"rank {runtime.rank} on {host}"
    where = phase_words(phase, step)
    first, *rest = masked(str(error)).splitlines() or [""]
    todo = "; ".join(" ".join(line.split()) for line in rest) if isinstance(error, DistkitError) else ""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    what, code = f"{who} failed {where}: {type(error).__name__}: {first}".rstrip(": ") + masked(notes), 1
    if isinstance(error, DistkitError):
        what, code = f"{who} failed {where}: {first}", error.exit_code
        if error.on_all_ranks:
            return Cause(None, None, phase_name(phase), step, first, todo, code)
    elif isinstance(error, KeyboardInterrupt):
        what, todo, code = f"{who} was interrupted (SIGINT) {where}", RESUMES, 128 + signal.SIGINT
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) and error.code else 1
        what = f"{who} called sys.exit({error.code!r}) {where}, before the run was done"
        todo = f"remove that call from what the recipe runs; {RESUMES}"
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        what = f"{who} ran out of memory {where}: {type(error).__name__}: {first}".rstrip(": ")
        todo = f"a smaller --microbatch-size needs less; {RESUMES}"
    else:
        todo = f"its traceback says where; after a fix {RESUMES}"
    retryable = isinstance(error, RankSilentError)
    return Cause(runtime.rank, host, phase_name(phase), step, what, todo, code, retryable)


def place(peer: Peer) -> tuple[int, int]:
    """Phase and step in which `peer` is, or was."""
    return peer.cells[PHASE], peer.cells[STEP]


def stuck_at(peer: Peer) -> tuple[int, int]:
    """The same for a rank that hangs: perhaps in a save behind its steps, which otherwise wait for that."""
    return (Phase.SAVE, peer.cells[SAVING]) if peer.cells[SAVING] else place(peer)


def cause_of(peer: Peer, where: tuple[int, int], what: str, todo: str, *, retryable: bool = True) -> Cause:
    """The cause when another rank is to blame; `what` has {rank} and {place} in it."""
    words = what.format(rank=f"rank {peer.rank} on {peer.host}", place=phase_words(*where))
    return Cause(peer.rank, peer.host, phase_name(where[0]), where[1], words, todo, retryable=retryable)


def phase_name(phase: int) -> str:
    """As status.json has it."""
    return ("start-up", "data", "step", "evaluation", "save", "end")[phase]


def phase_words(phase: int, step: int) -> str:
    """A phase in a sentence."""
    return (
        "in start-up",
        f"in step {step} (data)",
        f"in step {step}",
        f"in the evaluation after step {step}",
        f"in the save of step {step}",
        "after the last step, at the end of the run",
    )[phase]


def clock(moment: float) -> str:
    """A moment of the monotonic clock as the time of day."""
    return (datetime.now() - timedelta(seconds=time.monotonic() - moment)).strftime("%H:%M:%S")


def finished_steps(phase: int, step: int) -> int:
    """Steps that are done; in a step, the ones before it."""
    return step - 1 if phase in (Phase.DATA, Phase.STEP) else step


def record(cause: Cause, runtime: Runtime, directory: RunDirectory | None, step: int | None = None) -> None:
    """Write `cause` into status.json and into the launcher's error file.

    Rank 0 writes status.json; where rank 0 cannot, the lowest rank that can. A stopped rank 0 still holds the lease, so
    no other run can have begun there.
    """
    # the launcher prints it; of a wrong option there is nothing to learn from where it was refused
    where = str(cause) if cause.is_configuration else masked(traceback.format_exc())
    write_error_file(str(cause), {"py_callstack": where, "cause": cause.to_json()})
    if cause.is_configuration or directory is None:
        return
    able = runtime.is_main_process or runtime.rank == lowest_able(cause, runtime)
    if able and (directory.writes or not runtime.is_main_process):
        try:
            directory.write_failure(cause.to_json(), cause.what_happened, step, exit_code=cause.exit_code)
        except TrainingError as error:
            say(f"distkit: {error}; it is out of date")


def lowest_able(cause: Cause, runtime: Runtime) -> int:
    """The lowest rank that is neither the cause nor gone nor stopped, as this one sees it."""
    others = [peer.rank for peer in runtime.heartbeat.peers if peer.process()[0] == "alive"]
    return min(rank for rank in (*others, runtime.rank) if rank != cause.rank or rank == runtime.rank)


def write_error_file(message: str, extra: Mapping[str, object]) -> None:
    """Tell the launcher, in the form of torch.distributed.elastic, so that it names the cause and not who waited."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not Path(path).exists():
        info = {"timestamp": str(int(time.time())), "py_callstack": "", **extra}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": masked(message), "extraInfo": info}}))


def complain(error: BaseException, rank: int, world_size: int) -> int:
    """Print how the run ended, the first cause last; return the exit code. One message, not one a rank."""
    failed = error if isinstance(error, RunFailedError) else None
    error = error if failed is None else failed.error
    code = failed.cause.exit_code if failed is not None else getattr(error, "exit_code", 1)
    who = "" if world_size == 1 else f" (rank {rank})"
    if isinstance(error, Stopped):
        if rank == 0:
            say(f"distkit: {error}")
    elif isinstance(error, ConfigError) and (failed is None or failed.cause.is_configuration):
        if rank == 0:
            say(f"distkit: error: {error}")
        else:
            # every rank finds the same one; leaving first would let the launcher end rank 0 before it has spoken
            time.sleep(3)
    elif failed is None or not failed.is_first:
        if not isinstance(error, DistkitError) and not waits_for_others(error)[1]:
            say("".join(traceback.format_exception(error)).rstrip())
        say(f"distkit: error{who}: {failed or error}")
    elif isinstance(error, DistkitError) and (world_size == 1 or error.on_all_ranks):
        if rank == 0:  # what all ranks found is on one line, as in status.json
            say(f"distkit: error{who}: {failed if error.on_all_ranks and failed.cause.rank is None else error}")
    else:
        if not isinstance(error, DistkitError | KeyboardInterrupt):
            say("".join(traceback.format_exception(error)).rstrip())
        say(f"distkit: error{who}: {failed}")
    return code


def leave(code: int) -> NoReturn:
    """End this process, also where threads hang and where taking down process groups would abort."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
