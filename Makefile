# `make quickstart` and `make test` need python3 (3.11 or later) and nothing else:
# each makes .venv if there is none and installs into it what it needs.
#
#   make quickstart ARGS="--help"          arguments for the example
#   make test ARGS="-k rigl"               arguments for pytest

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all docs lint format clean

help:
	@echo "make quickstart   run examples/quickstart.py"
	@echo "make test         run the tests and the examples in docstrings"
	@echo "make test-all     and those that train, start processes or time: pytest's markers tell"
	@echo "make docs         build the pages into docs/_build/html, running the notebooks"
	@echo "make lint         ruff (lint and format) and pyright, changing nothing"
	@echo "make format       let ruff mend what it can"
	@echo "make clean        remove .venv and the caches"

quickstart: .venv/.installed-examples
	$(BIN)/python examples/quickstart.py $(ARGS)

test: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 -m "not benchmarks and not devices and not examples" $(ARGS)

test-all: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 $(ARGS)

docs: .venv/.installed-docs
	$(BIN)/python -m sphinx -b html -W --keep-going --quiet docs docs/_build/html $(ARGS)

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv docs/_build .pytest_cache .ruff_cache .hypothesis build dist

# One empty file for each set of extras that is installed: newer than pyproject.toml, nothing is to do.
.venv/.installed-%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }  # half an environment would pass for one
