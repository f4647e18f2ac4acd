# `make report` and `make test` are the two commands of the README; both set up .venv first, from constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Compiling all that is installed takes longer than installing it, and most of it is never imported.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

FAST := tests/tasks tests/charts tests/results tests/model/test_scan.py tests/model/test_sites.py \
	tests/passes/test_metrics.py tests/circuits/test_graph.py tests/circuits/test_patching.py

.PHONY: setup report test test-fast test-remote test-ray test-processors docs lint lock clean

setup: $(VENV)/.dev

# What running needs; `.dev` adds what tests, lint and docs need.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --build-constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(INSTALL) --build-constraint constraints.txt --editable ".[dev]"
	touch $@

report: $(VENV)/.run
	$(BIN)/ioi-mamba run layer-ablation layer-removal --model mini --out reports/mini

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --durations=20

# What is quick of it, for the loop: about a minute.
test-fast: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(FAST)

# Against real NDIF servers that the tests start on loopback; see docs/ndif-test-server.md for what that needs.
test-remote: setup
	$(BIN)/python -m pytest -m remote -rs

# With Ray, on loopback: every experiment by two workers, killed runs, eight nodes, Slurm's script, a submitted job.
test-ray: setup
	$(BIN)/python -m pytest -m ray -rs tests/remote

# The tests of numbers, once more on each of the processors that tests/processors.py imitates.
test-processors: setup
	$(BIN)/python -m tests.processors

# The documentation site, in build/site. It runs the notebooks (minutes; build/notebooks keeps them until code changes).
# A broken link, an unknown name, or a notebook that fails is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pyright -p .ci/pyright-rooms.json --pythonpath $(BIN)/python

# constraints.txt anew, from the newest releases that pyproject.toml allows; the tests say whether they serve.
lock:
	$(PYTHON) .ci/lock.py

clean:
	rm -rf $(VENV)
