"""Every file in launch/ is one that Accelerate reads, says when to use it, and starts what it says, here on the CPU."""

import json
import re
import shlex
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from support.harness import ROOT, free_port
from support.launching import LAUNCH, TINY, ended, environment, run, started, write_text

#: File -> (accelerate's type, strategy, ranks here, what summary.json says of it, options in config.json).
FILES: dict[str, tuple[str, str, int, str, dict[str, object]]] = {
    "cpu_2_processes": ("MULTI_GPU", "auto", 2, "2 ranks (ddp,", {}),
    "single_gpu": ("NO", "auto", 1, "1 rank (single,", {}),
    "ddp": ("MULTI_GPU", "auto", 2, "2 ranks (ddp,", {}),
    "fsdp": ("FSDP", "fsdp", 2, "2 ranks (fsdp: 2 shards, 2 units Block", {"fsdp.cpu_offload": False}),
    "fsdp_offload": ("FSDP", "fsdp", 2, "2 ranks (fsdp: 2 shards, 2 units Block", {"fsdp.cpu_offload": True}),
    "hsdp_2_nodes": ("FSDP", "fsdp", 4, "4 ranks (fsdp: 2 shards x 2 replicas, 2 units", {"fsdp.replicas": 2}),
    "zero1": ("DEEPSPEED", "zero1", 2, "2 ranks (zero1,", {"zero.offload": "none"}),
    "zero2": ("DEEPSPEED", "zero2", 2, "2 ranks (zero2,", {"zero.offload": "none"}),
    "zero3": ("DEEPSPEED", "zero3", 2, "2 ranks (zero3,", {"zero.offload": "none"}),
    "zero3_offload": ("DEEPSPEED", "zero3", 2, "2 ranks (zero3,", {"zero.offload": "parameters"}),
    "multi_node_ddp": ("MULTI_GPU", "auto", 2, "2 ranks (ddp,", {}),
}
CIFAR = [
    "--num-steps", "3", "--global-batch-size", "10", "--eval-batch-size", "500", "--run-dir", "run",
    "--num-threads", "1", "--precision", "fp32",
]  # fmt: skip
MACHINES = {"hsdp_2_nodes": 2, "multi_node_ddp": 2}


def comment(name: str) -> list[str]:
    """The lines above the configuration, without their #."""
    lines = (LAUNCH / f"{name}.yaml").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:first]]


def commands(name: str) -> list[str]:
    """The command lines in a file's comment, each in one line."""
    text = "\n".join(comment(name)).replace("\\\n", " ")
    return [re.sub(" +", " ", line.strip()) for line in text.splitlines() if line.startswith("    ")]


