"""What is released: the wheel and the source archive are built, checked, installed into an empty folder, and tried."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gradreg

pytest.importorskip("build", reason="needs build")
pytest.importorskip("twine", reason="needs twine")

ROOT = Path(__file__).parents[1]
SMOKE = """
import pathlib, sys, torch, gradreg
from torch import nn

assert pathlib.Path(gradreg.__file__).is_relative_to(sys.argv[1]), gradreg.__file__
assert (pathlib.Path(gradreg.__file__).parent / "py.typed").is_file()
model, x = nn.Linear(3, 1), torch.randn(8, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
regularizer = gradreg.GradientRegularizer(model, 0.1, 0.1)
loss = regularizer.backward(lambda: model(x).square().mean())
optimizer.step()
print(gradreg.__version__, regularizer.measurements()["active_steps"])
"""


def run(*command, cwd, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Built from a copy, so that nothing is left in the sources."""
    here = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, here)
    shutil.copytree(ROOT / "src", here / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    run("-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=here)  # the wheel is made from the archive
    run("-m", "twine", "check", "--strict", *sorted((here / "dist").iterdir()), cwd=here)
    return {path.suffix: path for path in (here / "dist").iterdir()}


def test_both_are_of_this_version_and_small(archives):
    assert set(archives) == {".whl", ".gz"}
    for path in archives.values():
        assert f"gradreg-{gradreg.__version__}" in path.name
        assert path.stat().st_size < 1_500_000


@pytest.mark.parametrize("kind", [".whl", ".gz"])
def test_it_works_where_it_is_installed(archives, kind, tmp_path):
    """Next to the torch that is there: nothing is downloaded."""
    target = tmp_path / "installed"
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", target, archives[kind], cwd=tmp_path)
    path = {"PYTHONPATH": str(target)}
    assert run("-c", SMOKE, target, cwd=tmp_path, **path).split() == [gradreg.__version__, "1.0"]
    assert run("-m", "gradreg", "--version", cwd=tmp_path, **path).strip() == gradreg.__version__
    assert "compare" in run("-m", "gradreg", "--help", cwd=tmp_path, **path)
    ours = {
        str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*") if p.suffix in (".py", ".html", ".json")
    }
    theirs = {str(p.relative_to(target)) for p in target.rglob("*")}
    assert ours <= theirs, sorted(ours - theirs)


def test_the_license_is_in_both(archives):
    with zipfile.ZipFile(archives[".whl"]) as wheel, tarfile.open(archives[".gz"]) as source:
        for names in (wheel.namelist(), source.getnames()):
            assert any(name.endswith("LICENSE") for name in names)


def test_one_version():
    """It lives in gradreg/__init__.py; what else says it agrees."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == gradreg.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(\d[^]]*)\]", changes, re.MULTILINE)[1] == gradreg.__version__
    stable = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    assert f"gradreg is at version {gradreg.__version__}." in stable
