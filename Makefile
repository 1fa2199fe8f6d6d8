# Sets up by itself: every target that needs the environment makes it first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml
# A worker a core, each with files of its own: what a file sets up once is set up once.
TEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all check format bench campaign docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## make the virtual environment and install the requirements

$(VENV)/.run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Metabolt needs Python 3.11 or newer: make PYTHON=python3.11 …" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.ready: $(VENV)/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

train: $(VENV)/.run  ## train, test and report (CONFIG=configs/….yaml chooses what; default the quickstart)
	$(BIN)/python train.py --config $(CONFIG)

test: $(VENV)/.ready  ## run the tests
	$(TEST)

test-all: $(VENV)/.ready  ## run the tests, the long ones too
	$(TEST) -m ''

check: $(VENV)/.ready  ## lint, format check and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.ready  ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready  ## compare with learn2learn and gymnasium, iMAML with MAML (some minutes each; ROOT=folder of Omniglot)
	$(BIN)/python -m benchmarks.episodes --root $(or $(ROOT),data)
	$(BIN)/python -m benchmarks.maml --root $(or $(ROOT),data)
	$(BIN)/python -m benchmarks.protonet --root $(or $(ROOT),data)
	$(BIN)/python -m benchmarks.learners
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.environments

campaign: $(VENV)/.ready  ## train the queue of long trainings, from where it was (ROOT=folder of Omniglot)
	$(BIN)/python -m benchmarks.campaign --root $(or $(ROOT),data)

docs: $(VENV)/.ready  ## make the tables of the docs out of docs/results/
	$(BIN)/python -m benchmarks.tables

clean:  ## remove the environment and caches, but no runs and no data
	rm -rf $(VENV) .pytest_cache .ruff_cache
