"""The floors and fences of the design: imports go strictly down, heavy libraries stay behind their doors."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "distkit"

#: Bottom to top; a module may import from lower rows, and a package from itself.
FLOORS = (
    {"errors", "files"},
    {"config"},
    {"schedules", "permutation"},
    {"runtime"},
    {"optim", "losses", "metrics", "models", "data", "ema"},
    {"strategies", "checkpoint", "observers"},
    {"engine"},
    {"debug"},
    {"cli"},
    {"assemble"},
    {"recipe"},
    {"verify_resume"},
    {"commands"},
)
WITHOUT_TORCH = {"errors", "files", "config", "schedules", "permutation", "cli", "recipe", "verify_resume", "commands"}
FENCES = {
    "accelerate": {"runtime", "strategies"},
    "deepspeed": {"runtime", "strategies"},
    "wandb": {"observers/wandb.py"},
    "tensorboard": {"observers/tensorboard.py"},
    "torch.utils.tensorboard": {"observers/tensorboard.py"},
    "tyro": {"cli"},
    "torchmetrics": {"metrics"},
    "torchvision": {"data"},
    "torchdata": {"data"},
}
FILES = sorted(PACKAGE.rglob("*.py"))
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def room(path: Path) -> str:
    """`distkit/engine/fit.py` -> `engine`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Modules that a file imports while it runs; what stands under TYPE_CHECKING does not run."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: write imports in full"
                module = child.module or ""
                yield module
                if module == "distkit":
                    yield from (f"distkit.{alias.name}" for alias in child.names)
            elif not (top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
                yield from visit(child)

    return visit(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    mine = room(path)
    if mine == "__init__":
        assert not [name for name in imports(path) if name.startswith("distkit")]
        return
    assert mine in LEVEL, f"give {mine} a floor"
    for name in imports(path):
        if name.startswith("distkit."):
            other = name.split(".")[1]
            assert other == mine or LEVEL[other] < LEVEL[mine], f"{mine} imports {other}"
        assert name.split(".")[0] not in {"recipes", "benchmarks", "tests"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_stay_behind_their_doors(path: Path) -> None:
    where = str(path.relative_to(PACKAGE))
    at_import = set(imports(path, top_level_only=True))
    for name in set(imports(path)):
        for library, doors in FENCES.items():
            if name == library or name.startswith(library + "."):
                assert room(path) in doors or where in doors, f"{where} imports {library}"
                assert name not in at_import, f"{where} imports {library} before it needs it"
    if room(path) in WITHOUT_TORCH:
        assert not {name.split(".")[0] for name in at_import} & {"torch", "torchvision"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 320


def test_engine_asks_no_strategy_for_its_kind() -> None:
    for path in (PACKAGE / "engine").glob("*.py"):
        text = path.read_text()
        assert "isinstance(strategy" not in text
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


def test_importing_distkit_imports_no_heavy_library() -> None:
    heavy = run_python(
        "import sys, distkit, distkit.config, distkit.cli, distkit.recipe\n"
        "print([m for m in ('torch', 'accelerate', 'tyro', 'rich', 'torchvision') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_help_of_the_command_needs_no_torch_and_under_a_second() -> None:
    code = (
        "import sys\nsys.argv = ['distkit', '--help']\nfrom distkit.commands import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    run_python(code)  # compile the byte code first
    start = time.perf_counter()
    assert "show" in run_python(code)
    assert time.perf_counter() - start < 1.0
