# Everything a newcomer types. Needs Python 3.11 or later; the rest is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Exact versions that CI ran with; `make CONSTRAINTS=` takes the newest instead.
CONSTRAINTS ?= constraints.txt
ARGS ?=
TESTS ?= tests

.PHONY: help train test check format install clean

help:  ## Show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

train: $(STAMP)  ## Train CIFAR-10 on synthetic images, about a minute; more flags through ARGS=
	$(BIN)/accelerate launch recipes/cifar10.py --preset quick --data.source synthetic $(ARGS)

test: $(STAMP)  ## Run the whole test suite
	$(BIN)/python -m pytest $(TESTS)

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
