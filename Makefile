# Every target makes its own virtual environment. PYTHON=python3.13 picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv lint format test test-long test-kernels demo clean

help: ## print these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## make .venv with the dependencies and the tools

lint: $(STAMP) ## ruff, mypy strict, import contracts, import budget
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/import_budget.py

format: $(STAMP) ## let ruff format the code and mend what it can
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

test: $(STAMP) ## all tests but the long ones; ARGS='-k name' is passed on
	$(BIN)/python -m pytest -m "not long" $(ARGS)

test-long: $(STAMP) ## the long tests: races, kills, soaks, other kernels
	$(BIN)/python -m pytest -m long $(ARGS)

test-kernels: $(STAMP) ## of the long tests, those on other kernels, booted in QEMU
	$(BIN)/python -m pytest -m kernels $(ARGS)

demo: $(STAMP) ## load, mount and change a small image, and show what happens (root)
	$(BIN)/python scripts/demo.py

clean: ## remove what the other targets made
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find overlayctl scripts tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is `$(PYTHON) -V`, Python 3.11 or newer is needed: make PYTHON=..." >&2; exit 1; }
	@# Debian's python3 has venv but not ensurepip until python3-venv is there.
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    if [ "`id -u`" = 0 ] && command -v apt-get >/dev/null; then \
	        echo "make: $(PYTHON) cannot make virtual environments: installing python3-venv"; \
	        { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv || \
	          { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv; }; } && \
	        $(PYTHON) -c 'import ensurepip, venv'; \
	    else false; fi; } || \
	    { echo "make: $(PYTHON) cannot make virtual environments: install python3-venv (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@# An interpreter that has gone, or an interrupted run, leaves a directory that looks like one.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
