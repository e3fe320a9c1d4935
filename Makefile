# Needs Python 3.11 or newer and make; everything else goes into .venv.
# `make PYTHON=python3.12 test` picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test bench validate clean

demo: .venv/installed
	$(BIN)/perfsim simulate workloads/scenarios/mooncake-demo.yaml -o demo-run
	@echo "The whole report, with figures: demo-run/report.html"

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

bench: .venv/installed
	$(BIN)/python benchmarks/speed.py

# What predictions miss: validation/REPORT.md. With DATA=DIR on the whole tables, else on the committed slices.
validate: .venv/installed
	$(BIN)/python -m validation.report $(if $(DATA),--data $(DATA))

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'perfsim needs Python 3.11 or newer; try: make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) install --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv demo-run .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
