PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two processes, each with a Ray of its own; the tests of one file stay together.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
GOLDEN := ../shared/models/tiny-internlm2-reward

.PHONY: help setup demo test test-all lint bench gpu
.DEFAULT_GOAL := help

help: ## show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(READY) ## make .venv with the tested versions of everything

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## score and rank the shipped sample with the embedded model
	@$(BIN)/python -m jobs.demo

test: setup ## run the tests but the slow ones, some 5 minutes on two cores
	$(PYTEST) -m "not slow"

test-all: setup ## run all tests, some 12 minutes on two cores
	$(PYTEST)

lint: setup ## check format, style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: setup ## measure the engine and jobs.score, some 12 minutes; results go to tests/benchmarks/results
	$(BIN)/python -m tests.benchmarks.bench_engine --preset mid --repeats 2 --save
	$(BIN)/python -m tests.benchmarks.bench_score $(if $(wildcard $(GOLDEN)),--model $(GOLDEN))

gpu: ## on a machine with a CUDA card: its bits, tests and figures in nine minutes, with the python3 that has torch
	python3 -m tests.benchmarks.gpu_session
