# Each target makes .venv and installs what it lacks; a second run starts at once. `make help` lists the targets.
#
#   make demo PYTHON=python3.12                 another interpreter
#   make demo TORCH_PIP_ARGS="--index-url ..."  another build of torch (see CONTRIBUTING.md, "Which torch")
#   make test PYTEST_ARGS="-n 0 -k layout"      part of the tests

# The first of these that really runs and is new enough: a version manager's python3.11 may exist and refuse to start.
PYTHONS := python3.11 python3.12 python3.13 python3
IS_NEW := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for py in $(PYTHONS); do $$py -c '$(IS_NEW)' 2>/dev/null && echo $$py && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_PIP_ARGS ?=
PYTEST_ARGS ?=

# Stamps say what is installed. Each is written last, so an interrupted install is taken up again.
TORCH := $(VENV)/.stamp-torch
CORE := $(VENV)/.stamp-core
DEV := $(VENV)/.stamp-dev
DOCS := $(VENV)/.stamp-docs
ECOSYSTEM := $(VENV)/.stamp-ecosystem

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv system demo test test-slow test-ecosystem style quality docs train-tiny evaluate-tiny paper-tiny clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(DEV)  ## make .venv with all that development needs

# Package of Debian and the program that it brings, for tests that start it; they are skipped where it is missing.
SYSTEM := nginx:/usr/sbin/nginx chromium:/usr/bin/chromium
system:  ## install what slow tests start beside Python, on Debian as root (elsewhere nothing is done)
	@missing=""; for each in $(SYSTEM); do test -x $${each#*:} || missing="$$missing $${each%%:*}"; done; \
	if test -z "$$missing"; then exit 0; fi; \
	if test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null; then echo "not installed:$$missing"; exit 0; fi; \
	apt-get update -q && apt-get install -q -y --no-install-recommends $$missing

demo: $(CORE)  ## see the embedded model split, write in parallel and merge (CPU, core install only)
	@$(BIN)/multiverse demo

test: $(DEV)  ## run the default tests (offline, CPU; 5 minutes on two quiet cores)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(DEV)  ## run the slow and the long tests (PYTEST_ARGS="-m 'slow and not long'": what CI runs of them)
	$(BIN)/python -m pytest -m "slow or long" $(PYTEST_ARGS)

test-ecosystem: $(ECOSYSTEM)  ## run the tests of other people's tools, slow ones too
	$(BIN)/python -m pytest -m "not gpu and not network" tests/ecosystem $(PYTEST_ARGS)

style: $(DEV)  ## format the code and fix what ruff can fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

quality: $(DEV)  ## check lint, format and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

docs: $(DOCS)  ## build the site of the documentation in site/ (offline; a warning or a broken link fails)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

train-tiny: $(DEV)  ## train the embedded model from nothing (CPU, 93 minutes)
	$(BIN)/python recipes/multiverse-tiny/make_base.py --output runs/multiverse-tiny/base
	$(BIN)/accelerate launch --num_processes 1 --cpu --mixed_precision no --num_cpu_threads_per_process 1 \
		recipes/sft.py --config recipes/multiverse-tiny/sft.yaml

evaluate-tiny: $(DEV)  ## measure the embedded model on 500 unseen problems of each kind (6 minutes)
	$(BIN)/python recipes/multiverse-tiny/evaluate.py --model src/multiverse_hf/assets/multiverse-tiny

paper-tiny: $(DEV)  ## the paper's central table in small, three seeds (over an hour on two cores; goes on after a stop)
	$(BIN)/python recipes/multiverse-tiny/paper.py --output runs/paper-tiny

clean:  ## remove caches and build outputs (.venv stays)
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch first and alone: resolved together with the rest, pip may fetch gigabytes of CUDA for a machine without a GPU.
# pip's torch for Linux is a CUDA build. Without a GPU, uv fetches the CPU build, whose index it knows.
WANTS_CPU_TORCH = test -z "$(TORCH_PIP_ARGS)" && test "$$(uname -s)" = Linux && ! command -v nvidia-smi rocm-smi >/dev/null
$(TORCH): constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "multiverse_hf needs Python 3.11 or newer, and none of $(PYTHONS) is that." >&2; \
		echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c '$(IS_NEW)' 2>/dev/null || { \
		echo "multiverse_hf needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo not there)." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@{ test -f $(BIN)/activate && $(PIP) --version >/dev/null 2>&1; } || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and what else is needed into $(VENV); the first time this takes minutes"
	@echo "first torch:"
	@$(WANTS_CPU_TORCH) || exit 0; $(PIP) install -q uv && UV_HTTP_RETRIES=1 $(BIN)/uv pip install -q \
		--python $(BIN)/python --torch-backend=cpu -c constraints.txt torch 2>/dev/null || \
		echo "PyTorch's index of CPU builds cannot be reached; pip takes what it finds"
	$(PIP) install -c constraints.txt $(TORCH_PIP_ARGS) torch
	@touch $@

$(CORE): $(TORCH) pyproject.toml
	@echo "then transformers and this package:"
	$(PIP) install -c constraints.txt -e .
	@touch $@

# xgrammar asks for triton, hundreds of megabytes which serve a GPU only; it runs without on a CPU.
$(DEV): $(TORCH) pyproject.toml
	@echo "then what development needs:"
	$(PIP) install -c constraints.txt -e '.[train,qlora,gguf,batch,curate,eval,tasks,app,dev]'
	$(PIP) install -q -c constraints.txt --no-deps xgrammar
	@touch $(CORE) $@

$(DOCS): $(CORE)
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

$(ECOSYSTEM): $(DEV)
	$(PIP) install -c constraints.txt -e '.[train,qlora,gguf,batch,curate,eval,tasks,app,dev,ecosystem]'
	@touch $@
