"""The `distkit` command. It answers at once on a login node: torch is imported only where tensors are read."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from distkit.commands import checkpoint, data, doctor, drill, generate, jobs, show, slurm, submit, verify_resume
from distkit.commands.parser import Answer, write_out
from distkit.errors import ConfigError, DistkitError, nearest, say
from distkit.version import __version__

USAGE = f"""distkit {__version__}: a training run that is the same run everywhere

usage: distkit COMMAND [ARGUMENTS]

  show RUN_DIR            status of a run: state, step, verdict, last and best evaluation
  jobs [FOLDER]           the runs under a folder: SLURM job, state, step, attempts
  version                 print the version
  data pack FOLDER OUT    pack images for fast reading
  data show OUT/SPLIT     describe a packed split
  data verify OUT/SPLIT   compare every byte of it with its checksums
  data stats FOLDER       mean and std of the images, to normalise them with
  checkpoint list RUN     list the checkpoints of a run
  checkpoint show PATH    describe a checkpoint
  checkpoint verify PATH  compare every byte of a checkpoint with its checksums
  checkpoint diff A B     compare two checkpoints, tensor by tensor
  checkpoint digest PATH  print the state_digest of the weights and the optimizer
  checkpoint prune RUN    remove old checkpoints
  checkpoint export PATH OUT.safetensors
                          export the weights for other programs
  generate RUN            generate text with a trained language model
  doctor                  look for what would fail here: versions, devices, network, limits, disk, signals
  submit RECIPE           train it as a SLURM job, which is checked first
  drill RECIPE            stop and kill a run in each phase, resume it, and compare it with one never disturbed
  slurm options           print the options that this site wants, for sbatch slurm/train.sbatch
  verify-resume RECIPE    kill and resume a run, and compare it with one never killed

PATH is a checkpoint or a run directory, which means its newest checkpoint.
Each command has a --help of its own. To train, run a recipe:
  accelerate launch recipes/cifar10.py --help
"""


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run the command that `argv` names; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        write_out(USAGE)
        return 0 if argv else 2
    try:
        name, *args = argv
        if name not in COMMANDS:
            raise ConfigError(f"distkit has no command {name}", expected=", ".join(COMMANDS), got=name,
                              fix=f"distkit {nearest(name, COMMANDS) or '--help'}")  # fmt: skip
        answer = COMMANDS[name](args)
    except DistkitError as error:
        say(f"distkit: error: {error}")
        return error.exit_code
    except PermissionError as error:
        say(f"distkit: error: {error.filename} cannot be read: {error.strerror}")
        return ConfigError.exit_code
    except KeyboardInterrupt:
        say("distkit: interrupted")
        return 128 + signal.SIGINT
    answer = answer if isinstance(answer, Answer) else Answer(answer, 0)
    if answer.text:
        write_out(f"{answer.text}\n", as_it_is=answer.as_it_is)
    return answer.exit_code


def version(args: Sequence[str]) -> str:
    """The version of distkit."""
    if args:
        raise ConfigError("distkit version takes no argument", got=" ".join(args), fix="distkit version")
    return __version__


#: Each returns the text to print, with an exit code where that may be other than 0.
COMMANDS: Mapping[str, Callable[[Sequence[str]], str | Answer]] = {
    "show": show.command,
    "jobs": jobs.command,
    "version": version,
    "data": data.command,
    "checkpoint": checkpoint.command,
    "generate": generate.command,
    "doctor": doctor.command,
    "submit": submit.command,
    "drill": drill.command,
    "slurm": slurm.command,
    "verify-resume": verify_resume.command,
}
