"""Two nodes, and the link between them is cut in the middle of a run: both ends, and the same command goes on (C6)."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.harness import ROOT, Ended, free_port, run_recipe_cli
from support.launching import environment, started
from support.network import INTERFACE, Network, connected, why_impossible

RECIPE = ROOT / "tests" / "support" / "paced.py"
TIMEOUT_SECONDS = 6
#: What a rank may take beyond --timeout-seconds to look for the cause and to leave.
LEAVE_SECONDS = 30
FLAGS = [
    "--run-dir", "run", "--num-steps", "40", "--pause-seconds", "0.1", "--timeout-seconds", str(TIMEOUT_SECONDS),
    "--checkpoint.enabled", "--start-timeout-seconds", "30",
]  # fmt: skip


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := why_impossible():
        pytest.skip(reason)
    with connected(2) as made:
        yield made


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended = run_recipe_cli([*FLAGS, "--pause-seconds", "0"], folder, recipe=RECIPE, world_size=2)
    assert [done.returncode for done in ended] == [0, 0]
    return digest(folder)


def train(
    network: Network,
    folder: Path,
    during: Callable[[], None] = lambda: None,
    patience: float = 120,
    interface: str = INTERFACE,
) -> list[Ended]:
    """One rank on each node, started as srun does; how each ended, within `patience` seconds after `during`.

    What is left of one is an error.
    """
    port = free_port()
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(2):
            env = environment({
                "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": network.address(0), "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": interface,
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            })  # fmt: skip
            command = network.command(rank, [sys.executable, str(RECIPE), *FLAGS])
            processes.append(stack.enter_context(started(command, folder, env, folder / f"{rank}")))
        during()
        for process in processes:
            process.wait(patience)
    streams = [[(folder / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(2)]
    return [Ended(process.returncode, *texts) for process, texts in zip(processes, streams, strict=True)]


def wait_for_step(folder: Path, step: int) -> None:
    """Until the run has reported `step`."""
    deadline = time.monotonic() + 120
    while f'"step": {step},' not in read(folder / "run" / "metrics.jsonl"):
        assert time.monotonic() < deadline, read(folder / "0.err")
        time.sleep(0.05)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def digest(folder: Path) -> str:
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "completed"
    return str(json.loads((folder / "run" / "summary.json").read_text())["state_digest"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("how", ["drop-0", "down-0", "down-1"])
def test_a_link_that_is_cut_ends_both_sides_and_the_same_command_goes_on(
    tmp_path: Path, network: Network, uninterrupted: str, how: str
) -> None:
    kind, _, node = how.partition("-")
    cut, mend = (network.drop, network.restore) if kind == "drop" else (network.take_down, network.take_up)

    def cut_in_the_middle() -> None:
        wait_for_step(tmp_path, 12)
        cut(int(node))

    ended = train(network, tmp_path, cut_in_the_middle, patience=TIMEOUT_SECONDS + LEAVE_SECONDS)
    for rank, done in enumerate(ended):
        other = f"rank {1 - rank} on node{1 - rank}"
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"distkit: error (rank {rank}): {other}: no sign of life since ")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["retryable"], status["attempt"]) == ("failed", True, 1)
    assert status["cause"]["host"] in ("node0", "node1")
    assert not (tmp_path / "run" / "summary.json").exists()

    mend(int(node))
    assert [done.returncode for done in train(network, tmp_path)] == [0, 0]
    assert "resumed from" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert digest(tmp_path) == uninterrupted


@pytest.mark.slow
@pytest.mark.distributed
def test_an_interface_that_does_not_lead_to_the_other_node(tmp_path: Path, network: Network) -> None:
    """The ranks meet at rank 0's store, and then cannot connect to each other."""
    for rank, done in enumerate(train(network, tmp_path, interface="lo")):
        assert done.returncode == 1
        said = done.stderr.splitlines()[-1]
        assert f"rank {rank} on node{rank} met the others at {network.address(0)}:" in said
        assert "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the one between them" in said
    assert not (tmp_path / "run").exists()
