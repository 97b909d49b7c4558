# `make demo` makes a picture, `make test` runs everything; both set up .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
GPU_WHEELS := diffusers transformers huggingface_hub safetensors tokenizers tqdm typer rich markdown-it-py mdurl \
  pygments shellingham click pyyaml regex requests httpx importlib_metadata zipp pybind11 ninja pytest pluggy iniconfig \
  nvidia-cutlass==$(shell sed -n 's/^nvidia-cutlass==//p' constraints.txt)

.PHONY: demo pipeline test lint bench install dev clean cuda-compile gpu-check gpu-wheels gpu-status

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
	$(PIP) '$(WHEEL)[diffusers,train,evaluate,data,dev]'
	touch $@

install: $(VENV)/installed
dev: $(VENV)/dev

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

# Collect, filter, annotate, synthesise, balance, train two stages, score: minutes on two cores.
pipeline: $(VENV)/dev
	$(BIN)/python examples/whole_pipeline.py

test: $(VENV)/dev
	$(BIN)/python -m pytest -q -n $(JOBS) tests

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/mypy

# Every CUDA kernel for every GPU generation, against the budget of registers and shared memory; needs nvcc, no GPU.
cuda-compile:
	$(PYTHON) -m tests.compile_cuda --jobs $(JOBS)

# On a machine with a GPU, nvcc and a CUDA torch in $(PYTHON): build, tests, sanitizer, benchmarks, in under 9 minutes.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

# What such a machine may lack, for use without a network; gpu-check takes it from here.
gpu-wheels:
	rm -rf gpu-wheels
	$(PYTHON) -m pip download -q -d gpu-wheels --no-deps --only-binary=:all: --python-version 3.12 \
	  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	  --platform manylinux2014_x86_64 $(GPU_WHEELS)

# docs/gpu-status.md from the results under benchmarks/results.
gpu-status:
	$(PYTHON) -m benchmarks.gpu_status

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) build dist outputs
