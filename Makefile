# Everything a newcomer types. Needs Python 3.11 or later; the rest is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Exact versions that CI ran with; `make CONSTRAINTS=` takes the newest instead.
CONSTRAINTS ?= constraints.txt
ARGS ?=
TESTS ?= tests
# Test files that run at the same time.
WORKERS ?= 3
PYTEST = $(BIN)/python -m pytest $(TESTS)
SIDE_BY_SIDE = -n $(WORKERS) --dist worksteal

.PHONY: help train test test-slow check format install clean

help:  ## Show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

train: $(STAMP)  ## Train CIFAR-10 on synthetic images, about a minute; more flags through ARGS=
	$(BIN)/accelerate launch recipes/cifar10.py --preset quick --data.source synthetic $(ARGS)

test: $(STAMP)  ## Test every module, with real ranks, in a few minutes; some of it through TESTS=
	$(PYTEST) $(SIDE_BY_SIDE) -m "not slow"

# 5 means that no such test was selected, as with TESTS=.
test-slow: $(STAMP)  ## Test whole matrices, kills at every point, trainings and the benchmarks' checks
	$(PYTEST) $(SIDE_BY_SIDE) -m "slow and not alone" || test $$? -eq 5
	$(PYTEST) -m "slow and alone" || test $$? -eq 5

check: $(STAMP)  ## Lint, format, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

format: $(STAMP)  ## Format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)  ## Only make .venv

$(STAMP): pyproject.toml $(wildcard $(CONSTRAINTS))
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'distkit needs Python 3.11 or later: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	touch $@

clean:  ## Remove .venv and what tools left; runs/ and data/ stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
