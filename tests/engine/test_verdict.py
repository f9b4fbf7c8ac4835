"""Histories of attempts, and what is to be said of each."""

import pytest

from distkit.engine.attempts import Attempt
from distkit.engine.verdict import Kind, judge

TWO = ("node1", "node7")


def done(state: str, saved: int = -1, *, hosts: tuple[str, ...] = ("node1",), retryable: bool | None = True,
         to_step: int | None = None) -> Attempt:  # fmt: skip
    """An attempt that was preempted, killed or completed, or is running; its number comes with its place."""
    step = max(saved, 0) if to_step is None else to_step
    return Attempt(attempt=0, state=state, hosts=hosts, saved=saved, to_step=step, reason=state, retryable=retryable)


def failed(where: int | str, saved: int = -1, *, on: str | None = "node1", hosts: tuple[str, ...] = TWO,
           retryable: bool = False, why: str = "ValueError: x") -> Attempt:  # fmt: skip
    """An attempt that failed in a step or in start-up."""
    phase, step = ("start-up", 0) if where == "start-up" else ("step", where)
    cause = {"rank": 0, "host": on, "phase": phase, "step": step, "what_to_do": "see the traceback"}
    return Attempt(attempt=0, state="failed", hosts=hosts, saved=saved, to_step=int(step), reason=why, cause=cause,
                   failed_on=on, retryable=retryable)  # fmt: skip


def numbered(*attempts: Attempt) -> list[Attempt]:
    return [Attempt(**{**vars(attempt), "attempt": number}) for number, attempt in enumerate(attempts, 1)]


