# Everything starts here. Each target installs first what it needs: `serve` what serving needs, all others the tools as well.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install serve check test test-long soak clean

install: .venv/.installed

# Where there is no NVIDIA GPU, torch without CUDA is a tenth as large. Who has told pip where to look is left alone.
.venv/.serving: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@if command -v nvidia-smi >/dev/null || $(BIN)/pip config list | grep -qE 'index-url|find-links'; then \
	  echo "Installing torch as pip finds it"; \
	  $(BIN)/pip install --quiet --constraint constraints.txt torch; \
	else \
	  echo "Installing torch without CUDA: there is no nvidia-smi here"; \
	  $(BIN)/pip install --quiet --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch; \
	fi
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed: .venv/.serving
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: .venv/.serving
	$(BIN)/manta serve

RUFF = $(BIN)/ruff format --check . && $(BIN)/ruff check .
CHECKS = $(BIN)/mypy && $(BIN)/lint-imports && \
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file .mkdocs.yml

check: install
	$(RUFF)
	$(CHECKS)

# What check does, beside the tests. Three workers for two cores: two of them wait for servers half of their time
test: install
	$(RUFF)
	@($(CHECKS)) & checks=$$!; \
	$(BIN)/pytest -n 3 --dist loadgroup --durations=30 -m "not long"; tests=$$?; \
	wait $$checks || { echo "make check fails: its messages are above those of the tests"; exit 1; }; exit $$tests

# The long ones measure, and have the machine to themselves
test-long: test
	$(BIN)/pytest --durations=30 -m long

# A fault every ten seconds under load; make soak SOAK_S=600 for ten minutes
SOAK_S ?= 3600
soak: install
	MANTA_SOAK_S=$(SOAK_S) $(BIN)/pytest -s tests/end_to_end/failures/test_soak.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
