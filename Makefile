# make train: set up and train the default model.
# make check: format, lint and types. make test-quick: unit tests, about two minutes.
# make test: the checks and all tests except slow ones. make test-slow: random kills, SLURM clusters.
# make storm: one run with sixty random kills.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard *.py) model data parallel resilience checkpoint formats evaluation training planning cli slurm bench tests
# Three workers on two cores: some tests wait for time limits.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: train check test test-quick test-slow storm clean

train: .venv/.installed
	$(BIN)/python train.py

check: .venv/.installed-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy $(SOURCES)

test: check
	$(PYTEST) -m "not slow"

test-quick: .venv/.installed-dev
	$(PYTEST) -m quick

test-slow: .venv/.installed-dev
	$(PYTEST) -m slow

storm: .venv/.installed-dev
	$(BIN)/python -m pytest -s tests/faults/test_storm.py --storm=60

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/.installed

clean:
	rm -rf .venv build *.egg-info
