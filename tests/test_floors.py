"""The floors and fences of the design: imports go down, without a cycle; heavy libraries stay behind their doors.

`python tests/test_floors.py` prints the table that CONTRIBUTING.md shows.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "distkit"
FILES = sorted(PACKAGE.rglob("*.py"))


class Floor(NamedTuple):
    """Modules and packages that may import those of lower floors, and each other without import cycles."""

    number: int
    modules: tuple[str, ...]
    what: str
    torch: Literal["no", "yes", "lazily"]


FLOORS = (
    Floor(
        0,
        ("errors", "version", "config", "cli", "schedules", "files", "json_files"),
        "exceptions and exit codes; dataclasses that validate; command line; `step -> multiplier`; atomic writes; "
        "JSON that is read back",
        "no",
    ),
    Floor(1, ("runtime", "tensors"), "process topology, device, seeding, collectives; tensors in pieces", "yes"),
    Floor(
        1,
        ("optim", "losses", "metrics", "models", "data", "ema"),
        "building blocks that recipes combine; they know no engine",
        "yes",
    ),
    Floor(
        2,
        ("strategies",),
        "single, ddp, fsdp, zero: prepare, backward, clip, update, state; the only package that wraps a model",
        "yes",
    ),
    Floor(
        2,
        ("checkpoint", "observers", "recipe", "returned"),
        "how a save and a restore work; where values are reported; what to train, and what its functions return",
        "yes",
    ),
    Floor(3, ("engine",), "the loop, the run's state, resume, endings, evaluation", "yes"),
    Floor(
        4,
        ("assemble", "load", "debug"),
        "from a recipe and a config to a run, in stages; from a run directory to its model; debug mode",
        "yes",
    ),
    Floor(
        5,
        ("entry", "commands", "__init__", "__main__"),
        "from a command line to an exit code; one file a command; the public names",
        "lazily",
    ),
)
#: These are above everything: nothing in distkit imports them.
OUTSIDE = ("recipes", "launch", "slurm", "benchmarks", "tests")
#: Library -> the packages or files that may import it, inside functions only.
FENCES = {
    "accelerate": {"runtime", "strategies"},
    "deepspeed": {"runtime", "strategies"},
    "wandb": {"observers/wandb.py"},
    "torch.utils.tensorboard": {"observers/tensorboard.py"},
    "torchvision": {"data"},
    "torchdata": {"data"},
}
FLOOR_OF = {module: floor for floor in FLOORS for module in floor.modules}


def table() -> str:
    """The floors in Markdown."""
    lines = ["| floor | modules | what they are | may import torch |", "|---|---|---|---|"]
    for floor in FLOORS:
        names = ", ".join(
            f"`{'distkit' if name == '__init__' else name}`" for name in floor.modules if name != "__main__"
        )
        lines.append(f"| {floor.number} | {names} | {floor.what} | {floor.torch} |")
    outside = ", ".join(f"`{name}/`" for name in OUTSIDE)
    lines.append(f"| {FLOORS[-1].number + 1} | {outside} | nothing in `distkit` imports these | yes |")
    return "\n".join(lines)


def module_of(path: Path) -> str:
    """`distkit/engine/fit.py` -> `engine`; `distkit/ema.py` -> `ema`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def file_of(name: str) -> Path | None:
    """The file of a dotted module name of this package."""
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


class Import(NamedTuple):
    """One import statement's module, or a submodule that it names."""

    name: str
    deferred: bool
    """In a function, or for the type checker only."""


@cache
def imports(path: Path) -> frozenset[Import]:
    """Everything that a file imports, also in functions and under TYPE_CHECKING."""

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, deferred) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: write imports in full"
                module = child.module or ""
                submodules = [name for alias in child.names if file_of(name := f"{module}.{alias.name}")]
                yield from (Import(name, deferred) for name in submodules)
                if len(submodules) < len(child.names):
                    yield Import(module, deferred)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from visit(child, deferred or function or typing)

    return frozenset(visit(ast.parse(path.read_text()), deferred=False))


def inner_imports(path: Path) -> set[Path]:
    """Files of this package that a file imports."""
    names = {found.name for found in imports(path) if found.name.split(".")[0] == "distkit"}
    files = {name: file_of(name) for name in names}
    assert None not in files.values(), f"{path} imports what does not exist: {files}"
    return {file for file in files.values() if file is not None}


