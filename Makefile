# Two commands for a newcomer: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONPATH := $(CURDIR)

.PHONY: setup demo test test-all test-gpu format

setup: .venv/.ready

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/python train.py

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

test-all: setup
	$(BIN)/pytest -m 'not gpu'

test-gpu: setup
	$(BIN)/python -m tests.gpu

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
