# Each target sets up .venv on its own; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
NVCC := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime
# Modules are compiled where they are imported: of the packages' own, most never are.
INSTALL := $(BIN)/python -m pip install --no-compile -c constraints.txt
SOURCES := $(shell find csrc -type f 2>/dev/null)

export PYTHONSAFEPATH = 1

.PHONY: demo test sanitize compiled bench lint types clean

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/emulated
	$(BIN)/pytest --import-mode=importlib -n 2 tests

sanitize: .venv/emulated
	.ci/sanitize

# Registers and stack of every GPU kernel; a spill fails. Needs nvcc, no GPU.
compiled: .venv/ready
	$(BIN)/python -m pykernels.bench.registers
	$(BIN)/python -m pykernels.kernels.compiled

bench: .venv/ready
	$(BIN)/pykernels bench

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

types: .venv/ready
	$(BIN)/mypy --strict pykernels

.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

# Where CUDA is required but there is no nvcc, NVIDIA's wheels bring one.
.venv/nvcc: .venv/created constraints.txt
	command -v nvcc || $(INSTALL) $(NVCC)
	touch $@

.venv/ready: .venv/created $(if $(filter 1,$(PYKERNELS_REQUIRE_CUDA)),.venv/nvcc) pyproject.toml setup.py constraints.txt CMakeLists.txt $(SOURCES)
	$(INSTALL) -e '.[dev]'
	touch $@

# The CUDA kernels on the host, for tests. Under PYKERNELS_EMULATED=1 .venv/ready has built them with the rest.
.venv/emulated: .venv/ready
	$(if $(filter 1,$(PYKERNELS_EMULATED)),,PYKERNELS_EMULATED=1 $(INSTALL) --no-deps -e .)
	touch $@

clean:
	rm -rf build .venv *.egg-info pykernels/*.so .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis
