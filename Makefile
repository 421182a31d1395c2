# `make demo` and `make test` work at once in a fresh checkout; they share one .venv. `make test-all` takes longer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-all lint clean

demo: $(VENV)/.installed
	launch/quickstart.sh

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -m slow

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/yamllint --strict .

clean:
	rm -rf $(VENV) runs/demo build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("tarflow-scale needs Python 3.11 or newer (got %d.%d); set PYTHON=" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
