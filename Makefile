# SPDX-License-Identifier: Apache-2.0
# `make` lists the targets. Everything but gpu-check works inside $(VENV), which is made on first use.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= build/gpu-check
TIER   ?= full
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
# Images of containers often forbid Python to keep what it compiled. With PyTorch's modules compiled anew, each
# process of the tests would take more than twice as long to start. An empty value forbids nothing.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup build demo pictures page test seeds sanitize lint format bench bounds gpu-check wheel-check docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: build  ## virtual environment, pinned dependencies, compiled extension
	@echo "[setup] done; the command is $(BIN)/cogview, or cogview after: . $(BIN)/activate"
	@echo "[setup] next: $(BIN)/cogview generate 'an astronaut' --out astronaut.png"

# The CPU build of PyTorch is a tenth of the CUDA one, so it is tried first where no NVIDIA GPU answers.
# --no-compile: Python compiles the modules that it imports, pip all of PyTorch, which takes twice as long as
# to install it.
$(VENV)/.ready: constraints.txt pyproject.toml
	@echo "[setup] virtual environment in $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' \
	  || { echo "[setup] Python 3.10 to 3.14 is needed; choose one with make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@if nvidia-smi >/dev/null 2>&1; then $(PIP) install -q --no-compile -c constraints.txt torch; else \
	  $(PIP) install -q --no-compile -c constraints.txt 'torch==$(TORCH)+cpu' 2>/dev/null \
	  || $(PIP) install -q --no-compile --retries 0 --timeout 20 -c constraints.txt 'torch==$(TORCH)+cpu' \
	       --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
	  || $(PIP) install -q --no-compile -c constraints.txt torch; fi
	@$(PIP) install -q --no-compile -c constraints.txt triton setuptools wheel ninja pybind11
	@COGVIEW_SKIP_EXTENSION=1 $(PIP) install -q --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

build: $(VENV)/.ready  ## (re)compile the extension in place
	@$(BIN)/python setup.py -q build_ext --inplace

demo: build  ## train CogView on handwritten digits and draw them, about 6 minutes on 2 cores
	$(BIN)/cogview demo

pictures: build  ## train CogView on OpenMoji's drawings and draw them, one to two hours on 2 cores
	$(BIN)/cogview demo --data emoji

page: build  ## draw, describe and paint in the browser, with the run that ships
	$(BIN)/cogview serve --open

# A worker a core: each has its share of the threads (tests/conftest.py), and takes over what another has left.
test: build  ## every test that this machine can run
	$(BIN)/python -m pytest -n auto --dist worksteal --durations=20

# The tests of the error budget, SEEDS times each. THREADS, where given, is what one test may use, and fewer
# workers run: two of two threads on two cores took three times as long as one.
SEEDS ?= 50
WORKERS = $(if $(THREADS),$$(( ($$(nproc) + $(THREADS) - 1) / $(THREADS) )),auto)
ifneq ($(filter seeds,$(MAKECMDGOALS)),)
ifneq ($(THREADS),)
ifeq ($(shell test '$(THREADS)' -ge 1 2>/dev/null && echo right),)
$(error THREADS must be a whole number of at least 1, got '$(THREADS)')
endif
endif
endif
seeds: build  ## the error budget under SEEDS=50 seeds, and how much of it was used at most
	$(if $(THREADS),OMP_NUM_THREADS=$(THREADS)) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal \
	  tests/kernels --seeds $(SEEDS) -m budget $(if $(ONLY),-k "$(ONLY)")

# The CPU part with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package of its own that
# may be built while a wheel is.
# The interpreter was built without them, so they are loaded before it, and libstdc++ to catch exceptions.
# A thread that waits for another one sleeps: where a compiler has the cores, turning took most of the time.
SANITIZED := build/sanitize
SANITIZED_OPS := three_region_attention decode_attention decode_linear linear_cross_entropy draw_tokens draw_step
SANITIZERS = $(shell for l in asan ubsan stdc++; do $${CXX:-g++} -print-file-name=lib$$l.so; done)
sanitize: $(VENV)/.ready  ## run tests of CPU kernels under address and undefined-behaviour sanitizers
	@mkdir -p $(SANITIZED)
	@COGVIEW_SANITIZE="$(SANITIZED_OPS)" COGVIEW_CUDA=0 $(BIN)/python setup.py -q egg_info -e $(SANITIZED) \
	  build -b $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
	  $(BIN)/python -m pytest -q --import-mode=append -o pythonpath="$(SANITIZED)/lib ." \
	  tests/kernels/test_three_region_attention.py tests/kernels/test_decode_attention.py \
	  tests/kernels/test_decode_linear.py tests/kernels/test_linear_cross_entropy.py \
	  tests/model/test_whole_step.py tests/model/test_sampling.py \
	  -k "every_instruction_set or cpu_refuses or thread_count or any_stride or test_product or many_rows or the_kernel" \
	  -p no:cacheprovider

lint: $(VENV)/.ready  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.ready  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

bench: build  ## time every op against its rivals on this machine, then write the tables and plots
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.report

bounds: build  ## wall-clock bounds that the project promises; wants a quiet machine
	$(BIN)/python -m benchmarks.bounds

# Takes the machine as it is: $(PYTHON) with its PyTorch and Triton, no virtual environment, no network.
gpu-check:  ## on an NVIDIA GPU, into OUT=folder: TIER=quick (3 minutes), full (6, the default) or deep (8)
	@$(PYTHON) .ci/gpu_check.py --tier "$(TIER)" --out "$(OUT)"

# PyTorch is in the environment the wheel is installed into, but not in the one that builds it. Both builds
# share a folder of objects: ninja takes one only where it would run the same command on the same files, and
# only the bindings, whose command names the environment's Python, are compiled for each.
wheel-check: $(VENV)/.ready  ## build the wheel in isolation, install it in a clean environment, use it there
	@rm -rf build/wheel && mkdir -p build/wheel
	$(PIP) wheel -q --no-deps -w build/wheel .
	$(BIN)/python -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt \
	  "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)')" build/wheel/*.whl
	cd build/wheel && venv/bin/python ../../tests/smoke.py

docs: build  ## build the site from docs/ and the docstrings, into build/docs
	$(PIP) install -q --no-compile -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -q -W -b html -d build/docs-cache docs build/docs
	@echo "[docs] open build/docs/index.html"

clean:  ## remove what was built (not the virtual environment)
	rm -rf build dist *.egg-info cogview_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache
