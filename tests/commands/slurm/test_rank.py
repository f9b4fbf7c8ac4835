"""A rank hears the signals that its launcher ignores."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distkit.runtime.signals import STOP_FILE, STOPPING

PROGRAM = """
import os, signal, sys
print(os.getpid(), sys.argv[1:], [signal.getsignal(number) is not signal.SIG_IGN for number in map(int, sys.argv[2:])])
"""


def test_it_becomes_the_recipe_and_undoes_what_is_ignored(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(PROGRAM)
    numbers = [str(int(number)) for number in STOPPING]

    def ignore() -> None:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    command = [sys.executable, "-m", "distkit.commands.slurm.rank", str(recipe), "a b", *numbers]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=ignore, env=os.environ)
    said, _ = process.communicate(timeout=30)
    assert said == f"{process.pid} {['a b', *numbers]} {[True] * len(numbers)}\n"


#: As a recipe that imports torch: its `main` listens long after the process began.
LATE = """
import os, signal, sys, time
print("begun", flush=True)
time.sleep(1.0)
from distkit.runtime.signals import StopSignals
signals = StopSignals(announces=True)
end = time.monotonic() + 10
while signals.first is None and time.monotonic() < end:
    time.sleep(0.01)
print(signals.first, signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)
"""


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_that_comes_before_the_run_listens_is_not_lost(number: signal.Signals, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(LATE)
    command = [sys.executable, "-m", "distkit.commands.slurm.rank", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    said, told = process.communicate(timeout=30)
    assert said == f"{int(number)} set()\n"
    assert told.startswith(f"distkit: {number.name}: the run stops after this step and saves")


def test_a_file_says_it_to_ranks_that_were_not_there_yet(tmp_path: Path) -> None:
    recipe, file = tmp_path / "recipe.py", tmp_path / "stop"
    recipe.write_text(LATE)
    command = [sys.executable, str(recipe)]
    env = {**os.environ, STOP_FILE: str(file)}
    file.touch()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    said, _ = process.communicate(timeout=30)
    assert said == f"begun\n{int(signal.SIGUSR1)} set()\n"
