"""The `distkit` command: answers on a login node, without torch, in a moment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from distkit.commands import checkpoint, data, generate, show, verify_resume
from distkit.commands.parser import Answer
from distkit.errors import ConfigError, DistkitError, nearest
from distkit.version import __version__

USAGE = f"""distkit {__version__}: a training run that is the same run everywhere

usage: distkit COMMAND [ARGUMENTS]

  show RUN_DIR            how a run stands: state, step, last and best evaluation
  version                 print the version
  data pack FOLDER OUT    images into one memory-mapped file a split; --help
  data show FILE          what a packed file holds
  data verify FILE        compare it with its checksums
  checkpoint list RUN     what a run has saved
  checkpoint show PATH    what a checkpoint holds
  checkpoint verify PATH  compare it, bit by bit, with what was written
  checkpoint diff A B     the first tensors that differ, and by how much
  checkpoint digest PATH  one number for its weights and its optimizer
  checkpoint prune RUN    remove old ones; --help
  checkpoint export PATH OUT.safetensors
                          its weights for other programs; --help
  generate RUN            text from a run of a language model; --help
  verify-resume RECIPE    kill a run of it, resume it, compare it with one never killed

PATH is a checkpoint, or a run: then its newest one. A recipe is run by itself:
  accelerate launch recipes/cifar10.py --help
"""


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Do what `argv` says; the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if argv else 2
    try:
        name, *args = argv
        if name not in COMMANDS:
            raise ConfigError(f"distkit has no command {name}", expected=", ".join(COMMANDS), got=name,
                              fix=f"distkit {nearest(name, COMMANDS) or '--help'}")  # fmt: skip
        answer = COMMANDS[name](args)
    except DistkitError as error:
        print(f"distkit: error: {error}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"distkit: error: {error.filename} cannot be read: {error.strerror}", file=sys.stderr)
        return ConfigError.exit_code
    text, code = answer if isinstance(answer, Answer) else (answer, 0)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def version(args: Sequence[str]) -> str:
    """The version of distkit."""
    if args:
        raise ConfigError("distkit version takes no argument", got=" ".join(args), fix="distkit version")
    return __version__


#: By its first word. Each gives the text to print, with an exit code where that is not 0.
COMMANDS: Mapping[str, Callable[[Sequence[str]], str | Answer]] = {
    "show": show.command,
    "version": version,
    "data": data.command,
    "checkpoint": checkpoint.command,
    "generate": generate.command,
    "verify-resume": verify_resume.command,
}
