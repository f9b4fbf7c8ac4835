"""The `distkit` command: answers on a login node, without torch, in a moment."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import distkit
from distkit.errors import ConfigError, DistkitError, nearest

USAGE = f"""distkit {distkit.__version__}: a training run that is the same run everywhere

usage: distkit COMMAND [ARGUMENTS]

  show RUN_DIR            how a run stands: state, step, last and best evaluation
  version                 print the version
  data pack FOLDER OUT    images into one memory-mapped file a split; --help
  data show FILE          what a packed file holds
  data verify FILE        compare it with its checksums

A recipe is run by itself:
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
        print(COMMANDS[name](args))
    except DistkitError as error:
        print(f"distkit: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def show(args: Sequence[str]) -> str:
    """A run directory in a few lines."""
    if len(args) != 1:
        raise ConfigError("distkit show takes one run directory", fix="distkit show runs/RECIPE/RUN")
    folder = Path(args[0])
    status = read_json(folder / "status.json")
    if status is None:
        raise ConfigError(f"{folder} is no run directory", expected="a folder with status.json",
                          fix="distkit show runs/RECIPE/RUN")  # fmt: skip
    lines = [f"{folder}: {status['state']} at step {status['step']}"]
    if status.get("reason"):
        lines.append(f"  reason: {status['reason']}")
    for name, value in (read_json(folder / "summary.json") or {}).items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {number:g}" for key, number in value.items())
        lines.append(f"  {name}: {value}")
    return "\n".join(lines)


def read_json(path: Path) -> dict[str, object] | None:
    """A JSON object, or None when the file does not exist.

    Raises:
        ConfigError: it is not one.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read", expected="a JSON object", got=error) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} cannot be read", expected="a JSON object", got=type(value).__name__)
    return value


def version(args: Sequence[str]) -> str:
    """The version of distkit."""
    if args:
        raise ConfigError("distkit version takes no argument", got=" ".join(args), fix="distkit version")
    return distkit.__version__


class Parser(argparse.ArgumentParser):
    """argparse with this package's errors."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{self.prog}: {message}", expected=" ".join(self.format_usage().split()[1:]),
                          fix=f"{self.prog} --help")  # fmt: skip


def data(args: Sequence[str]) -> str:
    """Pack images, and look at packed files."""
    parser = Parser("distkit data", description="Packed images: one memory-mapped file a split.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="pack|show|verify")
    pack = verbs.add_parser("pack", help="images into OUT/SPLIT.pack; stopped, it goes on where it was",
                            allow_abbrev=False)  # fmt: skip
    pack.add_argument("source", metavar="FOLDER", help="FOLDER/train/CLASS/* and FOLDER/test/CLASS/*, or FOLDER/CLASS/*"
                      " as one split; or cifar10, cifar100, mnist, fashion_mnist")  # fmt: skip
    pack.add_argument("out", metavar="OUT", type=Path, help="folder of the packed files")
    pack.add_argument("--split", nargs="+", choices=["train", "test"], help="which splits (all)")
    pack.add_argument("--root", type=Path, default=Path("data"), metavar="DIR",
                      help="where a set by name is or is downloaded to (data)")  # fmt: skip
    pack.add_argument("--form", choices=["auto", "raw", "encoded"], default="auto",
                      help="pixels, or the files as they are (auto: pixels if all have one size up to 64)")  # fmt: skip
    pack.add_argument("--workers", type=int, metavar="N", help="threads that read images (one a core)")
    pack.add_argument("--check", action="store_true", help="decode every image that is stored as a file")
    pack.add_argument("--overwrite", action="store_true", help="write again, also over something else")
    for verb, text in (("show", "what a packed file holds"), ("verify", "compare a packed file with its checksums")):
        verbs.add_parser(verb, help=text).add_argument("file", metavar="FILE", type=Path)
    typed = parser.parse_args(args)

    from distkit.data import pack as packing

    if typed.verb == "pack":
        return packing.pack(typed.source, typed.out, splits=typed.split, root=typed.root, form=typed.form,
                            num_workers=typed.workers, check=typed.check, overwrite=typed.overwrite)  # fmt: skip
    return packing.show(typed.file) if typed.verb == "show" else packing.verify(typed.file)


COMMANDS: dict[str, Callable[[Sequence[str]], str]] = {"show": show, "version": version, "data": data}


if __name__ == "__main__":
    main()
