# make train: set up and train the default model.
# make check: format, lint and types. make test-quick: unit tests, about two minutes.
# make test: the checks and all tests except slow ones. make test-slow: random kills, SLURM clusters.
# make storm: one run with sixty random kills.
# make fuzz: each parser of files from outside reads damaged files for SECONDS=60; PARSERS="a b" selects.
# make audit: known vulnerabilities of the locked packages, and their list in CycloneDX format, for a
# release, into build/release.
# make gpu: checks and measurements on one GPU in eight minutes, into bench/results/gpu.json. PARTS=a,b
# selects parts, PYTHON=python3 uses that interpreter with its torch, WHEELS=folder adds packages that it
# lacks, without a package index. make wheels WHEELS=folder GPU_PYTHON=3.12: downloads them.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard *.py) model data parallel resilience checkpoint formats evaluation training planning cli slurm bench tests
# Three workers on two cores: some tests wait for time limits.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Packages that a CUDA image with PyTorch usually lacks: 14 MB.
IMAGE_LACKS := annotated-types datasets dill filelock hydra-core isal lightning-fabric lightning-utilities \
    multiprocess omegaconf pydantic pydantic_core torchao typing_extensions typing-inspection xxhash zstandard
GPU_PYTHON ?= 3.12
PLATFORMS := 2_28 2_27 2_24 2_17 2_12 2_5
# PYTHON= on the command line replaces the virtual environment.
GIVEN_PYTHON := $(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON))

.PHONY: train check test test-quick test-slow storm fuzz audit gpu wheels clean

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

fuzz: .venv/.installed-dev
	$(BIN)/python tests/fuzz/run.py $(PARSERS) SECONDS=$(or $(SECONDS),60) $(if $(SEED),SEED=$(SEED))

# In an environment of its own: these tools need other versions than constraints.txt has.
build/audit/.installed:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet 'pip-audit>=2.9' 'cyclonedx-bom>=7'
	touch $@

audit: .venv/.installed-dev build/audit/.installed
	mkdir -p build/release
	$(BIN)/python .ci/audit.py

gpu: $(if $(GIVEN_PYTHON),,.venv/.installed-dev)
	$(if $(WHEELS),$(if $(wildcard $(WHEELS)/*.whl),,$(error WHEELS=$(WHEELS) contains no wheels; \
	    use the folder that make wheels WHEELS=FOLDER has filled)))
	$(if $(WHEELS),$(or $(GIVEN_PYTHON),$(BIN)/python) -m pip install --quiet --no-index --no-deps --upgrade \
	    --target build/gpu $(WHEELS)/*.whl)
	PYTHONPATH=$(if $(WHEELS),$(CURDIR)/build/gpu:)$$PYTHONPATH $(or $(GIVEN_PYTHON),$(BIN)/python) \
	    -m bench.gpu $(if $(PARTS),PARTS=$(PARTS)) $(if $(REPORT),REPORT=$(REPORT)) $(if $(REDUCED),reduced)

wheels: .venv/.installed-dev
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir $(WHEELS) antlr4-python3-runtime==4.9.3
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	    --implementation cp $(foreach tag,$(PLATFORMS),--platform manylinux_$(tag)_x86_64) \
	    --platform manylinux2014_x86_64 --constraint constraints.txt --dest $(WHEELS) $(IMAGE_LACKS)

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
