# Two commands do everything on a fresh machine: `make sample` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: sample test coverage test-slow lint clean

sample: $(VENV)/installed
	$(BIN)/featinv sample --output outputs/sample

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

coverage: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" --cov --cov-report=term

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(VENV)/installed
	$(BIN)/pip install -q -e ".[dev]"
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
