# make train: set up and train the default model. make test: lint, types and all tests.
# make storm: one run under sixty random kills.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard *.py) model data parallel resilience checkpoint formats evaluation training planning cli slurm bench tests

.PHONY: train test storm check clean

train: .venv/.installed
	$(BIN)/python train.py

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

storm: .venv/.installed-dev
	$(BIN)/python -m pytest -s tests/faults/test_storm.py --storm=60

check: .venv/.installed-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy $(SOURCES)

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