GO = "the same command goes on from the checkpoint of step"
#: Attempts -> the kind of the verdict, whether a scheduler goes on, and words of it.
HISTORIES: dict[str, tuple[list[Attempt], Kind, bool, list[str]]] = {
    "none": ([], "not begun", False, ["was not begun yet"]),
    "running": ([done("running", hosts=TWO)], "running", False, ["is running on node1, node7", "STOP"]),
    "running again": ([failed(7), failed(7), done("running")], "running", False, ["is running on node1"]),
    "completed": ([done("preempted", 5), done("completed", 20)], "finished", False, ["is finished, step 20"]),
    "preempted": ([done("preempted", 5)], "goes on", True, [f"{GO} 5"]),
    "preempted before anything was saved": ([done("preempted")], "goes on", True, ["begins again"]),
    "preempted with progress": ([done("preempted", 5), done("preempted", 9)], "goes on", True, [f"{GO} 9"]),
    "stopped by its owner": ([done("preempted", 5, retryable=False)], "stopped", False, ["by its owner", f"{GO} 5"]),
    "stopped by its owner without progress": (
        [done("preempted", 5), done("preempted", 5, retryable=False)], "stopped", False, [f"{GO} 5"],
    ),
    "killed": ([done("killed", 5)], "goes on", True, [f"{GO} 5"]),
    "killed twice with progress": ([done("killed", 5), done("killed", 10)], "goes on", True, [f"{GO} 10"]),
    "killed twice without": (
        [done("killed", 5), done("killed", 5)], "no progress", False,
        ["without a new checkpoint since the attempt before: the newest is that of step 5", "was killed", "save-every"],
    ),
    "told to stop early twice": ([done("preempted"), done("preempted")], "goes on", True, ["begins again"]),
    "told to stop early, then killed": ([done("preempted"), done("killed")], "no progress", False, ["there is none"]),
    "nothing was ever saved": ([done("preempted")] * 4, "no progress", False, ["in 3 attempts: there is none"]),
    "progress in between": ([done("preempted", n) for n in (5, 5, 6, 6, 6)], "goes on", True, [f"{GO} 6"]),
    "progress came late": ([done("killed"), done("killed", 5)], "goes on", True, [f"{GO} 5"]),
    "failed once": ([failed(7, 5)], "failed", False, ["failed at step 7: ValueError: x", "see the traceback"]),
    "failed once, could not help it": ([failed(7, 5, retryable=True)], "goes on", True, [f"{GO} 5"]),
    "the same step twice": (
        [failed(7, 5), failed(7, 5, why="ValueError: y")], "same step", False,
        ["fails each time in step 7 (2 times)", "ValueError: y", "look at the recipe and at the batch of step 7"],
    ),
    "the same step three times, on other ranks": (
        [failed(7, 5, on="node1"), failed(7, 5, on="node7"), failed(7, 5, on=None)], "same step", False, ["(3 times)"],
    ),
    "the same step with a preemption in between": (
        [failed(7, 5), done("preempted", 6), failed(7, 6)], "same step", False, ["step 7 (2 times)"],
    ),
    "the same step, killed by somebody": (
        [failed(7, 5, retryable=True), failed(7, 5, retryable=True)], "same step", False,
        ["without a new checkpoint since the attempt before: the newest is that of step 5"],
    ),
    "the same step, with a checkpoint in between": (
        [failed(7, 5, retryable=True), failed(7, 6, retryable=True)], "same step", False, ["(2 times): "],
    ),
    "the same step once more, long ago": ([failed(7), failed(9)], "one host", False, ["on node1 (2 times)"]),
    "another step each time": ([failed(7, on="node7"), failed(9)], "failed", False, ["failed at step 9"]),
    "one host each time, with progress": (
        [failed(7, 5, on="node7", retryable=True), failed(12, 10, on="node7", retryable=True)], "one host", True,
        ["fails each time on node7 (2 times)", "#SBATCH --exclude=node7"],
    ),
    "one host each time, without progress": (
        [failed(7, 5, on="node7", retryable=True), failed(8, 5, on="node7", retryable=True)], "one host", False,
        ["node7 (2 times), without a new checkpoint", "#SBATCH --exclude=node7"],
    ),
    "one host, which once did well": (
        [failed(7, 5, on="node7", retryable=True), done("preempted", 9, hosts=TWO),
         failed(12, 10, on="node7", retryable=True)], "goes on", True, [f"{GO} 10"],
    ),
    "one host, while others did well": (
        [failed(7, 5, on="node7", hosts=("node7",), retryable=True), done("preempted", 9),
         failed(12, 10, on="node7", hosts=("node7",), retryable=True)], "one host", True, ["node7 (2 times)"],
    ),
    "the only host there is": (
        [failed(7, 5, hosts=("node1",), retryable=True), failed(12, 10, hosts=("node1",), retryable=True)],
        "goes on", True, [f"{GO} 10"],
    ),
    "nobody is to blame": ([failed(7, 5, on=None), failed(12, 10, on=None)], "failed", False, ["failed at step 12"]),
    "a whole node dies each time, others do not": (
        [done("killed", 5, hosts=("node7",)), done("preempted", 9), done("killed", 12, hosts=("node7",))],
        "one host", True, ["node7 (2 times)"],
    ),
    "one of many nodes dies": (
        [done("killed", 5, hosts=TWO), done("killed", 9, hosts=TWO)], "goes on", True, [f"{GO} 9"],
    ),
    "start-up on one host": (
        [failed("start-up", on="node7"), failed("start-up", on="node7")], "one host", False, ["node7 (2 times)"],
    ),
    "start-up everywhere": (
        [failed("start-up", on="node7"), failed("start-up")], "failed", False,
        ["fails each time in start-up (2 times)", "see the traceback"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HISTORIES)
def test_what_a_history_says(name: str) -> None:
    attempts, kind, goes_on, words = HISTORIES[name]
    verdict = judge(numbered(*attempts))
    assert (verdict.kind, verdict.goes_on) == (kind, goes_on)
    for word in words:
        assert word in str(verdict)
    assert "\n" not in str(verdict)


def test_a_node_that_fails_is_named_also_where_another_verdict_is_first() -> None:
    assert judge(numbered(failed(7, on="node7"), failed(7, on="node7"))).host == "node7"
    assert judge(numbered(failed(7), failed(7, on="node7"))).host is None
