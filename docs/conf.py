"""Sphinx: `make docs` builds the pages in this folder into _build/html; a warning is an error."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the code beside these pages, installed or not

# For the notebooks, whose kernels inherit it: XLA compiles small programs quickly rather than well, as in the tests.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import agent_optax

project = "agent_optax"
author = "the authors of agent_optax"
release = agent_optax.__version__
html_title = f"agent_optax {release}"

# No intersphinx: the build reads nothing from the network.
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "conf.py"]
html_theme = "furo"
html_static_path: list[str] = []

# Docstrings: Google style. A name in single backticks is a link where it is a name of this library.
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = False  # every name has its entry on a page of reference/; the tables only point there
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

# Pages are Markdown; notebooks are Python scripts in jupytext's percent format, run by the build.
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "cache"  # a notebook runs again when its source changes
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds a cell
nb_merge_streams = True
