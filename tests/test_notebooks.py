"""The notebooks run from the first cell to the last, and draw what they show. They are scripts: see docs/notebooks."""

import runpy
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

pytestmark = pytest.mark.examples

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.py"))
NUM_FIGURES = {"first_look": 2, "sparse_from_scratch": 3, "reading_the_diagnostics": 1}


def test_all_notebooks_are_known():
    assert {path.stem for path in NOTEBOOKS} == set(NUM_FIGURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    """Each ends with assertions of its own, on the numbers that its text speaks of."""
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    try:
        runpy.run_path(str(path))
        figures = [plt.figure(number) for number in plt.get_fignums()]
        assert len(figures) == NUM_FIGURES[path.stem]
        assert all(axis.has_data() for figure in figures for axis in figure.axes)
    finally:
        plt.close("all")
        matplotlib.use(backend)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_in_the_percent_format(path):
    """Text in Markdown cells, code in others; the last cell is code, and asserts."""
    cells = path.read_text(encoding="utf-8").split("\n# %%")
    header, first = cells[0], cells[1]
    assert "name: python3" in header
    assert first.startswith(" [markdown]\n# # ")
    texts = [cell.removeprefix(" [markdown]") for cell in cells[1:] if cell.startswith(" [markdown]")]
    assert all(line.startswith("#") or not line for text in texts for line in text.splitlines())
    assert "\nassert " in cells[-1]
