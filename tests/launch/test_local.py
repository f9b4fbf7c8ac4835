"""launch/local.sh: exit codes, signals, grace, nothing left. Real processes; most recipes here know no torch."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.harness import ROOT, Ended, run_recipe_cli
from support.launching import LAUNCH, TINY, alive, ended, environment, run, started, write_text

LOCAL = str(LAUNCH / "local.sh")
PACED = ROOT / "tests" / "support" / "paced.py"
#: `recipe.py MODE`: writes ready.RANK, then does what MODE says; notes.RANK tells which signals came.
RECIPE = """
import os, signal, subprocess, sys, time

rank, mode = int(os.environ.get("RANK", 0)), sys.argv[1]


def came(number, frame):
    with open(f"notes.{rank}", "a") as file:
        file.write(signal.Signals(number).name + "\\n")
    if mode == "stop":
        sys.exit(75)
    if mode == "obey" or (mode == "one obeys" and rank == 0):
        sys.exit(128 + number)


if mode != "plain":
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        signal.signal(getattr(signal, name), came)
if mode == "ok":
    print("out", rank, sys.argv[2:], os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_RANK"))
    print("err", rank, file=sys.stderr)
    sys.exit(0)
if mode == "leave":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    sys.exit(0)
if mode in ("fail", "fail then end") and rank == 1:
    sys.exit(3)
open(f"ready.{rank}", "w").close()
if mode == "fail then end":
    time.sleep(1)
    sys.exit(4)
while True:
    time.sleep(0.05)
"""


#: A run in `--run-dir DIR` whose attempts end as the first argument says: state, exit code, retryable and the step of
#: the newest checkpoint of each. Rank 0 writes, and rank 1 is the one that fails.
ATTEMPTS = """
import json, os, sys, time
from pathlib import Path

run_dir, port = Path(sys.argv[-1].removeprefix("--run-dir=")), os.environ["MASTER_PORT"]
word = Path(f"word.{port}")
if os.environ["RANK"] == "0":
    status = run_dir / "status.json"
    number = 1 + (json.loads(status.read_text())["attempt"] if status.exists() else 0)
    state, code, retryable, step = sys.argv[1].split(",")[number - 1].split()
    (run_dir / "checkpoints" / f"step-{int(step):09d}").mkdir(parents=True, exist_ok=True)
    said = {"state": state, "step": int(step), "reason": "a test", "retryable": retryable == "yes", "attempt": number}
    status.write_text(json.dumps(said))
    print(port, flush=True)
    Path("word.tmp").write_text(code)
    os.rename("word.tmp", word)
while not word.exists() or word.read_text() == "wait":
    time.sleep(0.02)
if os.environ["RANK"] == "0" and word.read_text() != "0":
    time.sleep(0.5)
sys.exit(int(word.read_text()))
"""


def write(folder: Path) -> str:
    (folder / "recipe.py").write_text(RECIPE)
    return "recipe.py"


def ready(folder: Path, ranks: int = 2) -> None:
    deadline = time.monotonic() + 20
    while len(list(folder.glob("ready.*"))) < ranks:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def signalled(folder: Path, mode: str, *signals: signal.Signals, grace: str = "20") -> tuple[Ended, float]:
    """Two ranks of `mode`, and what came of sending the launcher `signals`; and how many seconds it took."""
    command = [LOCAL, "-n", "2", write(folder), mode]
    with started(command, folder, environment({"GRACE_SECONDS": grace}), folder / "run") as process:
        ready(folder)
        begin = time.monotonic()
        for count, number in enumerate(signals, 1):
            process.send_signal(number)
            # one after the other: signals that wait together become one
            while process.poll() is None and min(map(len, notes(folder))) < count and time.monotonic() < begin + 20:
                time.sleep(0.02)
        process.wait(30)
        took = time.monotonic() - begin
    return ended(process, folder / "run"), took


def notes(folder: Path) -> list[list[str]]:
    files = [folder / f"notes.{rank}" for rank in (0, 1)]
    return [file.read_text().split() if file.exists() else [] for file in files]


def test_both_ranks_run_and_their_output_is_theirs(tmp_path: Path) -> None:
    outer = {"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "7"}
    done = run([LOCAL, "-n", "2", write(tmp_path), "ok", "-n", "a b"], tmp_path, environment(outer))
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"out {rank} ['-n', 'a b'] 2 {rank}" for rank in (0, 1)]
    assert sorted(done.stderr.splitlines()) == ["err 0", "err 1"]
    done = run([LOCAL, "-n", "1", "recipe.py", "ok"], tmp_path, environment(outer))
    assert (done.returncode, done.stdout, done.stderr) == (0, "out 0 [] None None\n", "err 0\n")


def test_a_module_in_place_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("import os, sys\nprint(os.environ['RANK'], sys.argv[1:])")
    done = run([LOCAL, "-n", "2", "-m", "module", "-x"], tmp_path, environment())
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["0 ['-x']", "1 ['-x']"])
    done = run([LOCAL, "-n", "2", "-m"], tmp_path, environment())
    assert (done.returncode, "-m MODULE" in done.stderr) == (2, True)


def test_the_ranks_find_each_other_at_a_free_port_or_the_given_one(tmp_path: Path) -> None:
    # a whole line in one write, or those of two ranks mix
    line = "f\"{os.environ['MASTER_ADDR']} {os.environ['MASTER_PORT']}\\n\""
    (tmp_path / "port.py").write_text(f"import os\nos.write(1, {line}.encode())")
    ports = set()
    for _ in range(2):
        first, second = run([LOCAL, "-n", "2", "port.py"], tmp_path, environment()).stdout.splitlines()
        assert first == second
        ports.add(first)
    assert len(ports) == 2
    given = run([LOCAL, "-n", "2", "port.py"], tmp_path, environment({"MASTER_PORT": "12345"}))
    assert given.stdout == "127.0.0.1 12345\n" * 2


def test_the_first_failure_gives_the_code_and_the_others_are_ended(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = run([LOCAL, "-n", "2", write(tmp_path), "fail"], tmp_path, environment({"GRACE_SECONDS": "1"}))
    assert done.returncode == 3
    assert 1 <= time.monotonic() - begin < 10
    assert done.stderr.splitlines() == [
        "launch/local.sh: still running after 1 s, so killed: rank 0",
        "launch/local.sh: rank 1 failed first: exit code 3",
    ]


def test_the_others_may_end_by_themselves(tmp_path: Path) -> None:
    done = run([LOCAL, "-n", "2", write(tmp_path), "fail then end"], tmp_path, environment())
    assert done.returncode == 3
    assert "killed" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_75_stays_75_and_each_signal_reaches_each_rank(tmp_path: Path, number: signal.Signals) -> None:
    done, took = signalled(tmp_path, "stop", number)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")
    assert notes(tmp_path) == [[number.name]] * 2
    assert took < 5


def test_a_signal_that_ranks_live_with_ends_nothing(tmp_path: Path) -> None:
    done, _ = signalled(tmp_path, "obey not", signal.SIGUSR1, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, grace="1")
    assert notes(tmp_path) == [["SIGUSR1", "SIGINT", "SIGUSR1", "SIGTERM"]] * 2
    # SIGTERM means the end: what ignores it is killed
    assert done.returncode == 128 + signal.SIGKILL
    assert "still running after 1 s, so killed: rank 0, 1" in done.stderr


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    done, took = signalled(tmp_path, "one obeys", signal.SIGTERM, grace="1")
    assert done.returncode == 128 + signal.SIGTERM
    assert "killed: rank 1" in done.stderr
    assert 1 <= took < 8


def test_a_rank_without_handlers_dies_of_the_signal(tmp_path: Path) -> None:
    done, _ = signalled(tmp_path, "plain", signal.SIGTERM)
    assert done.returncode == 128 + signal.SIGTERM
    assert "failed first: Terminated" in done.stderr


def test_ctrl_c_comes_once_a_rank(tmp_path: Path) -> None:
    """A terminal signals the whole process group of the launcher."""
    command = [LOCAL, "-n", "2", write(tmp_path), "stop"]
    with started(command, tmp_path, environment(), tmp_path / "run", own_group=True) as process:
        ready(tmp_path)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
    assert process.returncode == 75
    assert notes(tmp_path) == [["SIGINT"]] * 2


def test_a_rank_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    env = environment({"GRACE_SECONDS": "1"})
    with started([LOCAL, "-n", "2", write(tmp_path), "obey"], tmp_path, env, tmp_path / "run") as process:
        ready(tmp_path)
        child = next(c for c in psutil.Process(process.pid).children() if c.environ().get("RANK") == "1")
        child.kill()
        process.wait(30)
    done = ended(process, tmp_path / "run")
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 failed first: Killed" in done.stderr


def test_what_ranks_leave_is_ended_too(tmp_path: Path) -> None:
    done = run([LOCAL, "-n", "2", write(tmp_path), "leave"], tmp_path, environment())
    assert (done.returncode, done.stderr) == (0, "")


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    env = environment({"GRACE_SECONDS": "1"})
    with started([LOCAL, "-n", "2", write(tmp_path), "ignore"], tmp_path, env, tmp_path / "run") as process:
        ready(tmp_path)
        ranks = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
        assert len(ranks) == 2
        process.kill()
        assert psutil.wait_procs(ranks, timeout=10)[1] == []
    assert notes(tmp_path) == [["SIGTERM"]] * 2  # they were asked first


def test_a_link_to_it_works(tmp_path: Path) -> None:
    (tmp_path / "start").symlink_to(LOCAL)
    assert run(["./start", "-n", "1", write(tmp_path), "ok"], tmp_path, environment()).returncode == 0


def test_nohup_holds(tmp_path: Path) -> None:
    write(tmp_path)
    with started(
        ["nohup", LOCAL, "-n", "2", "recipe.py", "stop"], tmp_path, environment(), tmp_path / "run"
    ) as process:
        ready(tmp_path)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert alive(psutil.Process(process.pid))
        process.send_signal(signal.SIGUSR1)
        process.wait(30)
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("argv", "env", "says"),
    [
        ([], {}, "-n N"),
        (["recipe.py"], {}, "-n N"),
        (["-n"], {}, "-n N"),
        (["-n", "two", "recipe.py"], {}, "-n N"),
        (["-n", "0", "recipe.py"], {}, "at least 1"),
        (["-n", "-1", "recipe.py"], {}, "at least 1"),
        (["-n", "2", "--max-restarts"], {}, "how many restarts?"),
        (["-n", "2", "--max-restarts", "-1", "recipe.py"], {}, "0 or more"),
        (["-n", "2", "--max-restarts", "recipe.py"], {}, "--max-restarts 3"),
        (["-n", "2", "--max-restarts", "1", "recipe.py", "ok"], {}, "--run-dir runs/NAME"),
        (["-n", "2"], {}, "a Python file"),
        (["-n", "2", "nowhere.py"], {}, "nowhere.py"),
        (["-n", "2", "--preset", "tiny"], {}, "--preset"),
        (["-n", "2", "recipe.py", "ok"], {"GRACE_SECONDS": "1s"}, "GRACE_SECONDS=30"),
        (["-n", "2", "recipe.py", "ok"], {"MASTER_PORT": "70000"}, "MASTER_PORT=29500"),
        (["-n", "2", "recipe.py", "ok"], {"MASTER_PORT": "http"}, "MASTER_PORT=29500"),
    ],
)
def test_a_wrong_line_ends_with_2_and_says_what_to_type(
    tmp_path: Path, argv: list[str], env: dict[str, str], says: str
) -> None:
    write(tmp_path)
    done = run([LOCAL, *argv], tmp_path, environment(env))
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert 1 < len(done.stderr.splitlines()) < 6


def test_help_says_what_there_is(tmp_path: Path) -> None:
    done = run([LOCAL, "--help"], tmp_path, environment())
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("-n 2 recipes/gpt.py", "--max-restarts N", "GRACE_SECONDS", "MASTER_PORT", "PYTHON"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("endings", "max_restarts", "code", "says"),
    [
        (["failed 3 yes 2", "failed 4 yes 5", "completed 0 - 9"], "3", 0, [
            "attempt 1 of 4: run failed at step 2: a test: it goes on from the checkpoint of step 2",
            "attempt 2 of 4: run failed at step 5: a test: it goes on from the checkpoint of step 5",
        ]),
        (["failed 3 yes 2", "failed 4 yes 5", "completed 0 - 9"], "1", 4, [
            "attempt 1 of 2: run failed at step 2: a test: it goes on from the checkpoint of step 2",
            "attempt 2 of 2: run failed at step 5: a test, and it was started again 1 times: not again",
        ]),
        (["failed 3 yes 2", "failed 4 yes 2", "completed 0 - 9"], "9", 4, [
            "attempt 1 of 10: run failed at step 2: a test: it goes on from the checkpoint of step 2",
            "attempt 2 of 10: run makes no progress, without a new checkpoint since the attempt before: the newest is "
            "that of step 2: it failed at step 2: a test; a shorter --checkpoint.save-every, or more time for the job",
        ]),
        (["failed 3 no 2", "completed 0 - 9"], "3", 3, [
            "attempt 1 of 4: run failed at step 2: a test; after a fix the same command goes on from the checkpoint of "
            "step 2",
        ]),
        (["preempted 75 yes 2", "completed 0 - 9"], "3", 75, []),
        (["failed 2 no 2", "completed 0 - 9"], "3", 2, []),
        (["failed 3 yes 2", "completed 0 - 9"], "0", 3, []),
        (["completed 0 - 9"], "3", 0, []),
    ],
)  # fmt: skip
def test_ranks_are_started_again_while_that_may_help(
    tmp_path: Path, endings: list[str], max_restarts: str, code: int, says: list[str]
) -> None:
    (tmp_path / "attempts.py").write_text(ATTEMPTS)
    command = [LOCAL, "-n", "2", "--max-restarts", max_restarts, "attempts.py", ",".join(endings), "--run-dir", "run"]
    done = run(command, tmp_path, environment())
    assert done.returncode == code
    said = [line.removeprefix("launch/local.sh: ") for line in done.stderr.splitlines()]
    assert [line for line in said if line.startswith("attempt")] == says
    attempts = json.loads((tmp_path / "run" / "status.json").read_text())["attempt"]
    # one more than was said, where the last one needs no word
    assert attempts == len(says) + (not says or code == 0)
    assert len(set(done.stdout.split())) == attempts  # each with another port


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_who_tells_the_launcher_to_stop_is_obeyed(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "attempts.py").write_text(ATTEMPTS)
    argv = ["--max-restarts", "3", "attempts.py", "running wait yes 2,completed 0 - 9", "--run-dir", "run"]
    with started([LOCAL, "-n", "2", *argv], tmp_path, environment(), tmp_path / "run") as process:
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob("word.*")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert "attempt" not in (tmp_path / "run.err").read_text()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["attempt"] == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_restarts_end_with_the_bits_of_a_run_that_was_never_killed(tmp_path: Path) -> None:
    flags = ["--run-dir", "run", "--num-steps", "12"]
    (tmp_path / "undisturbed").mkdir()
    undisturbed = run_recipe_cli(flags, tmp_path / "undisturbed", recipe=PACED, world_size=2)
    assert {one.returncode for one in undisturbed} == {0}
    # once right after a save, so that the run gets on each time
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    faults = {"DISTKIT_FAULT": "after_rename:0:5:kill,after_rename:0:10:kill", "PYTHONPATH": path}
    command = [LOCAL, "-n", "2", "--max-restarts", "2", str(PACED), *flags]
    done = run(command, tmp_path, environment(faults))
    assert done.returncode == 0, done.stderr
    for number, step in ((1, 5), (2, 10)):
        said = f"launch/local.sh: attempt {number} of 3: run failed at step {step}: rank 0 on "
        (line,) = [line for line in done.stderr.splitlines() if line.startswith(said)]
        assert line.endswith(f"it goes on from the checkpoint of step {step}")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["attempt"]) == ("completed", 3)
    digests = [json.loads((folder / "run" / "summary.json").read_text())["state_digest"]
               for folder in (tmp_path, tmp_path / "undisturbed")]  # fmt: skip
    assert digests[0] == digests[1]
    # and where it gets nowhere
    (tmp_path / "stuck").mkdir()
    done = run(command, tmp_path / "stuck", environment({**faults, "DISTKIT_FAULT": "step:1:7:kill"}))
    assert done.returncode == 128 + signal.SIGKILL
    assert "attempt 2 of 3" in done.stderr.splitlines()[-1]
    assert "without a new checkpoint" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_rank_ends_a_run_and_the_same_command_goes_on(tmp_path: Path) -> None:
    recipe = [str(ROOT / "recipes" / "gpt.py"), "--text", str(write_text(tmp_path)), "--run-dir", "run", *TINY]
    command = [
        LOCAL,
        "-n",
        "2",
        *recipe,
        "--num-steps",
        "5",
        "--checkpoint.save-every",
        "2",
        "--checkpoint.async",
        "off",
    ]
    done = run(command, tmp_path, environment({"DISTKIT_FAULT": "step:1:3:kill"}))
    assert done.returncode == 128 + signal.SIGKILL
    # the other rank notices, and has the time to say so; the launcher repeats it
    said, last = done.stderr.splitlines()[-2:]
    host = socket.gethostname()
    assert said.startswith(f"distkit: error (rank 0): rank 1 on {host} was killed by SIGKILL in step 3; ")
    assert last == "launch/local.sh: " + said.removeprefix("distkit: error (rank 0): ")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    done = run(command, tmp_path, environment())
    assert (done.returncode, done.stderr) == (0, "")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["attempt"]) == ("completed", 5, 2)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_wrong_flag_of_the_recipe_stays_2_and_is_said_once(tmp_path: Path) -> None:
    recipe = [str(ROOT / "recipes" / "gpt.py"), "--text", str(write_text(tmp_path)), *TINY]
    wrong = run([LOCAL, "-n", "2", *recipe, "--global-batch-size", "15"], tmp_path, environment())
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("distkit: error") == 1
    assert "Traceback" not in wrong.stderr


def test_an_interpreter_without_distkit_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    python.chmod(0o755)
    done = run([LOCAL, "-n", "1", write(tmp_path), "ok"], tmp_path, environment({"PYTHON": str(python)}))
    assert done.returncode == 2
    assert "has no distkit" in done.stderr
    assert len(done.stderr.splitlines()) == 2
