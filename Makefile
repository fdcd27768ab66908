PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test slow test-gpu check clean

demo: .venv/installed
	$(BIN)/sdzoo demo -o demo

test: .venv/installed
	$(PYTEST) -m "not slow and not gpu" --ignore=tests/export_kits/test_browser.py

slow: .venv/installed
	$(PYTEST) -m slow

test-gpu: .venv/installed
	$(BIN)/python tests/gpu

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@if $(BIN)/pip install --quiet --dry-run --no-deps --requirement constraints.txt >/dev/null 2>&1; then \
		constraint="--constraint constraints.txt"; \
	else \
		echo "constraints.txt does not fit here; taking the newest versions"; \
	fi; \
	echo "installing sdzoo and what it needs into .venv (a few minutes)"; \
	$(BIN)/pip install --quiet $$constraint --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv .venv-* demo dist
