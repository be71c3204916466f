# `make` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out/demo
# Where torch comes from; empty for PyPI, whose build for Linux brings CUDA.
TORCH_INDEX_URL ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-long test-newest chaos hosts-test compose-test bench-engine bench-queue bench-watching lint format clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.farm  ## install the farm into .venv; without a GPU: TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu

demo: $(VENV)/.farm  ## start the embedded farm, render examples/prompts.txt, show where the pictures are
	@$(BIN)/python examples/demo.py --out $(OUT)

up: $(VENV)/.farm  ## start the embedded farm and keep it running until Ctrl-C
	@$(BIN)/farm up

test: $(VENV)/.dev  ## run all tests but the long ones, against real servers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(VENV)/.dev  ## run the long tests: the commands of docs/, every sampler, fault injection, an upgrade from release 0.1
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "long and not chaos" -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-newest:  ## run the tests that need no torch on the newest Python of this machine
	infra/test-newest-python $(ARGS)

chaos: $(VENV)/.dev  ## run the fault-injection tests in their long form: CHAOS_JOBS, CHAOS_MINUTES, CHAOS_SEED
	$(BIN)/python -m pytest tests/chaos -m chaos $(ARGS)

hosts-test: $(VENV)/.dev  ## a farm on many hosts, each a network namespace; needs root and iproute2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/hosts -m hosts $(ARGS)

compose-test: $(VENV)/.dev  ## docker-compose.yml, built and run with a Docker engine of its own; needs root and Debian
	infra/compose-test-packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/compose -m compose -s -v $(ARGS)

bench-engine: $(VENV)/.dev  ## the engine beside diffusers' own pipeline, on this machine (eight to eleven minutes on two cores)
	$(BIN)/python -m benchmarks.engine $(ARGS)

bench-queue: $(VENV)/.dev  ## the farm as a queue against Celery, rq, dramatiq and huey, on this machine
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m benchmarks.queue $(ARGS)

bench-watching: $(VENV)/.dev  ## the cost of monitoring: a monitored farm against an unmonitored one
	$(BIN)/python -m benchmarks.watching $(ARGS)

lint: $(VENV)/.dev  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv and what the demo made; not .farm, where your jobs and pictures are
	rm -rf $(VENV) .venv-newest out .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "The farm needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "This Python can't make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps: a second run does not ask pip again.
$(VENV)/.farm: $(VENV)/bin/python pyproject.toml
	@infra/install-torch $(BIN)/python '$(TORCH_INDEX_URL)'
	@echo "Installing the farm into $(VENV) (the first time takes a minute or more) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[worker,local]'
	@touch $@

$(VENV)/.dev: $(VENV)/.farm
	@echo "Installing what the tests need ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[worker,local,dev]'
	@touch $@
