# Two commands do everything on a fresh machine: `make sample` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: sample app browser test coverage test-slow lint clean

sample: $(VENV)/installed
	$(BIN)/featinv sample --output outputs/sample

app: $(VENV)/installed
	$(BIN)/featinv app

test: $(VENV)/installed browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

coverage: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" --cov --cov-report=term

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow and not gpu"

# The page is tested in Debian's Chromium; without a browser those tests are skipped and say so.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	    || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	    && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	    || echo "No browser is installed: the tests of the page will be skipped."

lint: $(VENV)/installed
	$(BIN)/pip install -q -e ".[dev]"
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
