"""In a notebook: a comparison shows as a part of the page, and its progress as one line."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbconvert = pytest.importorskip("nbconvert")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "compare.ipynb"


@pytest.fixture(scope="module")
def executed():
    from nbconvert.preprocessors import ExecutePreprocessor

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    ExecutePreprocessor(timeout=1500, kernel_name="python3").preprocess(
        notebook, {"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    return notebook


def test_the_example_runs_with_a_class_and_functions_of_the_notebook_s_own(executed):
    errors = [o for cell in executed.cells for o in cell.get("outputs", []) if o["output_type"] == "error"]
    assert errors == []
    shown = [o for cell in executed.cells for o in cell.get("outputs", []) if "text/html" in o.get("data", {})]
    assert "tuned plain training" in shown[0]["data"]["text/html"]


def test_the_exported_page_has_no_hundred_frames(executed):
    html, _ = nbconvert.HTMLExporter().from_notebook_node(executed)
    assert "tuned plain training" in html
    frames = re.findall(r"\d+ of \d+", html)
    assert len(frames) <= 3, frames
    assert "\x1b[" not in html


def test_the_stored_notebook_holds_no_output():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in stored.cells)
