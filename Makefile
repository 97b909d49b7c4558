# `make demo` makes a picture, `make test` runs everything; both set up .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
GPU_PYTHON ?= 3.12

.PHONY: demo lora-demo rl-demo pipeline eval docs extras test lint matrix bench install dev clean sdist wheels wheels-check cuda-compile gpu-check gpu-wheels gpu-status

SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard cmake/*.cmake) \
  $(shell find csrc python training -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.py' -o -name '*.yaml' -o -path '*serving/page/*')
PIP = $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
WHEEL = $(shell ls $(VENV)/wheel/*.whl)

# The wheel is built once, then installed for users and, with more extras, for developers.
$(VENV)/wheel/built: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf $(VENV)/wheel
	@echo 'compiling the kernels: some minutes'
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w $(VENV)/wheel .
	touch $@

$(VENV)/installed: $(VENV)/wheel/built
	@echo 'installing torch, then the package with what it needs'
	$(PIP) torch
	$(PIP) --force-reinstall --no-deps $(WHEEL)
	$(PIP) '$(WHEEL)[diffusers]'
	touch $@

$(VENV)/dev: $(VENV)/installed
	@echo 'installing what training, evaluation, serving and the tests need'
	$(PIP) '$(WHEEL)[diffusers,train,evaluate,data,serve,dev]'
	touch $@

install: $(VENV)/installed
dev: $(VENV)/dev

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

# A LoRA of twelve pictures and one of edit pairs, with what the tiny model can do before and after: minutes on two cores.
lora-demo: $(VENV)/dev
	$(BIN)/python examples/lora_demo.py

# Two short rounds of DPO on the tiny model's own pictures, and what they changed: before, after, curve in one picture.
rl-demo: $(VENV)/dev
	$(BIN)/python examples/rl_demo.py

# Collect, filter, annotate, synthesise, balance, train two stages, score: minutes on two cores.
pipeline: $(VENV)/dev
	$(BIN)/python examples/whole_pipeline.py

# TinyEval of the shipped model, or of MODEL=<folder>: what it can draw and edit, judged by pixels; minutes on two cores.
MODEL ?= tiny
eval: $(VENV)/dev
	$(BIN)/qwen-image-fast evaluate tiny $(MODEL) --out outputs/eval-$(notdir $(patsubst %/,%,$(MODEL)))

# Every extra in a clean environment of its own: what it promises runs. Downloads torch for each; minutes.
extras: $(VENV)/wheel/built
	$(PYTHON) -m tests.extras $(WHEEL)

# The pages of docs/ with a reference and a gallery made anew, in build/docs/index.html.
docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

test: $(VENV)/dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/mypy

# Every CUDA kernel for every GPU generation, against the budget of registers and shared memory; needs nvcc, no GPU.
cuda-compile:
	$(PYTHON) -m tests.compile_cuda --jobs $(JOBS)

# On a machine with a GPU, nvcc and a CUDA torch in $(PYTHON): build, tests, sanitizer, benchmarks, in less than 8 minutes.
# GPU_OUTPUT names a folder for results and log, GPU_RESUME=--resume leaves out what has passed by the results there.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(if $(GPU_OUTPUT),--output $(GPU_OUTPUT)) $(GPU_RESUME)

# What such a machine may lack besides torch, for use without a network; gpu-check takes it from here. Everything that
# these depend on comes along, but for what only the Python side of CUTLASS needs. GPU_HAS='cmake numpy pillow
# transformers' leaves out what is known to be there, 95 MB otherwise.
GPU_DOWNLOAD = $(PYTHON) -m pip download -q --disable-pip-version-check -c constraints.txt -d gpu-wheels \
  --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp --platform manylinux_2_28_x86_64 \
  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64
gpu-wheels:
	rm -rf gpu-wheels
	$(GPU_DOWNLOAD) diffusers transformers safetensors huggingface_hub numpy pillow tqdm rich typer cmake ninja \
	  pybind11 pytest
	$(GPU_DOWNLOAD) --no-deps nvidia-cutlass
	rm -f $(foreach name,$(GPU_HAS),gpu-wheels/$(name)-*.whl)
	du -sh gpu-wheels

# docs/gpu-status.md from the results under benchmarks/results.
gpu-status:
	$(PYTHON) -m benchmarks.gpu_status

# The wheel with old and new versions of torch, transformers and diffusers; downloads some GB. docs/versions.md from it.
matrix: $(VENV)/wheel/built
	$(BIN)/python -m tests.matrix --wheel $(WHEEL)

# In dist/ the source archive, and with it a wheel for every Python that is found; CUDA=1: with CUDA kernels (docs/install.md).
sdist:
	$(PYTHON) packaging/build_wheels.py --sdist

wheels:
	$(PYTHON) packaging/build_wheels.py $(if $(CUDA),--cuda)

# Those wheels in clean environments, the table in docs/install.md from it; TORCH=cp311=torch==2.13.0: whole there.
wheels-check:
	$(PYTHON) -m tests.wheels $(if $(TORCH),--torch $(TORCH))

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) build dist outputs
