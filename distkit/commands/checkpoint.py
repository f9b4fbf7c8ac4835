"""`distkit checkpoint`: inspect, compare, remove and export checkpoints. Needs neither a GPU nor a process group."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distkit.commands.parser import Answer, Parser, positive
from distkit.errors import ConfigError

PATH = "a checkpoint, or a run directory: its newest checkpoint"


def command(args: Sequence[str]) -> Answer:
    """Inspect, compare, remove and export checkpoints."""
    typed = _parser().parse_args(args)
    return VERBS[typed.verb](typed)


def _parser() -> Parser:
    parser = Parser(
        "distkit checkpoint",
        description="Inspect, compare, remove and export checkpoints. PATH is a checkpoint, or a run directory or "
        "RUN/checkpoints: then its newest checkpoint. Exit codes: 0 done, verified or equal; 1 damaged or different; 2 "
        "wrong arguments.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    _add(verbs, "list", "list the checkpoints of a run", ["run"]).add_argument(
        "--json", action="store_true", help="print JSON"
    )
    _add(verbs, "show", "describe a checkpoint, from its manifest", ["path"]).add_argument(
        "--tensors", action="store_true", help="also each tensor with its dtype, shape and shards"
    )
    _add(verbs, "verify", "compare every byte with the checksums in the manifest", ["path"]).add_argument(
        "--all", action="store_true", help="every checkpoint of the run"
    )
    diff = _add(verbs, "diff", "compare two checkpoints, tensor by tensor", ["first", "second"])
    diff.add_argument("--limit", type=positive, default=10, metavar="N", help="differences to list of each kind (10)")
    _add(verbs, "digest", "print the state_digest of the model and optimizer tensors", ["path"])
    _add_prune(_add(verbs, "prune", "remove old checkpoints of a run that has ended", ["run"]))
    _add_export(_add(verbs, "export", "export the weights as safetensors, for other programs", ["path"]))
    return parser


def _add(verbs: argparse._SubParsersAction[Parser], verb: str, text: str, operands: Sequence[str]) -> Parser:
    parser = verbs.add_parser(verb, help=text, description=text, allow_abbrev=False)
    for operand in operands:
        metavar = {"first": "A", "second": "B"}.get(operand, operand.upper())
        parser.add_argument(operand, metavar=metavar, type=Path, help="a run directory" if operand == "run" else PATH)
    return parser


def _add_prune(parser: Parser) -> None:
    parser.add_argument("--keep-last", type=positive, required=True, metavar="K", help="keep the K newest")
    parser.add_argument("--keep-best", type=positive, metavar="N", help="also keep the N best, by --metric and --mode")
    parser.add_argument("--metric", metavar="NAME", help="name in the evaluation, such as loss")
    parser.add_argument("--mode", choices=["min", "max"], help="whether lower or higher is better")
    parser.add_argument("--keep-every", type=positive, metavar="STEPS", help="also keep multiples of STEPS")
    parser.add_argument("--yes", action="store_true", help="remove them; without it, only list what would be removed")


def _add_export(parser: Parser) -> None:
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the file to write")
    parser.add_argument("--ema", action="store_true", help="export the averaged weights")
    size_help = "split into files of at most this size, such as 5GB, and write OUT.safetensors.index.json"
    parser.add_argument("--max-shard-size", metavar="SIZE", help=size_help)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of floating-point tensors (as saved)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def _list(typed: argparse.Namespace) -> Answer:
    from distkit.commands.tools.list import list_run

    return Answer(list_run(typed.run, as_json=typed.json), 0)


def _show(typed: argparse.Namespace) -> Answer:
    from distkit.commands.tools.list import show

    return Answer(show(typed.path, tensors=typed.tensors), 0)


def _verify(typed: argparse.Namespace) -> Answer:
    from distkit.commands.tools.list import check

    text, sound = check(typed.path, every=typed.all)
    return Answer(text, 0 if sound else 1)


def _diff(typed: argparse.Namespace) -> Answer:
    from distkit.commands.tools.diff import diff

    result = diff(typed.first, typed.second, limit=typed.limit)
    verdict = "equal, bit for bit" if result.equal else "different"
    notes = [f"ignored: {note}" for note in result.notes]
    return Answer("\n".join([*result.tensors, *result.values, *notes, verdict]), 0 if result.equal else 1)


def _digest(typed: argparse.Namespace) -> Answer:
    from distkit.commands.tools.diff import digest

    return Answer(digest(typed.path), 0)


def _prune(typed: argparse.Namespace) -> Answer:
    from distkit.checkpoint.retention import Retention
    from distkit.commands.tools.prune import prune

    best = {"--keep-best": typed.keep_best, "--metric": typed.metric, "--mode": typed.mode}
    missing = [name for name, value in best.items() if value is None]
    if missing and len(missing) < len(best):
        raise ConfigError(f"--keep-best, --metric and --mode go together: {', '.join(missing)} is missing",
                          fix="--keep-best 1 --metric loss --mode min")  # fmt: skip
    retention = Retention(typed.keep_last, typed.keep_best, typed.keep_every)
    return Answer(prune(typed.run, retention, metric=typed.metric, mode=typed.mode, yes=typed.yes), 0)


def _export(typed: argparse.Namespace) -> Answer:
    from distkit.commands.tools.export import export, parse_size

    size = None if typed.max_shard_size is None else parse_size(typed.max_shard_size)
    return Answer(export(typed.path, typed.out, ema=typed.ema, max_shard_bytes=size, precision=typed.dtype,
                         overwrite=typed.overwrite), 0)  # fmt: skip


VERBS: Mapping[str, Callable[[argparse.Namespace], Answer]] = {
    "list": _list, "show": _show, "verify": _verify, "diff": _diff, "digest": _digest, "prune": _prune,
    "export": _export,
}  # fmt: skip
