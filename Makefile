# make quickstart | check | test | test-gpu-aot | soak | lint | bench | docs | clean.  Each makes $(VENV) on first use; nothing else is installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

GPU_VENV ?= .venv-gpu

.PHONY: quickstart check test test-gpu-aot soak lint bench docs clean

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/jaxrl train configs/arithmetic.yaml

# One process a core, each with whole files, in the order of tests/conftest.py: the long ones first.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0

check: lint
	$(PYTEST) -m "not slow and not soak and not tpu_aot and not gpu_aot and not gpu and not peers"

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(PYTEST) -m "not soak and not gpu_aot and not gpu and not peers"

# The compiler alone, 0.6 GB, and no GPU; apart, because jax looks for a GPU wherever its plugin is installed.
test-gpu-aot: $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m gpu_aot tests/aot

soak: $(VENV)/.installed-dev
	$(PYTEST) -m "soak and not gpu_aot and not gpu and not peers"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.run

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# The environment and runs/ stay: the one is slow to make, the other cannot be made again.
clean:
	rm -rf docs/_build dist .pytest_cache .ruff_cache .hypothesis
	find jaxrl_llm tests benchmarks experiments launch docs -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of packages; a changed pyproject.toml or constraints.txt installs again.
STAMP_NEEDS := pyproject.toml constraints.txt | $(BIN)/python

$(VENV)/.installed-quickstart: $(STAMP_NEEDS)
	@echo "Installing jaxrl_llm into $(VENV): about a minute"
	$(PIP) -e '.[track]'
	@touch $@

$(VENV)/.installed-dev: $(STAMP_NEEDS)
	@echo "Installing jaxrl_llm with what the tests need into $(VENV): one to two minutes"
	$(PIP) -e '.[dev]'
	@touch $@

$(GPU_VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing jaxrl_llm with the GPU compiler into $(GPU_VENV): two to three minutes"
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plan-gpu]'
	@touch $@

$(VENV)/.installed-bench: $(STAMP_NEEDS)
	@echo "Installing jaxrl_llm with what the benchmarks need into $(VENV): one to two minutes"
	$(PIP) -e '.[dev,plots]'
	@touch $@

$(VENV)/.installed-docs: $(STAMP_NEEDS)
	@echo "Installing jaxrl_llm with what the documentation needs into $(VENV): about a minute"
	$(PIP) -e '.[docs]'
	@touch $@
