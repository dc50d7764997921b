# The developer's commands. Each installs what it needs first.
#
#   make doctor     what is missing, before anything is installed
#   make install    into .venv, with the versions of constraints.txt
#   make run        the main job: sparseline run --profile nano
#   make test       all tests
#   make check      lint, types and the fast tests
#   make ui         MLflow on the runs of this machine

PYTHON ?= python3
PROFILE ?= nano
SEED ?= 0
PORT ?= 5000
BIN := .venv/bin
# Tests on two cores at once; a process that trains uses one thread there.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: doctor install run test check types fast-tests ui
.DEFAULT_GOAL := run

doctor:
	@$(PYTHON) pipelines/doctor.py

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) pipelines/doctor.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $$($(PYTHON) pipelines/doctor.py torch-index) --editable '.[dev]'
	@touch $@

run: install
	$(BIN)/sparseline run --profile $(PROFILE) --seed $(SEED)

test: install
	$(TEST)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target types fast-tests

types:
	$(BIN)/mypy

fast-tests:
	$(TEST) -m 'not slow'

ui: install
	$(BIN)/sparseline ui --port $(PORT)
