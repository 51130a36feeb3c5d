"""The code of the pages that are to be copied: every block runs as it stands, and prints what the page says.

A block that begins with an import or a docstring is a script of its own; any other goes on where the one before it
ended, and so do all of the README. The next block of text is what it prints in the end: the same words, and numbers in
the same places (they differ between processors). A block marked `.before` is code for another library, and only read.
"""

import ast
import os
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import gradreg

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/index.md", "docs/tutorial.md", "docs/migrate.md", "docs/recipes.md", "docs/scale.md"]
BLOCK = re.compile(r"^``` ?(python|text|bash|\{ \.python \.before \})\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def scripts(page):
    """Groups of blocks that share their names: lists of [code, what the page says it prints, line]."""
    text = (ROOT / page).read_text(encoding="utf-8")
    groups = []
    for match in BLOCK.finditer(text):
        kind, block = match.groups()
        if kind == "text" and groups and groups[-1][-1][1] is None:
            groups[-1][-1][1] = block
        elif kind == "python":
            if not groups or (page != "README.md" and re.match(r'import |from |"""', block)):
                groups.append([])
            groups[-1].append([block, None, text[: match.start()].count("\n") + 1])
        elif kind.startswith("{"):
            ast.parse(block)
    return groups


CASES = [pytest.param(page, group, id=f"{page}-{group[0][2]}") for page in PAGES for group in scripts(page)]


def words(text):
    """The text without its numbers, and without how wide they are."""
    return re.sub(r"[+−-]?\d[\d.,]*(e[+-]\d+)?", " # ", text).split()


def on_ranks(code, expected):
    """As the page says: torchrun, two processes."""
    Path("train_ranks.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_ranks.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment)
    assert result.returncode == 0, result.stderr
    assert words(result.stdout) == words(expected)


@pytest.mark.parametrize(("page", "group"), CASES)
def test_block_runs(page, group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "init_process_group" in group[0][0]:
        return on_ranks(*group[0][:2])
    monkeypatch.setattr(sys, "argv", ["script.py"])
    names = {"__name__": "__main__"}
    for code, expected, line in group:
        printed = StringIO()
        with redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of hosts, about themselves
            warnings.filterwarnings("error", module="__main__")  # what is said to the one who wrote the script
            # Blank lines before it, so that a traceback names the line of the page.
            exec(compile("\n" * line + code, str(ROOT / page), "exec"), names)
        if expected is not None:
            tail = words(printed.getvalue())[-len(words(expected)) :]  # hosts may talk before it
            assert tail == words(expected), printed.getvalue()


def test_there_are_blocks():
    assert {case.values[0] for case in CASES} == set(PAGES)


def test_what_is_stable_names_all_names():
    text = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8").split("- **What is promised**")[0]
    assert set(re.findall(r"`(\w+)`", text)) == set(gradreg.__all__)


def test_the_tutorial_prints_this_where_gamma_is_zero(tmp_path, monkeypatch):
    """Its first advice: put the lines in with γ = 0."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    code = next(BLOCK.finditer(text))[2]
    off = code.replace("gamma = gradreg.TargetRatio(0.2, ramp=num_steps // 10)", "gamma = 0.0")
    assert off != code
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(off, "tutorial", "exec"), {"__name__": "__main__"})
    shown = BLOCK.search(text, text.index("## Is it off when it is off?"))[2]
    assert words(printed.getvalue()) == words(shown)
    assert "nan" in shown
