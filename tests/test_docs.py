"""The documentation keeps its word: its code runs, its reference is whole, its links lead somewhere."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
QUICK_START = DOCS / "quick-start.md"
ALL_PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def python_blocks(page: Path) -> list[str]:
    """The code that runs, at its line. What other libraries' code looks like stands in blocks marked `py`."""
    text = page.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in blocks]


def run(page: Path, namespace: dict) -> dict:
    for block in python_blocks(page):
        exec(compile(block, str(page.relative_to(ROOT)), "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def after_quick_start() -> dict:
    """The model, the data and the imports that all pages share."""
    return run(QUICK_START, {"__name__": "docs"})


PAGES_WITH_CODE = [page for page in ALL_PAGES if python_blocks(page) and page != QUICK_START]


def test_quick_start_trains_a_sparse_network(after_quick_start):
    report = after_quick_start["report"]
    assert float(report["sparsity"]) == pytest.approx(0.9, abs=2e-3)
    assert int(report["num_topology_updates"]) == 2  # 24 steps, one update every 10
    assert 0 < float(report["correlation"]) <= 1


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_code_runs_after_the_quick_start(page, after_quick_start):
    run(page, dict(after_quick_start))


def public_names() -> set[str]:
    """Every name of every `__all__` that a user may import from, dotted."""
    folders = [path.parent for path in (ROOT / "agent_optax").glob("*/__init__.py")]
    modules = ["agent_optax", *(f"agent_optax.{folder.name}" for folder in folders)]
    modules += ["agent_optax.flax.nnx", "agent_optax.flax.linen", "agent_optax.typing"]
    reexported = {"agent_optax.correction", "agent_optax.sparsity"}
    return {f"{m}.{name}" for m in modules if m not in reexported for name in importlib.import_module(m).__all__}


def test_reference_has_exactly_the_public_names():
    entries: list[str] = []
    for page in (DOCS / "reference").glob("*.md"):
        entries += re.findall(r"^\.\. auto(?:function|class|module):: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE)
    assert len(entries) == len(set(entries))
    assert set(entries) == public_names()


def test_overview_of_the_reference_has_every_entry():
    overview = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^   (agent_optax\.[\w.]+)$", overview, re.MULTILINE)) == public_names()


def test_every_page_is_in_a_table_of_contents():
    listed = {QUICK_START.with_name("index.md")}
    for page in ALL_PAGES:
        for toctree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
            names = [line for line in toctree.splitlines() if line and not line.startswith(":")]
            listed |= {page.parent / f"{name}.md" for name in names}
    notebooks = {path.with_suffix(".md") for path in (DOCS / "notebooks").glob("*.py")}
    assert listed == set(ALL_PAGES) | notebooks


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|^:::?:?\{figure\} (\S+)$|^```\{include\} (\S+)$", text, re.MULTILINE)
    local = [link for groups in links for link in groups if link and "://" not in link]
    missing = [link for link in local if not (page.parent / link).exists()]
    named = re.findall(r"`(?:python )?((?:examples|benchmarks|docs|tests)/[\w./-]+)`", text)
    assert missing + [path for path in named if not (ROOT / path).exists()] == []