def test_these_files_are_there() -> None:
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_it_and_the_comment_says_when_to_use_it(name: str) -> None:
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    kind, strategy, _, _, _ = FILES[name]
    assert config.distributed_type.value == kind
    assert config.num_machines == MACHINES.get(name, 1)
    assert config.num_processes == {"single_gpu": 1, "cpu_2_processes": 2}.get(name, 8 * config.num_machines)
    if kind == "DEEPSPEED":
        assert strategy == f"zero{config.deepspeed_config['zero_stage']}"
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if config.parallelism_config:
        sizes = [config.parallelism_config[f"parallelism_config_dp_{axis}_size"] for axis in ("replicate", "shard")]
        assert sizes == [config.num_machines, config.num_processes // config.num_machines]
    when, *_ = comment(name)
    assert len(when) > 40
    assert all(f"accelerate launch --config_file launch/{name}.yaml" in line for line in commands(name))
    on_gpus = [line for line in commands(name) if "--preset 124m" in line]
    assert len(on_gpus) == (0 if name == "cpu_2_processes" else MACHINES.get(name, 1))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def here(command: str, text: Path) -> tuple[dict[str, str], list[str]]:
    """A documented command line's variables and words, with this text, this port and few steps."""
    words = shlex.split(command.replace("FILE", str(text)))
    variables = {}
    while "=" in words[0]:
        key, _, value = words.pop(0).partition("=")
        variables[key] = value
    words = [str(ROOT / word) if word.startswith(("recipes/", "launch/")) else word for word in words]
    return variables, [*words, *TINY, "--data.root", str(text.parent), "--run-dir", "run"]


def on_port(words: list[str], port: int) -> list[str]:
    """The same, with its ranks meeting at `port`."""
    return [*words[:2], "--main_process_port", str(port), *words[2:]]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", FILES)
def test_it_starts_what_it_says(name: str, text: Path, tmp_path: Path) -> None:
    _, strategy, ranks, says, options = FILES[name]
    lines = [line for line in commands(name) if "--text" in line]
    assert len(lines) == MACHINES.get(name, 1)
    port, outs = free_port(), [tmp_path / f"machine{number}" for number in range(len(lines))]
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        for line, out in zip(lines, outs, strict=True):
            variables, words = here(line, text)
            processes.append(stack.enter_context(started(on_port(words, port), tmp_path, environment(variables), out)))
        for process, out in zip(processes, outs, strict=True):
            process.wait(120)
            assert process.returncode == 0, ended(process, out).stderr[-4000:]
    assert says in outs[0].with_suffix(".out").read_text()
    assert all(not out.with_suffix(".out").read_text() for out in outs[1:])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert says in summary["device"]
    assert summary["device"].endswith("started by accelerate")
    assert (summary["step"], summary["precision"]) == (20, "bf16")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["strategy"] == strategy
    for option, value in options.items():
        section, _, field = option.partition(".")
        assert config[section][field] == value
    losses = [event["loss"] for event in events(tmp_path / "run") if event["event"] == "train"]
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == ranks


def events(folder: Path) -> list[dict[str, float | str]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


README = (LAUNCH / "README.md").read_text()
CONSOLE = [line for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_the_readme_shows_how_to_start_everywhere() -> None:
    assert len(CONSOLE) >= 12
    in_files = {line for name in FILES for line in commands(name)}
    launched = [line for line in CONSOLE if "accelerate launch" in line]
    assert len(launched) >= 6
    # those that a CPU can run are run with their file above
    assert [line for line in launched if line not in in_files] == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("command", [line for line in CONSOLE if "accelerate launch" not in line])
def test_the_other_commands_of_the_readme_run(command: str, text: Path, tmp_path: Path) -> None:
    variables, words = here(command, text)
    if "--help" in words:
        words = words[: words.index("--help") + 1]
    elif "gpt.py" not in command:
        words = [*words[: words.index("--num-layers")], *CIFAR]
    done = run(words, tmp_path, environment(variables))
    assert done.returncode == 0, done.stderr
    if "--help" in words:
        return
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())["device"]
    said = (
        "1 rank (single" if command.startswith("python") else "2 ranks (fsdp" if "fsdp" in command else "2 ranks (ddp"
    )
    assert facts.startswith(f"cpu, {said}")


def billions(text: str) -> float:
    return float(text.removesuffix(" B"))


def fits(parameters: float, bytes_each: float, memory: float) -> bool:
    """Whether the state takes at most 60 % of a GPU (parameters in 10^9, memory in GB)."""
    return parameters * bytes_each <= 0.6 * memory


def choose(parameters: float, machines: int, gpus: int, memory: float) -> str:
    """The README's rule."""
    if gpus == 1:
        return "single_gpu" if fits(parameters, 16, memory) else "-"
    if machines > 1:
        each = {"multi_node_ddp": 16.0, "hsdp_2_nodes": 16 / gpus, "hsdp_2_nodes, 1 x 16": 16 / gpus / machines}
    else:
        each = {"ddp": 16.0, "zero1": 8 + 8 / gpus, "zero2": 4 + 12 / gpus, "fsdp": 16 / gpus}
    return next((name for name, cost in each.items() if fits(parameters, cost, memory)), "fsdp_offload")


def test_the_decision_table_is_its_arithmetic() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if "|" in line]
    header = next(row for row in rows if row[0] == "parameters")
    machines = [[int(n) for n in cell.removesuffix(" GB").split(" x ")] for cell in header[2:]]
    sizes = [row for row in rows if row[0].endswith(" B")]
    assert len(sizes) >= 6
    for first, total, *cells in sizes:
        parameters = billions(first)
        assert total == f"{16 * parameters:.0f} GB"
        for numbers, cell in zip(machines, cells, strict=True):
            count, gpus, memory = [1, *numbers] if len(numbers) == 2 else numbers
            assert cell == choose(parameters, count, gpus, memory), (first, numbers)
    on_8 = {row[0]: row[-1] for row in rows if len(row) == 6 and row[0].startswith("`")}
    costs = {"single_gpu": 16, "zero1": 8 + 8 / 8, "zero2": 4 + 12 / 8, "zero3": 16 / 8}
    for name, cost in costs.items():
        assert float(next(value for files, value in on_8.items() if f"`{name}`" in files)) == cost
