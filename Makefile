# Every target does its own set-up: a fresh machine needs bash, make and Python 3.11 or 3.12, nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test unit soak check report clean distclean

RECIPE ?= stages.yaml
RUN ?= runs/tiny
SEEDS ?= 100000
ARGS ?=
BIN := .venv/bin
# Two OpenMP processes on one core collapse; a test runs many.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 18

setup:  ## build .venv from the locks; does nothing while they are unchanged
	@scripts/setup.sh

demo: setup  ## run stages.yaml, or RECIPE=…; more arguments by ARGS="--set stages.climb.steps=50"
	@$(BIN)/drover run $(RECIPE) $(ARGS)

test: setup  ## all tests: unit, then integration (real vLLM, Ray and TRL)
	@$(TEST_ENV) $(BIN)/python -m pytest tests $(ARGS)

unit: setup  ## unit tests only, under a minute
	@$(TEST_ENV) $(BIN)/python -m pytest tests --ignore tests/integration -n 2 $(ARGS)

soak: setup  ## the protocol in SEEDS=100000 simulated worlds; a failing seed is printed
	@DROVER_SEEDS=$(SEEDS) $(TEST_ENV) $(BIN)/python -m pytest -s tests/rl/test_simulation.py $(ARGS)

check: setup  ## ruff, mypy, the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(TEST_ENV) $(BIN)/python -m pytest -q tests/test_imports.py

report: setup  ## write the HTML report of a run, RUN=runs/tiny
	@$(BIN)/drover report $(RUN) $(ARGS)

clean:  ## remove caches; runs and .venv stay
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	@find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean  ## remove .venv as well; runs stay
	@rm -rf .venv
