"""A rank that is much slower than the others is named with the phase it is slow in; who waits for it is not (C6)."""

import json
import random
import socket
from pathlib import Path

import pytest
from support.harness import ROOT, run_recipe_cli

from distkit.engine.stragglers import REPORTS, Own, Stragglers, others, slow_ranks

HOST = socket.gethostname()
RECIPE = ROOT / "tests" / "support" / "straggling.py"
FLAGS = ["--run-dir", "run", "--report-every", "5", "--checkpoint.enabled", "--checkpoint.save-every", "10"]
DATA = [Own(0.01, 0.1), Own(0.01, 0.1), Own(30.0, 0.1), Own(0.02, 0.12)]
EVEN = [Own(0.01, 0.1), Own(0.01, 0.1), Own(0.02, 0.1), Own(0.01, 0.1)]


def test_the_median_of_the_others() -> None:
    generator = random.Random(0)
    for count in range(2, 9):
        values = [float(generator.randrange(6)) for _ in range(count)]
        for rank, median in enumerate(others(values)):
            rest = sorted(values[:rank] + values[rank + 1 :])
            assert median == (rest[(count - 2) // 2] + rest[(count - 1) // 2]) / 2
    assert others([3.0]) == [3.0]


def test_slow_is_far_above_the_others_and_a_share_of_the_step() -> None:
    assert slow_ranks([1.0, 1.0, 1.0, 2.0], [1.0] * 4, 0.5) == {3: 1.0}
    assert slow_ranks([1.0, 1.0, 1.0, 1.4], [1.0] * 4, 0.1) == {}
    assert slow_ranks([0.01, 0.01, 0.05, 0.01], [1.0] * 4, 0.1) == {}
    # half of the ranks, on one host
    assert slow_ranks([1.0, 5.0, 1.0, 5.0], [1.0] * 4, 0.1) == {1: 1.0, 3: 1.0}
    assert slow_ranks([1.0, 3.0], [1.0] * 2, 0.1) == {1: 1.0}
    assert slow_ranks([3.0], [1.0], 0.1) == {}


def test_a_rank_is_named_once_and_once_more_when_it_is_over() -> None:
    stragglers = Stragglers([f"node{rank}" for rank in range(4)])
    notes = [stragglers.report(DATA, steps=10, seconds=60.0) for _ in range(2 * REPORTS)]
    expected = "rank 2 on node2 is slow in data: 3.00 s of a step of 6.00 s, the others 1.0 ms; look at its disk"
    assert [len(lines) for lines in notes] == [0] * (REPORTS - 1) + [1] + [0] * REPORTS
    assert notes[REPORTS - 1][0].startswith(expected)
    # one good report is not the end of it
    for ranks in (EVEN, DATA, *[EVEN] * (REPORTS - 1)):
        assert stragglers.report(ranks, steps=10, seconds=60.0) == []
    assert stragglers.report(EVEN, steps=10, seconds=60.0) == ["rank 2 on node2 is no longer slow in data"]
    assert [stragglers.report(EVEN, steps=10, seconds=60.0) for _ in range(5)] == [[]] * 5


def test_another_phase_is_another_note() -> None:
    stragglers = Stragglers(["a", "b"])
    compute = [Own(0.0, 1.0), Own(0.0, 0.2)]
    notes = [note for _ in range(REPORTS) for note in stragglers.report(DATA[1:3], steps=10, seconds=60.0)]
    notes += [note for _ in range(REPORTS) for note in stragglers.report(compute, steps=10, seconds=20.0)]
    assert [note.split(":")[0] for note in notes] == [
        "rank 1 on b is slow in data", "rank 1 on b is no longer slow in data", "rank 0 on a is slow in compute",
    ]  # fmt: skip


def test_it_takes_some_reports_in_a_row_steps_and_seconds() -> None:
    for ranks, steps, seconds in ((DATA, 1, 6.0), (DATA, 10, 0.5)):
        stragglers = Stragglers([HOST] * 4)
        assert [stragglers.report(ranks, steps, seconds) for _ in range(REPORTS)] == [[]] * REPORTS
    stragglers = Stragglers([HOST] * 4)
    assert [stragglers.report([DATA, EVEN][i % 2], steps=10, seconds=60.0) for i in range(20)] == [[]] * 20


def test_a_save_is_compared_by_its_bytes() -> None:
    many, few = 2**30, 2**20
    stragglers = Stragglers([HOST] * 3)
    assert [stragglers.save([(30.0, 10 * many), (3.0, many), (3.1, many)]) for _ in range(4)] == [[]] * 4
    assert [stragglers.save([(0.01, few), (0.4, few), (0.01, few)]) for _ in range(4)] == [[]] * 4
    notes = [stragglers.save([(3.0, many), (3.0, many), (12.0, few)]) for _ in range(REPORTS)]
    said = f"rank 2 on {HOST} is slow in save: 12.00 s for its part, the others 3.00 s; look at its way to the"
    assert notes[:-1] == [[]] * (REPORTS - 1)
    assert notes[-1][0].startswith(said)


def notes_of(folder: Path, flags: list[str], env: dict[str, str]) -> list[str]:
    """What four ranks say of each other."""
    ended = run_recipe_cli([*FLAGS, *flags], folder, recipe=RECIPE, world_size=4, env=env, timeout=300)
    assert [done.returncode for done in ended] == [0] * 4, ended[0].stderr
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["message"] for line in lines if line["event"] == "note" and " slow in " in line["message"]]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("phase", "rank", "flags"),
    [
        # the buffers of BatchNorm come from rank 0, so that the others wait for it in their forward
        ("data", 0, []),
        ("data", 3, ["--strategy", "zero1"]),
        ("compute", 2, []),
        ("compute", 1, ["--strategy", "fsdp"]),
        ("compute", 3, ["--strategy", "zero3"]),
        ("save", 3, []),
        ("save", 1, ["--checkpoint.asynchronous", "off"]),
    ],
)
def test_a_planted_straggler_is_named(tmp_path: Path, phase: str, rank: int, flags: list[str]) -> None:
    env = {"DISTKIT_FAULT": f"half_shard:{rank}:*:slow"} if phase == "save" else {"SLOW": f"{phase}:{rank}"}
    (note,) = notes_of(tmp_path, ["--num-steps", "40", *flags], env)
    assert note.startswith(f"rank {rank} on {HOST} is slow in {phase}: ")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("run", range(10))
def test_no_verdict_without_one(tmp_path: Path, run: int) -> None:
    strategy = ["ddp", "ddp", "fsdp", "zero1", "zero3"][run % 5]
    assert notes_of(tmp_path, ["--num-steps", "120", "--strategy", strategy, "--seed", str(run)], {}) == []
