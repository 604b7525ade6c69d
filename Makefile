# Everything starts here. Each target installs first where it needs to.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install serve check test test-long soak clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: install
	$(BIN)/manta serve

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file .mkdocs.yml

test: check
	$(BIN)/pytest -n 2 --dist loadgroup --durations=30 -m "not long"

# The long ones measure, and have the machine to themselves
test-long: test
	$(BIN)/pytest --durations=30 -m long

# A fault every ten seconds under load; make soak SOAK_S=600 for ten minutes
SOAK_S ?= 3600
soak: install
	MANTA_SOAK_S=$(SOAK_S) $(BIN)/pytest -s tests/end_to_end/test_soak.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