def cycle(graph: Mapping[str, set[str]]) -> str:
    """A cycle of a graph as `a -> b -> a`, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    mine = module_of(path)
    assert mine in FLOOR_OF, f"give {mine} a floor"
    higher = {module_of(file) for file in inner_imports(path)} - {mine}
    higher = {name for name in higher if FLOOR_OF[name].number > FLOOR_OF[mine].number or name == "__init__"}
    assert not higher, f"{path.relative_to(ROOT)} imports from a higher floor"
    assert not {found.name.split(".")[0] for found in imports(path)} & set(OUTSIDE)


def test_files_import_each_other_without_cycles() -> None:
    graph = {str(path.relative_to(ROOT)): {str(f.relative_to(ROOT)) for f in inner_imports(path)} for path in FILES}
    assert not cycle(graph)


def test_packages_import_each_other_without_cycles() -> None:
    """At every depth: `distkit.a` and `distkit.b`, and `distkit.a.x` and `distkit.a.y` too."""
    for folder in {path.parent for path in FILES}:
        graph: dict[str, set[str]] = {}
        for path in FILES:
            if not path.is_relative_to(folder):
                continue
            child = path.relative_to(folder).parts[0]
            inside = {file.relative_to(folder).parts[0] for file in inner_imports(path) if file.is_relative_to(folder)}
            graph.setdefault(child, set()).update(inside - {child})
        assert not cycle(graph), folder.relative_to(ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_stay_behind_their_doors(path: Path) -> None:
    where = str(path.relative_to(PACKAGE))
    for name, deferred in imports(path):
        for library, doors in FENCES.items():
            if name == library or name.startswith(library + "."):
                assert module_of(path) in doors or where in doors, f"{where} imports {library}"
                assert deferred, f"{where} imports {library} before it needs it"
        if name.split(".")[0] == "torch":
            assert FLOOR_OF[module_of(path)].torch != "no", f"{where} imports {name}"


@pytest.mark.parametrize("library", FENCES)
def test_every_fence_guards_something(library: str) -> None:
    names = {found.name for path in FILES for found in imports(path)}
    assert any(name == library or name.startswith(library + ".") for name in names)


def test_every_module_on_a_floor_exists() -> None:
    assert FLOOR_OF.keys() == {module_of(path) for path in FILES}


def test_contributing_shows_these_floors() -> None:
    assert table() in (ROOT / "CONTRIBUTING.md").read_text(), "paste what `python tests/test_floors.py` prints"


def test_nothing_is_committed_beside_the_known_folders() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {name.split("/")[0] for name in tracked.splitlines() if "/" in name}
    assert folders <= {".ci", "benchmarks", "distkit", "docs", "launch", "recipes", "slurm", "tests"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_of_more_than_500_lines_gives_a_reason(path: Path) -> None:
    """In its docstring, in a sentence with the word "lines"."""
    text = path.read_text()
    assert len(text.splitlines()) <= 500 or " lines" in (ast.get_docstring(ast.parse(text)) or "")


def test_engine_asks_no_strategy_for_its_kind() -> None:
    for path in (PACKAGE / "engine").rglob("*.py"):
        text = path.read_text()
        assert "isinstance(strategy" not in text
        assert "isinstance(run.strategy" not in text
        assert "world_size > 1" not in text


def test_fit_and_train_step_fit_on_one_screen() -> None:
    for file, name in (("fit.py", "fit"), ("train_step.py", "train_step")):
        functions = {
            node.name: node
            for node in ast.walk(ast.parse((PACKAGE / "engine" / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        lines = (functions[name].end_lineno or 0) - functions[name].lineno + 1
        assert lines <= 45


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("module", [name for floor in FLOORS if floor.torch != "yes" for name in floor.modules])
def test_what_needs_no_torch_imports_none(module: str) -> None:
    name = "distkit" if module == "__init__" else f"distkit.{module}"
    heavy = run_python(
        f"import sys, {name}\nprint([m for m in ('torch', 'accelerate', 'rich', 'torchvision') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_help_of_the_command_imports_little() -> None:
    """It answers at once on a login node: no heavy library, and few modules of any other."""
    code = (
        "import sys\nbefore = set(sys.modules)\nsys.argv = ['distkit', '--help']\nfrom distkit.commands import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "modules = set(sys.modules) - before\n"
        "heavy = {'torch', 'numpy', 'rich', 'accelerate', 'torchvision', 'safetensors'}\n"
        "print(sorted(modules & heavy), len(modules))"
    )
    *help_, last = run_python(code).splitlines()
    assert "show" in "\n".join(help_)
    heavy, _, count = last.rpartition(" ")
    assert heavy == "[]"
    assert int(count) < 150


if __name__ == "__main__":
    print(table())
