"""state.json: what a resume needs of it, with types and ranges; `distkit checkpoint verify` and a resume read it here.

Two things are left to the run that takes it up: whether it is the same run (recipe, seed, data, names of the weights),
and the values that a module or an iterable data set has given itself (get_extra_state, state_dict). No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import cast

from distkit.checkpoint.format import Manifest
from distkit.errors import shorten
from distkit.json_files import (
    JsonError,
    a_count,
    a_flag,
    a_number,
    a_text,
    an_amount,
    an_object,
    anything,
    is_count,
    is_number,
    list_of,
    mapping_of,
    optional,
    parse_object,
    record,
    refuse,
)

VERSION = 1
#: What every rank's meter has, besides the recipe's sums and means.
METER = frozenset({"loss", "weight", "samples"})
_BYTES_OF_FLOAT = re.compile("float64:[0-9a-f]{16}")
_RANK = re.compile("(rng|meter|buffer)/([0-9]{5})/(.+)")


def _metric(value: object) -> None:
    """A value of an evaluation; what is not finite is saved as text."""
    if not is_number(value) and value not in ("nan", "inf", "-inf"):
        refuse(value, "a number")


def _real(value: object) -> None:
    """A number, also an infinite one."""
    if type(value) not in (int, float):
        refuse(value, "a number")


def _at_least_one(value: object) -> None:
    """A whole number above 0."""
    a_count(value)
    if value == 0:
        refuse(value, "1 or more")


def _class_name(value: object) -> None:
    if not (isinstance(value, str) and value.isidentifier()):
        refuse(value, "the name of a class")


def _setting(value: object) -> None:
    """A hyperparameter: a number, text, flag or null, or several."""
    parts = value if isinstance(value, list) else [value]
    if any(isinstance(part, list | dict) for part in parts):
        refuse(value, "a hyperparameter")


def _group(value: object) -> None:
    """A group of the optimizer; named are the settings that decide which state there is."""
    mapping_of(_setting)(value)
    record({"param_names": list_of(a_text)},
           may_have={"momentum": a_number, "amsgrad": a_flag, "centered": a_flag,
                     "history_size": a_count})(value)  # fmt: skip


_EVALUATION = optional(mapping_of(_metric))
_SKIP = record(
    {
        "step": a_count,
        "ranks": list_of(a_count),
        "first": a_count,
        "last": a_count,
        "why": a_text,
        "rolled_back": a_flag,
    }
)
#: The named parts of a run's state; those that it may lack are younger than some checkpoints, or not of every run.
_PARTS = record(
    {
        "progress": record({"step": a_count}),
        "trackers": record({"last": _EVALUATION, "best": _EVALUATION}, may_have={"rule": a_text}),
        "clock": record({"seconds": an_amount, "samples": an_amount, "open_seconds": a_number}),
        "observers": mapping_of(a_text),
        "optimizer": record({"class": _class_name, "groups": list_of(_group), "state": mapping_of(an_object)}),
    },
    may_have={
        "plateau": record({"factor": an_amount, "num_bad": a_count}, may_have={"best": _real, "rule": a_text}),
        "early_stop": record({"num_bad": a_count, "rule": a_text}, may_have={"last": _metric, "best": _metric}),
        "skips": record({"skips": list_of(_SKIP)}),
        "extra": an_object,
    },
)  # fmt: skip
_KIND = record(
    {
        "recipe": a_text, "step": a_count, "num_samples": _at_least_one, "parts": _PARTS,
        "config": record({"seed": a_count, "global_batch_size": _at_least_one},
                         may_have={"optim": an_object, "schedule": an_object}),
        "ranks": list_of(record({}, may_have={"data": record({"next": a_count, "loader": anything})})),
    },
    may_have={"data": optional(a_text), "aliases": mapping_of(a_text), "frozen": a_text},
)  # fmt: skip


def parse_state(data: bytes) -> dict[str, object]:
    """The JSON object in a state.json, of which nothing else is known yet.

    Raises:
        JsonError: it is none.
    """
    return parse_object(data, finite=False)  # Python writes, and a module's own state may have, infinity


def check_state(state: Mapping[str, object], manifest: Manifest) -> None:
    """Check that a run like the one that wrote it can go on from `state`.

    Raises:
        JsonError: naming the first value that is missing, or is not what it should be or what `manifest` says.
    """
    version = state.get("version")
    if version != VERSION or isinstance(version, bool):
        newer = is_count(version) and cast(int, version) > VERSION
        raise JsonError(f"has version {version!a:.80}, this distkit reads {VERSION}"
                        + (" (written by a newer distkit: update this one)" if newer else ""))  # fmt: skip
    _KIND(state)
    parts = cast(Mapping[str, Mapping[str, object]], state["parts"])
    says = {"recipe": manifest.recipe, "step": manifest.step}
    for name, expected in says.items():
        if state[name] != expected:
            raise JsonError(f"is for {name} {state[name]!a:.80}, the manifest says {expected!a:.80}")
    if parts["progress"]["step"] != manifest.step:
        raise JsonError(f"is not for step {manifest.step}: parts.progress.step is {parts['progress']['step']}")
    if len(cast(list[object], state["ranks"])) != manifest.world_size:
        raise JsonError(f"is not of {manifest.world_size} ranks")
    for name in ("last", "best"):
        _check_evaluation(f"parts.trackers.{name}", parts["trackers"][name], manifest.step)
    rule, best = parts["trackers"].get("rule"), cast(Mapping[str, object] | None, parts["trackers"]["best"])
    metric = None if rule is None else str(rule).rpartition(" (")[0]
    if best is not None and metric is not None and metric not in best:
        raise JsonError(f"has a parts.trackers.best without {metric!a:.80}, by which it is the best")
    _check_optimizer(parts["optimizer"], manifest)
    _check_ranks(manifest)


def _check_evaluation(where: str, values: object, step: int) -> None:
    if values is not None:
        of = cast(Mapping[str, float], values).get("step")
        if not is_number(of) or not float(of or 0).is_integer() or not 0 <= (of or 0) <= step:
            raise JsonError(f"has {where} of step {of!a:.80}")


def _check_optimizer(structure: Mapping[str, object], manifest: Manifest) -> None:
    """The optimizer updates tensors of the model, and its state has the manifest's tensors."""
    groups = cast(list[Mapping[str, list[str]]], structure["groups"])
    updated = {name for group in groups for name in group["param_names"]}
    state = cast(Mapping[str, Mapping[str, object]], structure["state"])
    odd = {name for name in updated if f"model/{name}" not in manifest.tensors} | (state.keys() - updated)
    if odd or not updated:
        raise JsonError(f"has an optimizer of {min(odd)!a:.80}, which is no weight or in no group" if odd
                        else "has an optimizer of nothing")  # fmt: skip
    described = {
        f"optimizer/{name}"
        for parameter, values in state.items()
        for key, spec in values.items()
        for name in _tensor_names(f"{parameter}/{key}", spec)
    }
    saved = {name for name in manifest.tensors if name.startswith("optimizer/")}
    if described != saved:
        raise JsonError(f"and the manifest differ in the optimizer's tensors: {shorten(sorted(described ^ saved))}")


