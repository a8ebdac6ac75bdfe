# make train   install into .venv and run the main job: a small CNN on digits with the Hessian-trace penalty
# make test    install into .venv and run the whole test suite
# make lint    the linter, the formatter's check and the type checker
# make docs    the documentation on http://127.0.0.1:8000; make docs-build writes it into site/
# make release-check   build the sdist and the wheel, and train with the wheel in an environment of its own
# Settings go through ARGS: make train ARGS="model=mlp regularizer.strength=1e-2"

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt

.PHONY: train test lint docs docs-build release-check

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
	$(INSTALL) --editable '.[train,docs]'
	$(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

docs-build: .venv/installed
	$(INSTALL) --editable '.[train,docs]'
	$(BIN)/mkdocs build --strict --quiet

release-check: .venv/installed
	.ci/release_check

# __init__.py has the version of the package.
.venv/installed: pyproject.toml constraints.txt lightning_hessian/__init__.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(INSTALL) --editable '.[train,test]'
	touch $@
