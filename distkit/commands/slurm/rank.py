"""Becomes a rank: `python -m distkit.commands.slurm.rank RECIPE FLAGS`, which slurm/train.sbatch's launchers start.

The launchers ignore the signals that ask for a stop, because every rank gets them from SLURM itself: a launcher that
handled them, too, would send each a second time and kill its ranks half a minute later. What is ignored would stay
ignored in the ranks. They are blocked until the recipe's `main` listens: one that comes while torch is imported waits.
"""

from __future__ import annotations

import os
import signal
import sys

from distkit.runtime.signals import STOPPING, block_stop_signals

if __name__ == "__main__":
    block_stop_signals()
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, "-u", *sys.argv[1:]])
