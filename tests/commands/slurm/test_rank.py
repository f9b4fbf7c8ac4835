"""A rank hears the signals that its launcher ignores."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from distkit.commands.slurm.rank import STOPPING

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
