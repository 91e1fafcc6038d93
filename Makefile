# Each target does its own set-up: one environment, .venv, and a stamp for each group of packages in it.
# The stamps depend on pyproject.toml and constraints.txt, so that a change there installs anew.

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Without build isolation the editable install is built by the hatchling that constraints.txt names.
INSTALL := $(PIP) --no-build-isolation --editable
REQUIREMENTS := .venv/.created pyproject.toml constraints.txt

.PHONY: help demo test test-long bench lint docs format clean

help:
	@echo 'make demo       train on handwritten digits, compare, report: runs/demo'
	@echo 'make test       the tests (a few minutes)'
	@echo 'make test-long  the tests marked long; records the run in results/test-long.json'
	@echo 'make bench      speed and memory beside what there is to compare with: results/bench.json; ROWS=loop,help for some'
	@echo 'make lint       ruff and pyright'
	@echo 'make docs       the documentation, as docs/_build/index.html'
	@echo 'make format     let ruff mend what it can'
	@echo 'make clean      remove caches and the built documentation'

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'nestling needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 …' >&2; exit 2; }
	$(PYTHON) -m venv .venv
	touch $@

# The first target that runs installs nestling itself; whatever comes later adds its group.
.venv/.installed-hub: $(REQUIREMENTS)
	@echo 'Installing nestling and what it needs into .venv (torch included: a minute or more).'
	$(PIP) hatchling editables
	$(INSTALL) '.[hub]'
	touch $@

.venv/.installed-test: .venv/.installed-hub
	$(INSTALL) '.[hub,sweep,test]'
	touch $@

.venv/.installed-bench: .venv/.installed-hub
	$(INSTALL) '.[hub,bench]'
	touch $@

.venv/.installed-docs: .venv/.installed-hub
	$(INSTALL) '.[hub,docs]'
	touch $@

.venv/.installed-lint: .venv/.installed-hub
	$(INSTALL) '.[hub,sweep,lint]'
	touch $@

demo: .venv/.installed-hub
	$(BIN)/nestling demo

# Tiny models are slower on two threads than on one, and two workers share the cores.
test: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'not long'

test-long: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m long --record=results/test-long.json

bench: .venv/.installed-bench
	$(BIN)/python benchmarks/bench.py --rows=$(ROWS)

# pyright follows the imports of whatever stands in .venv: the tests' packages are not needed for src.
lint: .venv/.installed-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

docs: .venv/.installed-docs
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build

format: .venv/.installed-lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf docs/_build .pytest_cache .ruff_cache .hypothesis build dist
	find . -path ./.venv -prune -o -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
