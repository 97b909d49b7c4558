# `make demo` makes a picture, `make test` runs everything; both set up .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test lint bench install dev clean

SOURCES := pyproject.toml constraints.txt CMakeLists.txt \
  $(shell find csrc python training -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.py' -o -name '*.yaml')
PIP = $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
WHEEL = $(shell ls $(VENV)/wheel/*.whl)

# The wheel is built once, then installed for users and, with more extras, for developers.
$(VENV)/wheel/built: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf $(VENV)/wheel
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w $(VENV)/wheel .
	touch $@

$(VENV)/installed: $(VENV)/wheel/built
	$(PIP) torch
	$(PIP) --force-reinstall --no-deps $(WHEEL)
	$(PIP) '$(WHEEL)[diffusers]'
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(PIP) '$(WHEEL)[diffusers,train,evaluate,dev]'
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
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/mypy

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) build dist outputs
