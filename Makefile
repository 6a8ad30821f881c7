# The two commands of the README, each from nothing: make quickstart, make test.
# PYTHON chooses the interpreter (3.11 or newer); pip's own settings and mirrors apply.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
JOBS   ?= 2

.PHONY: quickstart test slow mutants lint docs clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/halfbyte quickstart

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m "not slow and not gpu"

slow: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m slow --timeout 3600

mutants: $(VENV)/.installed-test
	$(PY) -m tests.mutants.run --jobs $(JOBS) --result benchmarks/results/mutants.json

lint: $(VENV)/.installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

docs: $(VENV)/.installed
	$(PY) -m halfbyte.config.docs
	$(PY) -m halfbyte.cli.docs > docs/cli.md
	$(PY) -m halfbyte.cli.api_docs > docs/python.md
	$(PY) docs/make_tree.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; found `$(PYTHON) --version`. Name another with: make PYTHON=python3.12 ..."; exit 3; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv"; exit 3; }

$(VENV)/.installed: $(PY) pyproject.toml
	$(PY) -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PY) -m pip install --quiet --editable ".[test]"
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(PY) -m pip install --quiet --editable ".[lint]"
	@touch $@
