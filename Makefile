# Everything runs in .venv, which the first command makes. `make PYTHON=python3.12 demo` picks another interpreter;
# `make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo` takes torch from another index (here: the small CPU build).

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/attnctrl.stamp
DOCS := $(VENV)/docs.stamp
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help install demo gallery test test-all results docs lint format types clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

# torch comes first and alone: pip then keeps the build that the machine or TORCH_INDEX offers.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "attnctrl needs Python 3.10 or newer, '$(PYTHON)' is older or missing; try: make PYTHON=python3.12 demo" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing attnctrl into $(VENV) (once; torch is large)" >&2
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP) ## the virtual environment, with attnctrl in it

demo: $(STAMP) ## without and with control, side by side: out/demo.png
	@$(BIN)/attnctrl demo

gallery: $(STAMP) ## every method's picture, without and with it: assets/gallery/ (minutes)
	@$(BIN)/python docs/gallery.py

test: $(STAMP) ## the tests, on all cores (minutes)
	@$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(STAMP) ## the tests, the slow ones too
	@$(BIN)/python -m pytest -n auto --dist worksteal

results: $(STAMP) ## measured figures in all pages, model cards and the curve, from the stored results
	@$(BIN)/python -m attnctrl.toybox.results
	@$(BIN)/python -m attnctrl.toybox.pages
	@$(BIN)/python docs/curves.py
	@for card in assets/toy-*; do $(BIN)/python -m attnctrl.toybox.card $${card#assets/}; done

$(DOCS): $(STAMP)
	@$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

# not --quiet, which hides warnings from --strict as well
docs: $(DOCS) ## the site of docs/, with every link checked: out/site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP) ## style and common mistakes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP) ## rewrite the files in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP) ## static types
	@$(BIN)/mypy

clean: ## remove caches and what the commands wrote; the environment and checkpoints stay
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
