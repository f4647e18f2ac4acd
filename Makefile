# `make report` and `make test` are the two commands of the README; both set up .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup report test test-remote docs lint clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=23.2"
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

report: setup
	$(BIN)/ioi-mamba run layer-ablation layer-removal --model mini --out reports/mini

test: setup
	$(BIN)/python -m pytest

# Against real NDIF servers that the tests start on loopback; see docs/ndif-test-server.md for what that needs.
test-remote: setup
	$(BIN)/python -m pytest -m remote -rs

# The documentation site, in build/site; a broken link or an unknown name is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV)
