# `make demo` and `make test` need only Python >= 3.10: they create .venv and install into it once.
PYTHON ?= python3
# At most so many test processes, one per core; they share the cores between them.
JOBS ?= 4

BIN := .venv/bin
READY := .venv/ready

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types suite wheel clean

help:            ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile
	@echo "Settings: PYTHON=python3 (interpreter for .venv), JOBS=4 (most test processes)"

install: $(READY)  ## create .venv with the package and its tools

demo: $(READY)     ## answer questions about pictures with and without pruning
	$(BIN)/vistoken demo

test: lint types suite  ## lint, format check, types, tests

lint: $(READY)     ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow the front doors to kernels/, adapters/ and eval/ at run time, so it is shown
# plain packages: build/types/vistoken/, all links, each door as the __init__.py of its folder.
types: $(READY)    ## mypy
	rm -rf build/types
	mkdir -p build/types/vistoken
	cd build/types/vistoken && ln -s ../../../vistoken/* .
	for door in kernels adapters eval; do \
		rm build/types/vistoken/$$door.py && mkdir build/types/vistoken/$$door && \
		cd build/types/vistoken/$$door && ln -s ../../../../$$door/*.py . && \
		ln -s ../../../../vistoken/$$door.py __init__.py && cd ../../../.. || exit 1; \
	done
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p vistoken

suite: $(READY)    ## pytest
	$(BIN)/pytest -q -n logical --maxprocesses $(JOBS) --dist loadgroup --durations 10

wheel: $(READY)    ## sdist and wheel in dist/
	$(BIN)/python -m build

clean:             ## remove .venv and everything generated
	rm -rf .venv build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "vistoken needs Python 3.10 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Installing into .venv, once. PyTorch is large: this takes some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "pip>=23"
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $(READY)
