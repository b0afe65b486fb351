# `make serve` and `make test` need nothing but a Python: they build .venv first.

VENV := .venv
STAMP := $(VENV)/.installed
HOST ?= 127.0.0.1
PORT ?= 8000
# More options for `make serve` and `make test`: make serve ARGS="--threads 4", make test ARGS="-k streaming".
ARGS ?=
# Examples of each test of requests in `make fuzz`, and seconds of raw HTTP.
SEEDS ?= 1000
SECONDS ?= 600
# The environment of the clients that `make compat` tries.
CLIENTS := $(CURDIR)/.venv-clients
# Test processes; arithmetic in each is single-threaded.
WORKERS ?= 2

# Waiting threads that spin would cost their neighbors whole time slices.
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help install serve quick test sanitize fuzz compat shots site lint format gpu-check clean

help:
	@echo "make serve      serve the shipped checkpoint on $(HOST):$(PORT)"
	@echo "make quick      lint, types, and all tests but those in the places that tests/conftest.py calls slow"
	@echo "make test       lint, types, and all tests"
	@echo "make sanitize   the C kernels' tests, and an engine, under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzz       random requests, SEEDS (1000) of each test, and raw HTTP for SECONDS (600)"
	@echo "make compat     try lm-evaluation-harness, guidellm and other clients against a server (installs them)"
	@echo "make shots      take the pictures of the page that the documentation shows (needs Chromium)"
	@echo "make site       build the documentation as a site in dist/site, and follow its links"
	@echo "make lint       ruff and mypy"
	@echo "make gpu-check  on a machine with a GPU: right, how fast, where time goes; ARGS=--dry-run: what it would do"
	@echo "make format     let ruff rewrite the tree"
	@echo "make clean      remove .venv and all caches"

install: $(STAMP)

$(STAMP): pyproject.toml
	@for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "installing into $(VENV) with $$($$python --version), which takes a minute or two"; \
	    $$python -m venv $(VENV) && exit 0; \
	  fi; \
	done; echo "FastBLT needs Python 3.11 or later on the PATH" >&2; exit 1
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

serve: $(STAMP)
	$(VENV)/bin/fastblt serve --host $(HOST) --port $(PORT) $(ARGS)

# Each test process takes its share in order, so that most servers are started for one of them only.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

quick: lint
	$(PYTEST) -m "not slow" $(ARGS)

test: lint
	$(PYTEST) $(ARGS)

sanitize: $(STAMP)
	$(VENV)/bin/python -m tests.kernels.cpu.sanitized $(ARGS)

fuzz: $(STAMP)
	FASTBLT_FUZZ=$(SEEDS) FASTBLT_FUZZ_SECONDS=$(SECONDS) $(PYTEST) tests/fuzz $(ARGS)

compat: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,compat]'
	test -x $(CLIENTS)/bin/llm || { python=$$($(VENV)/bin/python -c 'import sys; print(sys.executable)') && \
	  $$python -m venv $(CLIENTS) && $(CLIENTS)/bin/pip install --quiet --disable-pip-version-check \
	  openai litellm langchain-openai llama-index-llms-openai-like llm; }
	! command -v npm >/dev/null || test -d $(CLIENTS)/node/node_modules/openai || \
	  npm install --silent --prefix $(CLIENTS)/node openai
	CLIENTS=$(CLIENTS) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/compat tests/benchmarks/evaluation/test_likelihood.py $(ARGS)

shots: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.browser.shots

site: $(STAMP)
	$(VENV)/bin/python -m fastblt.deploy.site

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet . || { echo "run 'make format'" >&2; exit 1; }
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# The Python that has a torch for the GPU: nothing is installed. make gpu-check ARGS=--dry-run says what would be done.
GPU_PYTHON ?= python3

gpu-check:
	@PYTHONPATH=src $(GPU_PYTHON) -m fastblt.benchmarks.gpu.check $(ARGS)

clean:
	rm -rf $(VENV) $(CLIENTS) .pytest_cache .hypothesis .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
