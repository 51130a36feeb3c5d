"""The rooms of the package: imports go one way, and the front door opens no extra."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradreg

SOURCE = Path(gradreg.__file__).parent
RANKS = {
    "_install": -1,
    "_vectors": 0,
    "functional": 1,
    "training": 2,
    "theory": 2,
    "curvature": 2,
    "integrations": 3,
    "lab": 4,
    "studies": 5,
}
RANKS |= {"cli": 6, "__main__": 7}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
EXTRAS = (
    "cloudpickle rich matplotlib sklearn scipy optuna yaml safetensors jinja2 cyclopts mnist1d "
    "transformers lightning trl sentence_transformers skorch verl"
)


def room(parts):
    return parts[0].removesuffix(".py")


def imported_rooms(path):
    """The rooms of gradreg that a file names in an import, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from gradreg import x` names a room only if x is one.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            head, *rest = name.split(".")
            if head == "gradreg" and rest and rest[0] in RANKS:
                yield rest[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    here = room(path.relative_to(SOURCE).parts)
    for there in imported_rooms(path):
        assert there == here or RANKS[there] < RANKS[here], f"{here} imports {there}"


# Within the laboratory: task, method → run → player → search → comparison → page → commands.
LAB = (
    "folder names output methods stats metric words tables figures labels page progress yaml_file records about jobs",
    "trackers config search",
    "data models randomness processes rows",
    "attach loop objective task",
    "tasks task_names",
    "train runs batched sharpness",
    "player cost",
    "study",
    "report",
    "sweep",
    "comparison",
    "commands __init__",
)
FLOORS = {name: floor for floor, names in enumerate(LAB) for name in names.split()}
LAB_FILES = [path for path in FILES if path.is_relative_to(SOURCE / "lab")]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if node.module == "gradreg.lab":
                yield from (alias.name for alias in node.names)
            elif parts[:2] == ["gradreg", "lab"]:
                yield parts[2]


def test_every_room_of_the_laboratory_has_a_floor():
    rooms = {room(path.relative_to(SOURCE / "lab").parts) for path in LAB_FILES}
    assert rooms == set(FLOORS)


@pytest.mark.parametrize("path", LAB_FILES, ids=lambda path: str(path.relative_to(SOURCE / "lab")))
def test_the_nouns_of_the_laboratory_are_imported_one_way(path):
    here = room(path.relative_to(SOURCE / "lab").parts)
    for there in imported_modules(path):
        if there in FLOORS:
            assert FLOORS[there] <= FLOORS[here], f"{here} imports {there}"


def test_the_walk_finds_imports():
    found = {there for path in (SOURCE / "training").glob("*.py") for there in imported_rooms(path)}
    assert found == {"_vectors", "functional", "training"}


def test_importing_the_package_loads_torch_alone():
    code = f"""
import sys, torch
before = set(sys.modules)
import gradreg
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new & set({[*EXTRAS.split(), "numpy", "accelerate", "deepspeed"]!r})))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []


def test_the_public_list_is_sorted_and_complete():
    public = {
        n for n, v in vars(gradreg).items() if not n.startswith("_") and "gradreg" in getattr(v, "__module__", "")
    }
    assert gradreg.__all__ == sorted(gradreg.__all__)
    assert public <= set(gradreg.__all__)
    assert all(hasattr(gradreg, name) for name in gradreg.__all__)


@pytest.mark.parametrize("module", [gradreg.functional, gradreg.training], ids=lambda m: m.__name__)
def test_the_list_of_a_room_is_sorted_and_complete(module):
    public = {n for n, v in vars(module).items() if not n.startswith("_") and isinstance(v, type)}
    assert module.__all__ == sorted(module.__all__)
    assert public <= set(module.__all__)
