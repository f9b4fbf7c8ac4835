"""What a recipe's author gets wrong, function by function, on the real command line: one message that names it.

Wrong values end with exit code 2, in under ten lines, and leave nothing. What the author's code raises by itself keeps
its traceback and ends with 1. Most run in this process, through the function that the command line calls; some as
real processes, on one rank and on two.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.harness import ROOT, Ended, run_recipe_cli
from support.mistaken import ERRORS, KINDS, VALUES, mistaken

from distkit.entry import launch
from distkit.runtime.process_state import unchanged_process

RECIPE = ROOT / "tests" / "support" / "mistaken.py"
FLAGS = ["--run-dir", "run"]
NUMBERS = {"an integer", "a float"}
SCALARS = {"a number tensor", "a whole number tensor", "a tensor of NaN", "a parameter"}
#: Samples that make a batch, if not one that this recipe's loss can use.
SAMPLES = {"a boolean", "an integer", "a negative number", "a float", "NaN", "infinity", "a tuple", "a list", "a dict",
           "a number tensor", "a whole number tensor", "a tensor of NaN", "a complex tensor", "a vector", "a matrix",
           "an array", "a parameter", "a state dict"}  # fmt: skip
#: Where a value is returned -> how the message may call it, and the kinds that are no mistake there.
PLACES: Mapping[str, tuple[tuple[str, ...], set[str]]] = {
    "build_model": (("build_model",), {"a module"}),
    "build_dataset": (("build_dataset",), {"a data set"}),
    "build_dataset test": (("build_dataset",), {"a data set", "None"}),
    "build_dataset __len__": (("build_dataset", "__len__"), set()),
    "build_dataset fetch": (("Odd.fetch",), set()),
    "build_dataset augment": (("Odd.augment",), set()),
    "build_dataset __getitem__": (
        ("OddSamples.__getitem__", "the data set failed at sample"),
        SAMPLES | {"raises an error of many lines"},  # a RuntimeError, as of a decoder: a damaged sample
    ),
    "build_dataset collate": (("OddBatches.collate", "collate of OddBatches"), set()),
    "build_dataset Iterable.build": (
        ("IterableData", "an iterable data set"),
        {"an iterable set", "a list", "a tuple", "a generator", "an iterator", "a data set"},
    ),
    "build_dataset Iterable.__iter__": (("IterableData",), SAMPLES),
    "build_dataset Iterable.collate": (("IterableData",), set()),
    "build_dataset Iterable.augment": (("IterableData",), set()),
    "build_dataset Iterable.samples_per_epoch": (("IterableData", "samples_per_epoch", "training set"), {"an integer"}),
    "compute_loss": (("compute_loss",), set()),
    "compute_loss test": (("compute_loss",), {"a loss output"}),
    "compute_loss loss": (("compute_loss",), {"a parameter"}),
    "compute_loss sums": (("compute_loss",), {"an empty dict"}),
    "compute_loss sum": (("compute_loss",), SCALARS),
    "compute_loss weight": (("compute_loss",), {"None", "a number tensor", "a whole number tensor", "a parameter"}),
    "build_loss": (("build_loss",), {"a module", "a frozen module", "a module without parameters"}),
    "compute_metrics": (("compute_metrics",), {"an empty dict"}),
    "compute_metrics value": (("compute_metrics",), NUMBERS | SCALARS | {"a negative number", "NaN", "infinity"}),
    "build_param_groups": (("build_param_groups",), set()),
    "build_param_groups group": (("build_param_groups",), set()),
    "build_param_groups params": (("build_param_groups",), set()),
    "build_param_groups lr": (("build_param_groups",), NUMBERS),
    "build_schedule": (("build_schedule",), set()),
    "build_schedule value": (("build_schedule",), NUMBERS),
    "build_schedule later": (("build_schedule",), NUMBERS),
    "resolve_config": (("resolve_config",), {"a configuration"}),
    "init_model_": (("init_model_",), {"None"}),
}  # fmt: skip
#: The methods of a data set: what they raise is told with the sample, without a traceback, by those that read it.
TOLD = ("build_dataset __getitem__", "build_dataset collate")


def flags_of(place: str) -> list[str]:
    one_by_one = "Iterable" in place or place in TOLD
    return [*FLAGS, *(["--eval-every", "None", "--data.num-workers", "1"] if one_by_one else [])]


def check(place: str, kind: str, code: int, said: str, folder: Path) -> None:
    names, lines = PLACES[place][0], said.strip().splitlines()
    if kind in VALUES:
        assert code == 2, said
        assert any(name in said for name in names), said
        assert "Traceback" not in said
        assert len(lines) < 10, said
        assert not list(folder.iterdir())
        return
    assert code == 1, said
    assert ("Traceback" in said) != (place in TOLD), said
    assert place.split(" ")[0] in said or any(name in said for name in names), said
    assert "distkit: error" in said


@pytest.mark.parametrize("place", PLACES)
def test_every_wrong_value_in_this_process(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "Iterable" in place:
        pytest.importorskip("torchdata")
    for number, kind in enumerate(kind for kind in KINDS if kind not in PLACES[place][1]):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        with unchanged_process(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of some of these values
            code = launch(mistaken(place, kind), flags_of(place))
        try:
            check(place, kind, code, capsys.readouterr().err, folder)
        except AssertionError as error:
            raise AssertionError(f"{place} / {kind}: {error}") from error


def start(place: str, kind: str, folder: Path, ranks: int) -> list[Ended]:
    env = {"MISTAKE": f"{place}/{kind}"}
    return run_recipe_cli(flags_of(place), folder, recipe=RECIPE, world_size=ranks, env=env, timeout=120)


SAMPLE = [
    ("build_model", "a tuple"), ("build_dataset", "a loader"), ("build_dataset fetch", "None"),
    ("compute_loss", "a number tensor"), ("compute_loss test", "None"), ("build_param_groups", "an optimizer"),
    ("build_schedule", "a scheduler"), ("resolve_config", "None"), ("init_model_", "a module"),
    *((function, f"raises {error}") for function, error in zip(
        ("build_model", "build_dataset", "compute_loss", "build_schedule", "resolve_config"), ERRORS, strict=True)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("place", "kind"), SAMPLE)
def test_real_processes_end_alike(place: str, kind: str, ranks: int, tmp_path: Path) -> None:
    ended = start(place, kind, tmp_path, ranks)
    assert len({each.returncode for each in ended}) == 1, ended
    said = ended[0].stderr if kind in VALUES else "".join(each.stderr for each in ended)
    check(place, kind, ended[0].returncode, said, tmp_path)
    assert all(each.stdout == "" for each in ended)
    assert all(kind not in VALUES or each.stderr == "" for each in ended[1:])


@pytest.mark.distributed
def test_two_ranks_say_it_once(tmp_path: Path) -> None:
    first, second = start("compute_loss", "a dict", tmp_path, 2)
    check("compute_loss", "a dict", first.returncode, first.stderr, tmp_path)
    assert (second.returncode, second.stdout, second.stderr) == (2, "", "")
