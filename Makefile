# Everything starts here. Needs make and Python 3.11 or newer; all else goes into .venv.
#
#   make demo     the whole chain on the sample slide, ending in demo/report.html
#   make test     the fast tests
#   make install  only set up
#   make bench    speed, beside plain reference code in the same process
#   make gpu      on a machine with a GPU: tests, benchmarks and a short training, in 9 minutes, without network
#   make check    formatter, linter, type checker, import contracts

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --no-compile --progress-bar off --disable-pip-version-check -c constraints.txt
WORKERS ?= 2

SHELL := bash
.SHELLFLAGS := -o pipefail -c

.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow check format bench gpu clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)

# Bytecode is compiled on first import instead of at installation: torch alone has thousands of files. The first import is
# made here, because with PYTHONDONTWRITEBYTECODE, as in many containers, every process would compile all of it again.
FIRST_IMPORT := torch._dynamo, torch.distributed.run, torch.utils.tensorboard, torchvision, timm, hs2p, openslide, pandas, \
  sklearn.linear_model, sklearn.cluster, scipy.stats, scipy.optimize, matplotlib.pyplot, h5py, typer, rich, jinja2, pytest, \
  dino.api, dino.cli.main

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "expected Python 3.11 or newer, found `$(PYTHON) --version`; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (PyTorch is large: some minutes on a fresh machine)"
	@$(PIP) setuptools==$(shell sed -n 's/^setuptools==//p' constraints.txt) -q
	@$(PIP) --no-build-isolation -e '.[dev]' | sed -n -E 's/^ *(Downloading|Using cached) ([^ ]+) \(([0-9]{2,}\.[0-9] MB)\)$$/  \2 \3/p; s/^(Installing) .*/\1/p'
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import $(FIRST_IMPORT)'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m dino demo demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist worksteal --durations 15

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --durations 15

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# On a GPU machine, the Python that has torch is used as it is: nothing is installed.
gpu:
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then python=$(PYTHON); else python=$(BIN)/python; fi; \
	  $$python -c 'import torch' 2>/dev/null || \
	  { echo "expected a Python with PyTorch, found none in $(PYTHON) and $(VENV); try: make gpu PYTHON=/path/to/python3"; exit 2; }; \
	  $$python -m benchmarks.gpu $(if $(OUT),--output $(OUT))

clean:
	rm -rf demo build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find dino tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
