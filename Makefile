# Two commands set everything up: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
ARGS ?=

# For the tests; the quickstart would choose the same. More threads than idle cores make small models many times slower.
export OMP_NUM_THREADS ?= 1

.PHONY: wheels quickstart setup test test-fast nightly lint docs dist clean

quickstart: $(VENV)/installed
	$(BIN)/visper quickstart $(ARGS)

setup: $(VENV)/installed-test

# Without ARGS two files are tested at a time, then those whose tests start several processes themselves.
test: $(VENV)/installed-test lint
	$(BIN)/pytest $(or $(ARGS),-n 2 --dist loadfile --ignore=tests/distributed)
	$(if $(ARGS),,$(BIN)/pytest tests/distributed)

# Without the tests that train or compile for long or start processes that load torch; two files at a time.
test-fast: $(VENV)/installed-test
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow" --ignore=tests/distributed --ignore=tests/integration $(ARGS)

# Attacks that take minutes: thousands of damaged archives and odd rows, runs killed at random moments.
nightly: $(VENV)/installed-test
	$(BIN)/pytest -m nightly $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

# What a GPU machine without a network may lack, for benchmarks/gpu_check.py.
wheels: | $(BIN)/python
	$(BIN)/pip download --quiet --only-binary :all: --python-version 3.12 --platform manylinux_2_17_x86_64 \
		--dest wheels 'pydantic>=2.10' 'pytest>=8'
	$(BIN)/pip download --quiet --no-deps --dest wheels liger-kernel

# The source archive, and the wheel built from it.
dist: $(VENV)/installed-test
	$(BIN)/python -m build --outdir dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist site
