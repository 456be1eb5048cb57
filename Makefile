# Two commands do everything on a fresh machine: `make sample` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# Without an NVIDIA card torch's CPU wheels serve, which save about 4 GB. Empty: pip's default ones.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

.PHONY: sample app browser test coverage test-slow docs docs-version notebooks lint clean

sample: $(VENV)/installed
	$(BIN)/featinv sample --output outputs/sample

app: $(VENV)/installed
	$(BIN)/featinv app

test: $(VENV)/installed browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

coverage: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" --cov --cov-report=term

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow and not gpu"

# The page is tested in Debian's Chromium; without a browser those tests are skipped and say so.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	    || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	    && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	    || echo "No browser is installed: the tests of the page will be skipped."

# The notice that Material prints is answered in docs/adr/0018.
docs docs-version: export NO_MKDOCS_2_WARNING = 1

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict --clean
	@echo "Open build/site/index.html."

notebooks: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python examples/run.py

# Commits the site of one version beside the earlier ones to the branch gh-pages; pushes nothing.
docs-version: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mike deploy --update-aliases $(VERSION) latest

lint: $(VENV)/installed
	$(BIN)/pip install -q -e ".[dev]"
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install -q --retries 1 --timeout 10 --index-url $(TORCH_INDEX) \
	    torch torchvision && $(BIN)/python -c "import torchvision" \
	    || { echo "$(TORCH_INDEX) did not serve a pair that works: torch comes from pip's own index."; \
	    $(BIN)/pip uninstall -q -y torch torchvision; })
	$(BIN)/pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
