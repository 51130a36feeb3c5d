"""Install lines: every one that a page or a message shows is made in one place, and its extras exist."""

import re
import sys
from pathlib import Path

import pytest

from gradreg import _install

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = sorted((ROOT / "src").rglob("*.py"))


def lines(path):
    """The install commands of gradreg itself in a text: of the clone, of the index, of a wheel."""
    for command in re.findall(r"pip install [^`\n]+", path.read_text(encoding="utf-8")):
        if re.search(r"install (-c \S+ |-e )?'?(\.|gradreg)", command):
            yield re.sub(r"install (-c \S+ |-e )", "install ", command).split("' ")[0].split("  ")[0].rstrip("',. ")


def extras():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = ", table, re.MULTILINE))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_install_as_the_package_can_be_had_today(path):
    for line in lines(path):
        if path.name == "install.md" and line == "pip install 'gradreg[lab]":  # said of where it is installed already
            continue
        named = re.findall(r"[\w-]+", line.split("[")[1]) if "[" in line else []
        assert set(named) <= extras(), line
        assert line == _install.install(*named).rstrip("'. "), f"{path.name}: {line}"


def test_the_pages_have_such_lines():
    assert sum(len(list(lines(path))) for path in PAGES) > 10


def test_messages_ask_for_their_line():
    for path in SOURCE:
        found = set(re.findall(r"how\('(\w+)'\)", path.read_text(encoding="utf-8")))
        assert found <= extras(), path
        if path.name != "_install.py":
            assert "install 'gradreg" not in path.read_text(encoding="utf-8"), path


def test_on_the_day_of_release_one_word_changes_the_messages(monkeypatch):
    monkeypatch.setattr(_install, "ON_INDEX", True)
    assert _install.how("lab") == "pip install 'gradreg[lab]'"
    assert _install.install() == "pip install gradreg"


def test_the_module_is_light(monkeypatch):
    """A message about what is missing must not need it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "gradreg._install")
    from gradreg._install import how

    assert how()
