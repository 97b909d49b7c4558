# `make demo` makes a picture, `make test` runs everything; both set up .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test lint bench install dev clean

# Two stamps: what a user has, and what a developer has on top.
$(VENV)/installed: pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.py')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install -q -c constraints.txt '.[diffusers]'
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt '.[diffusers,train,dev]'
	touch $@

install: $(VENV)/installed
dev: $(VENV)/dev

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/dev
	$(BIN)/python -m pytest -q -n $(JOBS) tests

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp')
	$(BIN)/mypy

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) build dist outputs
