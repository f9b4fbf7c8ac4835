"""Which process this is, under every launcher, and what is refused."""

import pytest

from distkit.errors import LaunchError
from distkit.runtime.topology import Topology, rank_for_messages, read_topology, tasks_per_node, threads_from_env

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}
SRUN = {
    "SLURM_JOB_ID": "71",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "node1,node2",
}


def test_plain_python_is_one_process() -> None:
    assert read_topology({}) == Topology(launcher="python")
    assert read_topology({}).is_main_process


def test_torchrun() -> None:
    assert read_topology(TORCHRUN) == Topology(
        rank=3,
        local_rank=1,
        world_size=4,
        local_world_size=2,
        launcher="torchrun",
        master_addr="node1",
        master_port=29400,
    )


def test_accelerate_over_torchrun_is_named() -> None:
    assert read_topology({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}).launcher == "accelerate"
    assert read_topology({"ACCELERATE_MIXED_PRECISION": "no"}).launcher == "accelerate"


def test_srun() -> None:
    topology = read_topology(SRUN)
    assert (topology.rank, topology.world_size, topology.local_rank, topology.local_world_size) == (2, 3, 0, 1)
    assert (topology.master_addr, topology.master_port, topology.launcher) == ("node1", 20_071, "srun")


def test_srun_ranks_agree_on_the_rendezvous() -> None:
    other = {**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    first, second = read_topology(SRUN), read_topology(other)
    assert (first.master_addr, first.master_port) == (second.master_addr, second.master_port)


def test_mpirun() -> None:
    names = ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
    env = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(names, ["2", "1", "1", "2"], strict=True)}
    topology = read_topology(env)
    assert (topology.rank, topology.world_size, topology.master_addr) == (1, 2, "127.0.0.1")


@pytest.mark.parametrize(
    ("text", "counts"), [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1(x2)", [1, 1]), ("8,4(x2)", [8, 4, 4])]
)
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "started one"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "srun python"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, "srun did not say"),
    ],
)
def test_refused(env: dict[str, str], says: str) -> None:
    with pytest.raises(LaunchError, match=says) as caught:
        read_topology(env)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) < 10


def test_a_slurm_job_of_one_task_needs_no_srun() -> None:
    assert read_topology({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}).world_size == 1


@pytest.mark.parametrize(
    ("env", "rank"),
    [({}, 0), ({"RANK": "3"}, 3), ({"RANK": "x", "SLURM_PROCID": "2"}, 2), ({"OMPI_COMM_WORLD_RANK": "1"}, 1)],
)
def test_the_rank_for_messages_is_read_from_a_launch_that_is_refused(env: dict[str, str], rank: int) -> None:
    assert rank_for_messages(env) == rank


def test_threads_from_the_environment() -> None:
    texts = {"": None, "1": None, "4": 4, "4,2": 4, "0": None}
    assert {text: threads_from_env({"OMP_NUM_THREADS": text}) for text in texts} == texts
    assert threads_from_env({}) is None
    with pytest.raises(LaunchError, match="OMP_NUM_THREADS=many"):
        threads_from_env({"OMP_NUM_THREADS": "many"})