def _tensor_names(path: str, spec: object) -> Iterator[str]:
    """The tensors of one value in the optimizer's state; see `distkit.optim.state`."""
    kind, value = next(iter(spec.items())) if isinstance(spec, dict) and len(spec) == 1 else ("", None)
    if kind == "list" and isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _tensor_names(f"{path}/{index}", inner)
    elif kind == "sparse":
        record({"shape": list_of(a_count), "coalesced": a_flag})(value)
        yield from (f"{path}/indices", f"{path}/values")
    elif kind == "tensor" and value is True:
        yield path
    elif not (kind == "none" and value is True) and not (kind == "number" and _is_encoded_number(value)):
        raise JsonError(f"describes the optimizer's {path} as {spec!a:.80}")


def _is_encoded_number(value: object) -> bool:
    return is_number(value) or isinstance(value, bool) or \
        (isinstance(value, str) and _BYTES_OF_FLOAT.fullmatch(value) is not None)  # fmt: skip


def _check_ranks(manifest: Manifest) -> None:
    """Of no other ranks are there generators, open sums and buffers; each rank has these sums, or none has."""
    meters: dict[int, set[str]] = {rank: set() for rank in range(manifest.world_size)}
    for name, entry in manifest.tensors.items():
        if name.startswith(("rng/", "meter/", "buffer/")):
            found = _RANK.fullmatch(name)
            odd_shape = found and found[1] == "meter" and entry.shape and not found[3].startswith("sums/")
            if found is None or int(found[2]) >= manifest.world_size or odd_shape:
                raise JsonError(f"is of {manifest.world_size} ranks, and the manifest has a tensor {name[:80]}")
            if found[1] == "meter":
                meters[int(found[2])].add(found[3])
    for rank, names in meters.items() if any(meters.values()) else ():
        odd = METER - names or {name for name in names - METER if not name.startswith(("sums/", "means/"))}
        if odd:
            raise JsonError(f"and the manifest differ in the sums of rank {rank}: {shorten(sorted(odd))}")
