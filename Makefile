# make train   install into .venv and run the main job: a small CNN on digits with the Hessian-trace penalty
# make test    install into .venv and run the whole test suite
# make lint    the linter, the formatter's check and the type checker
# make docs    the documentation on http://127.0.0.1:8000; make docs-build writes it into site/
# Settings go through ARGS: make train ARGS="model=mlp regularizer.strength=1e-2"

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# The versions that were tested need Python 3.11; an older one gets the newest that run on it.
PINNED := $(shell $(PYTHON) -c "import sys; print('--constraint constraints.txt' if sys.version_info >= (3, 11) else '')")

.PHONY: train test lint docs docs-build

train: .venv/installed
	$(BIN)/lightning-hessian $(ARGS)

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs docs-build: export NO_MKDOCS_2_WARNING = 1

docs: .venv/installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(PINNED) --editable '.[train,docs]'
	$(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

docs-build: .venv/installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(PINNED) --editable '.[train,docs]'
	$(BIN)/mkdocs build --strict --quiet

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(PINNED) --editable '.[train,test]'
	touch $@
